"""How large the numbers in a model grow on one prompt, block by block: whether float16, which ends at 65,504, holds them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rad_jax.errors import UserError
from rad_jax.images import normalise
from rad_jax.interop.exported import Exported
from rad_jax.lazy import first_layers
from rad_jax.models import llama, vit
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.projector import Projector
from rad_jax.models.vit import Vit, VitConfig
from rad_jax.prompts import IMAGE_ID, load_tokenizer, question, render_v1

LARGEST_FLOAT16 = 65504.0
WORDS = 64  # of a drawn prompt, where there is no tokenizer
Study = tuple[np.ndarray, str | None]  # image uint8 [Y, X], indication


def largest_outputs(model: Exported, study: Study | None) -> dict[str, float]:
    """Greatest absolute output of each block that is computed, by name, in float32, of one conversation up to the answer.

    Weights come into memory a layer at a time, so that a model of any depth can be looked at before it is loaded anywhere.

    Args:
        model: an image-to-text model or a language model; adapters are added, not merged.
        study: what is asked about; without one a drawn image and no indication.

    Returns:
        "vision.blocks.0", ..., "llm.layers.0", ...: floats.

    Raises:
        UserError: a block's output is beyond float16, or no number.
    """
    config, found = model.config, {}
    assert config is not None
    ids = _prompt(model, None if study is None else study[1])
    table = model.variables["params"]["llm"]["embed"]["embedding"]
    embed = np.asarray(np.asarray(table)[np.maximum(ids, 0)], np.float32)
    if config.vision is not None:
        image = _drawn(config.vision.image_size) if study is None else study[0]
        for name, features in _tower(model, config.vision, image):
            found[name] = float(jnp.abs(features).max())
        patches = _projected(model, config, features[:, -config.vision.patches :])
        place = int(np.argmax(ids == IMAGE_ID))
        embed = np.concatenate([embed[:place], patches[0], embed[place + 1 :]])
    for name, x in _decoder(model, config, jnp.asarray(embed[None])):
        found[name] = float(jnp.abs(x).max())
    for name, value in found.items():
        if not value <= LARGEST_FLOAT16:  # NaN too
            raise UserError(
                f"the output of {name} reaches {value:.3g}, beyond float16's 65504: export with --dtype=float32."
            )
    return found


def _tower(model: Exported, config: VitConfig, image: np.ndarray) -> Iterator[tuple[str, jax.Array]]:
    config = dataclasses.replace(config, dtype="float32", remat="none", attention="xla")
    params = {name: node for name, node in model.variables["params"]["vision"].items() if name != "norm"}
    pixels = normalise(image[None], np, config.pixel_mean, config.pixel_std)
    first = dataclasses.replace(config, feature_layer=1)
    params["blocks"] = jax.tree.map(lambda leaf: first_layers(leaf, 1), params["blocks"])
    x = jax.jit(Vit(first).apply)({"params": _float32(params)}, pixels)
    yield "vision.blocks.0", x
    apply = jax.jit(lambda params, x: vit.Block(config).apply({"params": params}, x, None, None)[0])
    for layer in range(1, config.blocks_used):
        x = apply(_layer(model.variables["params"]["vision"]["blocks"], layer), x)
        yield f"vision.blocks.{layer}", x


def _projected(model: Exported, config: LlavaConfig, features: jax.Array) -> np.ndarray:
    projector = Projector(config.llm.width, jnp.dtype("float32"))
    return np.asarray(projector.apply({"params": _float32(model.variables["params"]["projector"])}, features))


def _decoder(model: Exported, config: LlavaConfig, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    llm = dataclasses.replace(config.llm, dtype="float32", remat="none", attention="xla")
    places = jnp.arange(x.shape[1])[None]
    cos, sin = llama.angles(places, llm.head_dim, llm.rope_theta, llm.rope_scaling)
    step = llama.Step(places, cos=cos, sin=sin)
    apply = jax.jit(lambda variables, x: llama.Block(llm, config.lora).apply(variables, x, None, step)[0])
    parts = {"params": model.variables["params"]["llm"]["layers"]}
    if config.lora is not None:
        parts["lora"] = model.variables["lora"]["llm"]["layers"]
    for layer in range(llm.depth):
        x = apply({part: _layer(tree, layer) for part, tree in parts.items()}, x)
        yield f"llm.layers.{layer}", x


def _prompt(model: Exported, indication: str | None) -> np.ndarray:
    assert model.config is not None
    image = model.config.vision is not None
    if model.tokenizer is not None:
        slot = (IMAGE_ID,) if image else ()
        return np.array(render_v1(load_tokenizer(model.tokenizer), question(indication), None, slot).ids)
    drawn = np.random.default_rng(0).integers(3, model.config.llm.vocab_size, WORDS)
    return np.array([1, *[IMAGE_ID] * image, *drawn])


def _drawn(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)


def _layer(tree: Mapping[str, Any], layer: int) -> Any:
    """As it is stored: what is computed in float32 is cast where it is used, a matrix at a time."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[layer]), tree)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float32), tree)
