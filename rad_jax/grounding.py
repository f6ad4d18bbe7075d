"""Where a model looks: the decoder's attention from words to the image, the tower's attention, and likeness of patches to a phrase."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rad_jax.images import normalise
from rad_jax.models.clip import Clip
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


@functools.partial(jax.jit, static_argnames="model")
def log_likelihood(model: Llava, variables: Tree, batch: dict[str, Any], queries: Array) -> Array:
    """How likely some tokens of a text are, given the film and the text before them: float32 [B, Q], natural logarithms.

    Args:
        model, variables, batch, queries: as in `attention_to_image`; of the token after each query.
    """
    vision = model.config.vision
    assert vision is not None, "a language model alone looks at no image"
    images = normalise(batch["image"], jnp, vision.pixel_mean, vision.pixel_std)
    logits = model.apply(variables, batch["tokens"], batch["length"], images, queries)
    following = jnp.take_along_axis(batch["tokens"], queries + 1, axis=1)
    return jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), following[..., None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnames="model")
def attention_of_tower(model: Clip, variables: Tree, batch: dict[str, Any]) -> tuple[Array, Array]:
    """Attention of the tower's class token, and how like each patch is to a phrase.

    Args:
        model: the two towers; variables: their weights.
        batch: image uint8 [B, Y, X], tokens int32 [B, T] of the phrases, length int32 [B].

    Returns:
        float32 [B, L, N, P], shares of every layer's and head's attention on the patches, row by row over the image (the rest is on the
        class token), and float32 [B, P], cosines of the phrase with the patches, which go through the class token's projection. Only the
        class token was trained to meet the text there.
    """
    c = model.config.vision
    images = normalise(batch["image"], jnp, c.pixel_mean, c.pixel_std)

    def looked(clip: Clip) -> Array:
        patches = clip.vision_head(clip.vision(images)[:, 1:]).astype(jnp.float32)
        unit = patches / jnp.maximum(jnp.linalg.norm(patches, axis=-1, keepdims=True), 1e-12)
        return jnp.einsum("bpe,be->bp", unit, clip.encode_text(batch["tokens"], batch["length"]))

    likeness, seen = nn.apply(looked, model, mutable=["attention"])(variables)
    weights = seen["attention"]["vision"]["blocks"]["attn"]["first"][0]
    return weights.transpose(1, 0, 2, 3)[..., 1:], likeness
