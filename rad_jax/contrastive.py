"""The losses between images and texts of a global batch, whose B x B logits no device ever holds, and what the towers keep for them.

All features are gathered on every device (32,768 pairs of 512 numbers are 64 MB a side), but a device compares only its own rows with
them, `ROWS` at a time, and compares them again in the backward pass instead of keeping the logits.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Array = jax.Array
Loss = Literal["softmax", "sigmoid"]

ROWS = 512  # of logits at once: 64 MB of float32 at 32,768 pairs
_HIDDEN = -1e30  # finite, so that a batch without one pair gives zero and not 0 * inf


def contrastive_loss(
    images: Array, texts: Array, scale: Array, bias: Array, weights: Array, *, kind: Loss
) -> tuple[Array, tuple[Array, dict[str, Array]]]:
    """Summed over pairs, of z[i, j] = scale images[i] . texts[j] + bias.

    "softmax" (CLIP; Radford et al. 2021) is the mean of the cross-entropies over rows and over columns of z, "sigmoid" (SigLIP; Zhai et
    al. 2023, algorithm 1) the sum over all j of -log sigmoid(z[i, i]) and -log sigmoid(-z[i, j]). Under `jax.set_mesh` and linen's logical
    rules each device works on its rows of the batch.

    Args:
        images, texts: float32 [B, E], unit vectors.
        scale, bias: float32 [].
        weights: float32 [B], 1, or 0 for rows that are not there: they are nobody's pair and nobody's negative.
        kind: which loss.

    Returns:
        The sum, and (sum of weights, metrics): accuracy counts images whose own text is the nearest.
    """
    spec = nn.logical_to_mesh_axes(("batch",)) or PartitionSpec(None)
    mesh, axes = jax.sharding.get_abstract_mesh(), spec[0]
    if mesh.empty or axes is None:
        return _own_rows(images, texts, scale, bias, weights, kind=kind, axes=())
    rows, whole = PartitionSpec(axes), PartitionSpec()
    own = functools.partial(_own_rows, kind=kind, axes=(axes,) if isinstance(axes, str) else axes)
    return jax.shard_map(own, in_specs=(rows, rows, whole, whole, rows), out_specs=whole)(
        images, texts, scale, bias, weights
    )


def _own_rows(
    images: Array, texts: Array, scale: Array, bias: Array, weights: Array, *, kind: Loss, axes: tuple[str, ...]
) -> tuple[Array, tuple[Array, dict[str, Array]]]:
    """`contrastive_loss` of the rows that this device has, summed over the devices along `axes`."""
    count = len(weights)

    def everyone(x: Array) -> Array:
        return jax.lax.all_gather(x, axes, tiled=True) if axes else x

    all_images, all_texts, there = everyone(images), everyone(texts), everyone(weights) > 0
    places = jnp.arange(count) + (jax.lax.axis_index(axes) * count if axes else 0)

    @jax.checkpoint
    def block(item: tuple[Array, ...]) -> tuple[Array, Array]:
        image, text, weight, place = item
        to_texts = scale * _dot(image, all_texts) + bias
        hidden = jnp.where(there, to_texts, _HIDDEN)
        if kind == "softmax":
            to_images = jnp.where(there, scale * _dot(text, all_images) + bias, _HIDDEN)
            own = scale * (image * text).sum(-1) + bias
            losses = (jax.nn.logsumexp(hidden, axis=1) + jax.nn.logsumexp(to_images, axis=1)) / 2 - own
        else:
            paired = jnp.arange(len(there)) == place[:, None]
            losses = (jax.nn.softplus(jnp.where(paired, -to_texts, to_texts)) * there).sum(1)
        correct = hidden.argmax(1) == place
        return (losses * weight).sum(), (correct * weight).sum()

    size = next(rows for rows in range(min(count, ROWS), 0, -1) if count % rows == 0)
    items = jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), (images, texts, weights, places))
    losses, correct = jax.lax.map(block, items)
    sums = losses.sum(), weights.sum(), correct.sum()
    loss_sum, weight, accuracy = jax.lax.psum(sums, axes) if axes else sums
    return loss_sum, (weight, {"accuracy": accuracy})


def _dot(rows: Array, every: Array) -> Array:
    """[b, E], [B, E] -> [b, B]. In full float32: a TPU's default would round the features to 8 bits, at a scale of 100."""
    return jnp.matmul(rows, every.T, precision="highest")


def activation_bytes(model: nn.Module, text_length: int) -> dict[str, int]:
    """What each tower keeps of one row between its forward and its backward pass, in bytes: {"image": ..., "text": ...}.

    Counted from the arrays that differentiation saves under the model's remat policy, as two rows' less one row's; the compiler may keep
    less, or pad.

    Args:
        model: a `Clip`.
        text_length: T.
    """
    size = model.config.vision.image_size

    def inputs(rows: int) -> tuple[Any, ...]:
        return (
            jax.ShapeDtypeStruct((rows, size, size, 3), jnp.float32),
            jax.ShapeDtypeStruct((rows, text_length), jnp.int32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        )

    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs(1)))

    def saved(method: str, *given: Any) -> int:
        def pass_back(variables: Any, *given: Any) -> Any:
            return jax.vjp(lambda variables: model.apply(variables, *given, method=method), variables)[1]

        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(pass_back, variables, *given)))

    (one, *words), (two, *more_words) = inputs(1), inputs(2)
    return {
        "image": saved("encode_image", two) - saved("encode_image", one),
        "text": saved("encode_text", *more_words) - saved("encode_text", *words),
    }
