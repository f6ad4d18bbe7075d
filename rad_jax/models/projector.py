"""The two-layer GELU projector of LLaVA-1.5 (`mlp2x_gelu`), from image features to word-embedding space."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rad_jax.models.layers import ACTIVATIONS, Dense, fan_in_uniform


class Projector(nn.Module):
    """Image features [B, P, Dv] to the language model's width [B, P, D]. Starts from torch's default Linear init, as the original does."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(name: str, axes: tuple[str, str]) -> Dense:
            return Dense((self.width,), axes, dtype=self.dtype, kernel_init=fan_in_uniform(1), name=name)

        x = ACTIVATIONS["gelu"](dense("fc1", ("embed", "mlp"))(x))
        return dense("fc2", ("mlp", "embed"))(x)
