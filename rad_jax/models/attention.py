"""The one attention function, and the self-attention of the two encoders."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rad_jax.models.layers import Dense

Array = jax.Array
Impl = Literal["xla", "cudnn"]

_HIDDEN = -1e30  # score of a key that is not seen; finite, so that a row that sees none gives no NaN
_SMALLEST_BLOCK = 64  # queries


def attend(q: Array, k: Array, v: Array, lengths: Array | None, *, causal: bool, impl: Impl = "xla") -> Array:
    """Scaled dot-product attention with lengths instead of masks.

    Args:
        q: [B, S, N, H].
        k, v: [B, T, K, H]; K divides N (grouped-query attention).
        lengths: int32 [B], keys at and after a row's length are not seen; None when all are real.
        causal: query s sees keys 0..s.
        impl: "xla" everywhere, "cudnn" on NVIDIA GPUs in 16 bit; chosen by the config, never by the backend.

    Returns:
        [B, S, N, H] in q's dtype; the softmax is taken in float32.
    """
    if impl == "xla":
        return _in_blocks(q, k, v, lengths, causal)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, is_causal=causal, implementation=impl)


def attend_cached(q: Array, keys: Array, values: Array, lengths: Array) -> Array:
    """Attention of one new token over the cache, its own key and value included.

    Heads come before tokens there, so that no product needs a transposed copy of it: five to ten times faster on XLA's CPU backend.

    Args:
        q: [B, 1, N, H].
        keys, values: [B, K, T, H].
        lengths: int32 [B], tokens at and after a row's length are not seen.

    Returns:
        [B, 1, N, H] in q's dtype; the softmax is taken in float32.
    """
    grouped = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[-1])
    scores = jnp.einsum("bkgh,bkth->bkgt", grouped, keys, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.arange(keys.shape[2]) < lengths[:, None, None, None], scores, _HIDDEN)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    y = jnp.einsum("bkgt,bkth->bkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (y / weights.sum(-1, keepdims=True)).reshape(q.shape).astype(q.dtype)


def _in_blocks(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool) -> Array:
    """`attend` in plain operations, in up to four blocks of queries: a causal one computes no scores of keys behind it.

    On XLA's CPU backend about three times as fast as `jax.nn.dot_product_attention`: heads come first, so that products need no
    transposed copies, scores of a block stay in the cache, and it is the output, not the weights, that is divided by the weights' sum.
    """
    batch, queries, heads, width = q.shape
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    q = q.swapaxes(1, 2).reshape(batch, k.shape[2], -1, queries, width)
    count = min(4, max(1, queries // _SMALLEST_BLOCK)) if causal else 1
    size = -(-queries // count)
    blocks = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        seen = end if causal else k.shape[1]
        scores = jnp.einsum(
            "bkgsh,bkth->bkgst", q[:, :, :, start:end], keys[:, :, :seen], preferred_element_type=jnp.float32
        )
        scores *= 1 / math.sqrt(width)
        at = jnp.arange(seen)
        if causal:
            scores = jnp.where(jnp.arange(start, end)[:, None] >= at, scores, _HIDDEN)
        if lengths is not None:
            scores = jnp.where((at < lengths[:, None])[:, None, None, None], scores, _HIDDEN)
        # The maximum is there for safety; the result does not depend on it.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        y = jnp.einsum(
            "bkgst,bkth->bkgsh", weights.astype(v.dtype), values[:, :, :seen], preferred_element_type=jnp.float32
        )
        blocks.append((y / weights.sum(-1, keepdims=True)).astype(q.dtype))
    return jnp.concatenate(blocks, axis=3).reshape(batch, heads, queries, width).swapaxes(1, 2)


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
