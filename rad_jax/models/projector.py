"""From image features to word-embedding space: the two-layer GELU projector of LLaVA-1.5, or the first LLaVA's one matrix."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rad_jax.models.layers import ACTIVATIONS, Dense, fan_in_uniform

KINDS = ("mlp2x_gelu", "linear")  # LLaVA's names for them


class Projector(nn.Module):
    """Image features [B, P, Dv] to the language model's width [B, P, D]. Starts from torch's default Linear init, as the original does."""

    width: int
    dtype: Any = jnp.float32
    kind: str = "mlp2x_gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(name: str, axes: tuple[str, str]) -> Dense:
            return Dense((self.width,), axes, dtype=self.dtype, kernel_init=fan_in_uniform(1), name=name)

        x = dense("fc1", ("embed", "mlp"))(x)
        return x if self.kind == "linear" else dense("fc2", ("mlp", "embed"))(ACTIVATIONS["gelu"](x))
