"""The one attention function, and the self-attention of the two encoders."""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rad_jax.models.layers import Dense

Array = jax.Array
Impl = Literal["xla", "cudnn", "splash", "splash_interpret"]

_LANES = 128  # a TPU's vector registers are this wide: block sizes are multiples of it
_SUBLANES = 8  # rows of a register
_LARGEST_BLOCK = 1024  # of queries and of keys; larger ones do not fit the fast memory of every chip
# Encoders' rows up to here are one block in the backward kernels, with keys and values added up in parts, and queries against all keys in the
# forward one. An image tower's 1,370 tokens then are 1,408 instead of 1,536 in two blocks, and a head of 64 channels takes so many
# instruction bundles of the compiled kernels, forward + dq + dkv:
#          1,408: 12,144 + 11,354 + 15,560 on v5e    9,850 + 13,590 + 19,783 on v4, whose 16 MiB a whole block of dkv would exceed
#          1,536: 13,914 + 13,960 + 18,556           10,125 + 17,666 + 22,242
# In blocks of 128 alone, which 1,408 = 11 x 128 has beside the whole, 39,138 + 44,407 + 43,978 on v5e.
_LARGEST_WHOLE = 1408

_HIDDEN = -1e30  # score of a key that is not seen; finite, so that a row that sees none gives no NaN
_SMALLEST_BLOCK = 64  # queries


def attend(q: Array, k: Array, v: Array, lengths: Array | None, *, causal: bool, impl: Impl = "xla") -> Array:
    """Scaled dot-product attention with lengths instead of masks.

    Args:
        q: [B, S, N, H].
        k, v: [B, T, K, H]; K divides N (grouped-query attention).
        lengths: int32 [B], keys at and after a row's length are not seen; None when all are real.
        causal: query s sees keys 0..s.
        impl: "xla" everywhere, "cudnn" on NVIDIA GPUs in 16 bit, "splash" on TPUs ("splash_interpret" is the same kernel, slowly, on any
            machine); chosen by the config, never by the backend.

    Returns:
        [B, S, N, H] in q's dtype; the softmax is taken in float32. Queries at and after a row's length are padding, and what they get is
        unspecified when `causal`.
    """
    if not impl.startswith("splash"):
        q, k, v = named(q, k, v)
    if impl == "xla":
        return _in_blocks(q, k, v, lengths, causal)
    if impl == "cudnn":
        kernel = functools.partial(_cudnn, causal=causal)
    else:
        if lengths is None:
            lengths = jnp.full(q.shape[:1], k.shape[1], jnp.int32)
        kernel = functools.partial(_splash, causal=causal, interpret=impl == "splash_interpret")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, lengths)
    # XLA cannot split a hand-written kernel by itself: each device runs it on its own rows and heads. It could split cuDNN's, by rules that
    # JAX gives it, but these do not tie the lengths to the rows: devices would get some rows and the lengths of all.
    rows, heads = (nn.logical_to_mesh_axes((axis,))[0] for axis in ("batch", "act_heads"))
    split = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(kernel, in_specs=(split, split, split, PartitionSpec(rows)), out_specs=split, check_vma=False)(
        q, k, v, lengths
    )


def named(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values under the names that remat policies know (layers.REMAT_POLICIES)."""
    return checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")


def _cudnn(q: Array, k: Array, v: Array, lengths: Array | None, *, causal: bool) -> Array:
    """`attend` by cuDNN's fused attention. JAX takes its gradient for even lengths only: odd ones are padded."""
    queries, keys = q.shape[1], k.shape[1]
    if keys % 2 and not causal and lengths is None:
        lengths = jnp.full(q.shape[:1], keys, jnp.int32)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, is_causal=causal, implementation="cudnn")
    return checkpoint_name(y, "attended")[:, :queries]


def _splash(q: Array, k: Array, v: Array, lengths: Array, *, causal: bool, interpret: bool) -> Array:
    """`attend` by JAX's splash attention kernel for TPUs: scores never leave the chip's fast memory, masked blocks are not computed."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (queries, block_q), (keys, block_k) = _blocks(q.shape[1], causal), _blocks(k.shape[1], causal)
    whole = max(block_q, block_k) > _LARGEST_BLOCK
    mask = masks.CausalMask((queries, keys)) if causal else masks.FullMask((queries, keys))
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=kernel.BlockSizes(
            block_q=_LANES if whole else block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_kv_dkv_compute=_LANES if whole else block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )
    # Padding on the right is hidden from causal queries already. Other queries, padding too, see the real keys: one segment.
    real = jnp.arange(keys) < lengths[:, None]
    segments = None if causal else kernel.SegmentIds(jnp.ones((q.shape[0], queries), jnp.int32), real.astype(jnp.int32))

    def heads_first(x: Array, length: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    q = (q * (1 / math.sqrt(q.shape[-1]))).astype(q.dtype)
    # Kept as the kernels take them, so that the backward pass need not pad them again.
    y = jax.vmap(attention)(*named(heads_first(q, queries), heads_first(k, keys), heads_first(v, keys)), segments)
    return y.swapaxes(1, 2)[:, : q.shape[1]]


def whole_blocks(length: int, impl: Impl) -> int:
    """The length that an implementation pads a causal row to."""
    return _blocks(length, causal=True)[0] if impl.startswith("splash") else length


def _blocks(length: int, causal: bool) -> tuple[int, int]:
    """The padded length, and the size of the equal blocks it is cut into."""
    # Of a causal row's two blocks one pair in four need not be computed.
    count = 1 if not causal and length <= _LARGEST_WHOLE else -(-length // _LARGEST_BLOCK)
    block = -(-length // (count * _LANES)) * _LANES
    return count * block, block


def attend_cached(
    q: Array, keys: Array, values: Array, seen: Array, own: tuple[Array, Array] | None = None, *, impl: Impl = "xla"
) -> Array:
    """Attention of one new token over the cache and itself.

    Heads come before tokens there, so that no product needs a transposed copy of it: five to ten times faster on XLA's CPU backend.

    Args:
        q: [B, 1, N, H].
        keys, values: [B, K, T, H].
        seen: bool [B, T], places of the cache that hold tokens of the row.
        own: key and value [B, 1, K, H] of the new token, where they are not in the cache yet.
        impl: as in `attend`; plain operations either way, arranged for the machine.

    Returns:
        [B, 1, N, H] in q's dtype; the softmax is taken in float32.
    """
    grouped, scale = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[-1]), 1 / math.sqrt(q.shape[-1])
    group = grouped.shape[2]
    # A TPU multiplies a single row in its vector units, four times as slow here as several in its matrix units, most of them zeros.
    missing = max(0, _SUBLANES - group) if impl.startswith("splash") else 0

    def product(how: str, rows: Array, cached: Array) -> Array:
        rows = jnp.pad(rows.astype(cached.dtype), ((0, 0), (0, 0), (0, missing), (0, 0)))
        return jnp.einsum(how, rows, cached, preferred_element_type=jnp.float32)[:, :, :group]

    scores = jnp.where(seen[:, None, None], product("bkgh,bkth->bkgt", grouped, keys) * scale, _HIDDEN)
    most = scores.max(-1, keepdims=True)
    if own is None:
        weights = jnp.exp(scores - most)
        y = product("bkgt,bkth->bkgh", weights, values)
        return (y / weights.sum(-1, keepdims=True)).reshape(q.shape).astype(q.dtype)
    k, v = own[0][:, 0], own[1][:, 0, :, None].astype(jnp.float32)
    score = jnp.einsum("bkgh,bkh->bkg", grouped, k, preferred_element_type=jnp.float32)[..., None] * scale
    most = jnp.maximum(most, score)
    weights, weight = jnp.exp(scores - most), jnp.exp(score - most)
    y = product("bkgt,bkth->bkgh", weights, values) + weight * v
    return (y / (weights.sum(-1, keepdims=True) + weight)).reshape(q.shape).astype(q.dtype)


def _in_blocks(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool) -> Array:
    """`attend` in plain operations, in up to four blocks of queries: a causal one computes no scores of keys behind it.

    On XLA's CPU backend about three times as fast as `jax.nn.dot_product_attention`: heads come first, so that products need no
    transposed copies, scores of a block stay in the cache, and it is the output, not the weights, that is divided by the weights' sum.
    """
    batch, queries, heads, width = q.shape
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    q = q.swapaxes(1, 2).reshape(batch, k.shape[2], -1, queries, width)
    blocks = []
    for start, end in query_blocks(queries, causal):
        seen = end if causal else k.shape[1]
        part, at = q[:, :, :, start:end], jnp.arange(seen)
        scores = jnp.einsum("bkgsh,bkth->bkgst", part, keys[:, :, :seen], preferred_element_type=jnp.float32)
        scores *= 1 / math.sqrt(width)
        if causal:
            scores = jnp.where(jnp.arange(start, end)[:, None] >= at, scores, _HIDDEN)
        if lengths is not None:
            scores = jnp.where((at < lengths[:, None])[:, None, None, None], scores, _HIDDEN)
        # The maximum is there for safety; the result does not depend on it.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        y = jnp.einsum(
            "bkgst,bkth->bkgsh", weights.astype(v.dtype), values[:, :, :seen], preferred_element_type=jnp.float32
        )
        y = checkpoint_name(y.astype(q.dtype), "attended")
        blocks.append((y / weights.sum(-1, keepdims=True)).astype(q.dtype))
    return jnp.concatenate(blocks, axis=3).reshape(batch, heads, queries, width).swapaxes(1, 2)


def query_blocks(queries: int, causal: bool) -> list[tuple[int, int]]:
    """Start and end of the blocks of queries that "xla" goes through; a causal one sees keys up to its end."""
    count = min(4, max(1, queries // _SMALLEST_BLOCK)) if causal else 1
    size = -(-queries // count)
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


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

        q, k = heads("q"), heads("k")
        if self.is_mutable_collection("attention") and not self.is_initializing():
            weights = attention_weights(q[:, :1], k, lengths, causal=False)
            self.sow("attention", "first", weights[:, :, 0])  # of the class token, [B, N, S]
        y = attend(q, k, heads("v"), lengths, causal=False, impl=self.impl)
        return Dense((width,), ("heads", "head_dim", "embed"), in_axes=2, dtype=self.dtype, name="o")(y)
