"""The one attention function, and the self-attention of the two encoders."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rad_jax.models.layers import Dense

Array = jax.Array
Impl = Literal["xla", "cudnn"]


def attend(q: Array, k: Array, v: Array, lengths: Array | None, *, causal: bool, impl: Impl = "xla") -> Array:
    """Scaled dot-product attention with lengths instead of masks.

    Args:
        q: [B, S, N, H].
        k, v: [B, T, K, H]; K divides N (grouped-query attention).
        lengths: int32 [B], keys at and after a row's length are not seen; None when all are real.
        causal: query s sees keys 0..s. For a single decoding query leave it off and pass `lengths` = position + 1.
        impl: "xla" everywhere, "cudnn" on NVIDIA GPUs in 16 bit; chosen by the config, never by the backend.

    Returns:
        [B, S, N, H] in q's dtype; the softmax is taken in float32.
    """
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, is_causal=causal, implementation=impl)


def attention_weights(q: Array, k: Array, lengths: Array | None, *, causal: bool) -> Array:
    """The weights of `attend`, for looking at: float32 [B, N, S, T], rows summing to one. Arguments as in `attend`."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bsnh,btnh->bnst", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    seen = jnp.ones(scores.shape[-2:], bool)[None, None]
    if causal:
        seen = jnp.tril(seen)
    if lengths is not None:
        seen = seen & (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None, :]
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


class EncoderAttention(nn.Module):
    """Bidirectional self-attention with biases, as in ViT and BERT: [B, S, D] -> [B, S, D]."""

    heads: int
    dtype: Any = jnp.float32
    impl: Impl = "xla"

    @nn.compact
    def __call__(self, x: Array, lengths: Array | None) -> Array:
        width = x.shape[-1]
        shape = (self.heads, width // self.heads)

        def heads(name: str) -> Array:
            y = Dense(shape, ("embed", "heads", "head_dim"), dtype=self.dtype, name=name)(x)
            return nn.with_logical_constraint(y, ("batch", "length", "act_heads", None))

        y = attend(heads("q"), heads("k"), heads("v"), lengths, causal=False, impl=self.impl)
        return Dense((width,), ("heads", "head_dim", "embed"), in_axes=2, dtype=self.dtype, name="o")(y)
