"""Where the decoder looked at the image while it wrote: attention from word positions to image positions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rad_jax.images import normalise
from rad_jax.models.llava import Llava
from rad_jax.prompts import IMAGE_ID
from rad_jax.state import Tree

Array = jax.Array


@functools.partial(jax.jit, static_argnames="model")
def attention_to_image(model: Llava, variables: Tree, batch: dict[str, Any], queries: Array) -> Array:
    """Attention of every layer and head from some text positions to the patches.

    Args:
        model: the model; variables: its weights and adapters.
        batch: image uint8 [B, Y, X], tokens int32 [B, T] with prompt and text, length int32 [B].
        queries: int32 [B, Q], indices into `tokens`; the token at t is predicted at t - 1.

    Returns:
        float32 [B, L, N, Q, P]: shares of attention on the patches, row by row over the image; they sum to less than one, the rest is
        on words.
    """
    vision = model.config.vision
    assert vision is not None, "a language model alone looks at no image"
    images = normalise(batch["image"], jnp, vision.pixel_mean, vision.pixel_std)
    _, seen = model.apply(variables, batch["tokens"], batch["length"], images, queries, mutable=["attention"])
    weights = seen["attention"]["llm"]["layers"]["attn"]["weights"][0].transpose(1, 0, 2, 3, 4)
    patches = vision.patches
    placeholder = jnp.argmax(batch["tokens"] == IMAGE_ID, axis=1)
    rows = queries + jnp.where(queries > placeholder[:, None], patches - 1, 0)
    weights = jnp.take_along_axis(weights, rows[:, None, None, :, None], axis=3)
    columns = placeholder[:, None] + jnp.arange(patches)
    return jnp.take_along_axis(weights, columns[:, None, None, None, :], axis=4)
