"""Image and text embeddings of the contrastive model, for retrieval; the ranks and their protocol live in evaluation/."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rad_jax import sharding
from rad_jax.images import normalise
from rad_jax.models.clip import Clip
from rad_jax.state import Tree


def embed(model: Clip, variables: Tree, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> dict[str, np.ndarray]:
    """Embeds a split.

    Args:
        model: the two towers.
        variables: their weights.
        batches: of template "clip" (input_pipeline.eval_batches), whole in every process; rows of weight 0 are left out.
        mesh: the devices, whose number divides the batches.

    Returns:
        images and texts float32 [n, E], unit length, and index int64 [n], the record numbers.
    """

    vision = model.config.vision

    @jax.jit
    def both(variables: Tree, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        pixels = normalise(batch["image"], jnp, vision.pixel_mean, vision.pixel_std)
        images, texts, *_ = model.apply(variables, pixels, batch["tokens"], batch["length"])
        return images, texts

    rows: dict[str, list[np.ndarray]] = {"images": [], "texts": [], "index": []}
    for batch in batches:
        inputs = {name: batch[name] for name in ("image", "tokens", "length")}
        with jax.set_mesh(mesh):
            images, texts = sharding.gather(both(variables, sharding.place_whole(inputs, mesh)))
        real = batch["weight"] > 0
        for name, values in (("images", images), ("texts", texts), ("index", batch["index"])):
            rows[name].append(values[real])
    return {name: np.concatenate(values) for name, values in rows.items()}


def embed_texts(model: Clip, variables: Tree, ids: Sequence[Sequence[int]], mesh: Mesh) -> np.ndarray:
    """Unit vectors float32 [n, E] of n texts given as token ids (prompts.render_clip), all in one batch."""
    size = -(-len(ids) // mesh.size) * mesh.size
    tokens, lengths = np.zeros((size, max(map(len, ids))), np.int32), np.ones(size, np.int32)
    for i, own in enumerate(ids):
        tokens[i, : len(own)], lengths[i] = own, len(own)
    embed = jax.jit(lambda variables, tokens, length: model.apply(variables, tokens, length, method="encode_text"))
    with jax.set_mesh(mesh):
        placed = sharding.place_whole({"tokens": tokens, "length": lengths}, mesh)
        return sharding.gather(embed(variables, **placed))[: len(ids)]
