"""Llama decoder (Touvron et al. 2023): RMSNorm, rotary positions in Hugging Face's half-split layout, SwiGLU, grouped-query attention."""

import dataclasses
import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rad_jax.lora import LoraSpec
from rad_jax.models.attention import Impl, attend, attend_cached, attention_weights, whole_blocks
from rad_jax.models.layers import Dense, Embed, RMSNorm, dropout_key, scanned, together

Array = jax.Array
# Keys and values: of one layer [B, K, T, H] each, of all layers [L, B, K, T, H] each, or a pair per layer where they are not stacked.
Cache = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered for rows longer than those of pretraining, as transformers' `modeling_rope_utils.py` does it.

    "linear" divides every frequency by `factor` (Chen et al. 2023, position interpolation). "llama3" (Llama 3.1; Grattafiori et al. 2024)
    divides those that turn less than `low_freq_factor` times within `original_max_positions`, keeps those that turn more than
    `high_freq_factor` times, and blends between; its three numbers mean nothing to "linear" and default to Llama 3.1's.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling {self.kind!r} is not one of linear, llama3")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of the decoder, and how it is computed; `int8` is for training beside frozen layers (config.frozen_dtype).

    Layers are scanned over stacked variables `layers`; where they are not `stacked`, they are called `layers_0` and so on.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_dim: int
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 4096
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    stacked: bool = True
    attention: Impl = "xla"
    rope: Literal["halves", "matmul"] = "halves"
    flat_adapters: bool = True
    int8: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class Step:
    """Where the tokens of a call stand.

    Positions int32 [B, S]; without a cache lengths int32 [B] of keys that exist; with one `seen`, bool [B, T], which of its places hold
    tokens of the row, and `slot`, int32, the place that the new tokens of all rows take.

    Cosines and sines of the positions' angles, float32 [B, S, 1, H], are the same for all layers: `Llama.decode` fills them in.
    """

    positions: Array
    lengths: Array | None = None
    seen: Array | None = None
    slot: Array | None = None
    cos: Array | None = None
    sin: Array | None = None

    def padded(self, more: int) -> "Step":
        """With angles, of no matter what, for so many tokens more."""
        assert self.cos is not None and self.sin is not None
        cos, sin = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (self.cos, self.sin))
        return dataclasses.replace(self, cos=cos, sin=sin)


def angles(positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Array, Array]:
    """Cosines and sines of rotary positions int32 [B, S]: float32 [B, S, 1, H] each, H = `head_dim`, its second half like its first.

    Args:
        theta: base of the frequencies.
        scaling: of the frequencies, for long rows.
    """
    turns = positions[..., None, None].astype(jnp.float32) * jnp.tile(frequencies(head_dim, theta, scaling), 2)
    return jnp.cos(turns), jnp.sin(turns)


def rope(x: Array, cos: Array, sin: Array, by: Literal["halves", "matmul"] = "halves") -> Array:
    """Rotary position embedding (Su et al. 2021), first half of H paired with the second (Hugging Face's layout).

    Args:
        x: [B, S, N, H].
        cos, sin: float32 [B, S, 1, H], from `angles`.
        by: how pairs turn by a quarter, (a, b) -> (-b, a): by moving "halves", or by a "matmul" with a signed permutation, which is as
            exact, and faster where a vector register holds a whole head (TPU).

    Returns:
        [B, S, N, H] in x's dtype.
    """
    half = x.shape[-1] // 2
    if by == "matmul":
        turned = x @ jnp.roll(jnp.eye(2 * half), half, axis=1).at[half:].multiply(-1).astype(x.dtype)
    else:
        turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return (x.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Array:
    """Rotary frequencies float32 [H / 2] in radians per token. Arguments as of `angles`."""
    half = head_dim // 2
    plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return plain
    lowered = plain / scaling.factor
    if scaling.kind == "linear":
        return lowered
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * lowered + kept * plain


class SelfAttention(nn.Module):
    """Causal self-attention. Without a cache, over the tokens given; with one, of a single new token over all before it and itself.

    Gives keys and values [B, K, S, H] of the tokens given too; a layer that is not `stacked`, the cache with them. Of a stack the cache is only
    read: each of the L layers would copy its part of it in every step.
    """

    config: LlamaConfig
    lora: LoraSpec | None

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None, step: Step) -> tuple[Array, Cache]:
        c, length = self.config, x.shape[1]
        if cache is None:
            # Here, where the norm before it takes the padding in; queries, keys and values would each have to be copied to get it.
            padding = whole_blocks(length, c.attention) - length
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
            step = step.padded(padding)
        assert step.cos is not None and step.sin is not None
        projections = [
            _dense(c, self.lora, name, (count, c.head_dim), ("embed", axis, "head_dim"))
            for name, count, axis in (
                ("q", c.heads, "heads"),
                ("k", c.kv_heads, "kv_heads"),
                ("v", c.kv_heads, "kv_heads"),
            )
        ]
        q, k, v = (
            nn.with_logical_constraint(y, ("batch", "length", "act_heads", None))
            for y in together(projections, x, dropout_key(self))
        )
        q, k = rope(q, step.cos, step.sin, c.rope), rope(k, step.cos, step.sin, c.rope)
        if cache is None:
            y = attend(q, k, v, step.lengths, causal=True, impl=c.attention)
            if self.is_mutable_collection("attention") and not self.is_initializing():
                self.sow("attention", "weights", attention_weights(q, k, step.lengths, causal=True))
        else:
            assert step.seen is not None
            keys, values = cache
            if c.stacked:
                y = attend_cached(q, keys, values, step.seen, (k, v), impl=c.attention)
            else:
                # Read after it is written: the other way round XLA's CPU backend writes to a copy.
                keys, values = written((keys, values), (k.swapaxes(1, 2), v.swapaxes(1, 2)), step)
                y = attend_cached(q, keys, values, step.seen.at[:, step.slot].set(True), impl=c.attention)
        y = _dense(c, self.lora, "o", (c.width,), ("heads", "head_dim", "embed"), in_axes=2)(y)
        if cache is None or c.stacked:
            keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return y[:, :length], (keys, values)


class SwiGlu(nn.Module):
    """Gated feed-forward (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    lora: LoraSpec | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        projections = [_dense(c, self.lora, name, (c.mlp_dim,), ("embed", "mlp")) for name in ("gate", "up")]
        gate, up = together(projections, x, dropout_key(self))
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        y = nn.with_logical_constraint(jax.nn.silu(gate) * up, ("batch", "length", "act_mlp"))
        return _dense(c, self.lora, "down", (c.width,), ("mlp", "embed"))(y)


class Block(nn.Module):
    config: LlamaConfig
    lora: LoraSpec | None

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None, step: Step) -> tuple[Array, Cache]:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        y, cache = SelfAttention(c, self.lora, name="attn")(RMSNorm(c.eps, dtype, name="attn_norm")(x), cache, step)
        x = checkpoint_name(x + y, "middle")
        return x + SwiGlu(c, self.lora, name="mlp")(RMSNorm(c.eps, dtype, name="mlp_norm")(x)), cache


class Llama(nn.Module):
    """The decoder in three pieces, so that image features can stand among the words and logits be computed where they are needed."""

    config: LlamaConfig
    lora: LoraSpec | None = None

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.embed = Embed(c.vocab_size, c.width, dtype=dtype)
        if c.stacked:
            self.layers = scanned(Block, c.depth, c.remat, c.unroll)(c, self.lora)
        else:
            self.layers = [Block(c, self.lora) for _ in range(c.depth)]
        self.norm = RMSNorm(c.eps, dtype)
        self.head = Dense((c.vocab_size,), ("embed", "vocab"), use_bias=False, dtype=dtype)

    def embed_tokens(self, tokens: Array) -> Array:
        """int32[B, T] -> [B, T, D]."""
        return self.embed(tokens)

    def decode(self, x: Array, step: Step, cache: Cache | None = None) -> tuple[Array, Cache]:
        """Embeddings [B, S, D] through the layers and the final norm; with a cache S is 1.

        Returns:
            Hidden states [B, S, D], and keys and values of all layers: of these S tokens without a cache, the updated cache with one.
        """
        c = self.config
        cos, sin = angles(step.positions, c.head_dim, c.rope_theta, c.rope_scaling)
        step = dataclasses.replace(step, cos=cos, sin=sin)
        if c.stacked:
            x, new = self.layers(x, cache, step)
            return self.norm(x), new if cache is None else written(cache, new, step)
        caches: list[Cache] = []
        for layer, past in zip(self.layers, cache or (None,) * c.depth, strict=True):
            x, new = layer(x, past, step)
            caches.append(new)
        return self.norm(x), tuple(caches)

    def logits(self, x: Array) -> Array:
        """Hidden states [..., D] -> float32 [..., V]."""
        return self.head(x).astype(jnp.float32)

    def __call__(self, tokens: Array, lengths: Array | None = None) -> Array:
        """Plain language model: int32[B, S] -> float32 logits [B, S, V]."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, _ = self.decode(self.embed_tokens(tokens), Step(positions, lengths))
        return self.logits(x)


def written(cache: Cache, new: Cache, step: Step) -> Cache:
    """The cache with new keys and values [..., 1, H] at the step's slot."""
    assert step.slot is not None
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step.slot, axis=-2)
    return jax.tree.map(write, cache, new)


def _dense(
    config: LlamaConfig,
    lora: LoraSpec | None,
    name: str,
    features: tuple[int, ...],
    axes: tuple[str, ...],
    in_axes: int = 1,
) -> Dense:
    spec = lora if lora is not None and name in lora.targets else None
    how = {"dtype": jnp.dtype(config.dtype), "int8": config.int8, "flat_adapter": config.flat_adapters}
    return Dense(features, axes, in_axes, use_bias=False, lora=spec, name=name, **how)


jax.tree_util.register_dataclass(
    Step, data_fields=["positions", "lengths", "seen", "slot", "cos", "sin"], meta_fields=[]
)
