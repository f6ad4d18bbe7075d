"""Frozen weights in 8 bits: whole numbers of -127..127, and a scale per layer and output channel in a collection of their own, `scales`.

Half the memory and half the gathering of 16 bits. Rounding to the nearest of 255 steps moves a weight by at most 1/254 of the largest of
its column. Only the layers of the language model are stored so; its embeddings, its head and everything else are kept in 16 bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rad_jax import sharding

Array = jax.Array


def stored_dtype(path: str, leaf: Any, frozen_dtype: str) -> Any:
    """How a frozen variable is held in memory: in the config's `frozen_dtype`.

    Under "int8" these are the kernels that their modules declare so; their scales are float32, and everything else is bfloat16.
    """
    if frozen_dtype != "int8":
        return jnp.dtype(frozen_dtype)
    return jnp.dtype("int8" if leaf.dtype == jnp.int8 else "float32" if path.startswith("scales/") else "bfloat16")


def quantise(kernels: Array, inputs: int) -> tuple[Array, Array]:
    """Kernels of all layers [L, *in, *out], where the first `inputs` axes after L are contracted: int8 like them, and scales float32 [L, *out].

    kernel = whole number * scale, to the nearest; a column of zeros has scale 1.
    """
    kernels = kernels.astype(jnp.float32)
    largest = jnp.abs(kernels).max(axis=tuple(range(1, 1 + inputs)), keepdims=True)
    scales = jnp.where(largest > 0, largest / 127, 1.0)
    return jnp.round(kernels / scales).astype(jnp.int8), scales.squeeze(tuple(range(1, 1 + inputs)))


def place(kernels: Any, where: NamedSharding, scales_where: NamedSharding, scales_ndim: int) -> tuple[Array, Array]:
    """A base's kernels, numpy or lazy, as int8 and scales on the mesh; they are rounded there, shards side by side.

    Args:
        kernels: [L, *in, *out].
        where: place of the kernels; scales_where: of the scales.
        scales_ndim: 1 + the number of output axes.
    """
    rounded = jax.jit(quantise, static_argnames="inputs", out_shardings=(where, scales_where))
    return rounded(sharding.place(kernels, kernels.dtype, where), inputs=kernels.ndim - scales_ndim)
