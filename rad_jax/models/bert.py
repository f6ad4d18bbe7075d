"""BERT encoder (Devlin et al. 2019): the text tower of BiomedCLIP-CXR."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rad_jax.models.attention import EncoderAttention, Impl
from rad_jax.models.layers import Embed, LayerNorm, Mlp, scanned

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape of the encoder; the defaults are BERT's."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    max_positions: int = 512
    token_types: int = 2
    eps: float = 1e-12
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: Impl = "xla"


class Block(nn.Module):
    """Post-norm: the norm comes after the residual sum."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, _: None, lengths: Array) -> tuple[Array, None]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        y = EncoderAttention(c.heads, dtype, c.attention, name="attn")(x, lengths)
        x = LayerNorm(c.eps, dtype, name="attn_norm")(x + y)
        y = Mlp(c.mlp_dim, "gelu", dtype, name="mlp")(x)
        return LayerNorm(c.eps, dtype, name="mlp_norm")(x + y), None


class Embeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised; every token is of segment 0."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = Embed(c.vocab_size, c.width, dtype=dtype, name="word")(tokens)
        x = x + Embed(c.max_positions, c.width, ("positions", "embed"), dtype, name="position")(
            jnp.arange(tokens.shape[1])
        )
        x = x + Embed(c.token_types, c.width, ("positions", "embed"), dtype, name="token_type")(
            jnp.zeros((), jnp.int32)
        )
        return LayerNorm(c.eps, dtype, name="norm")(x)


class Bert(nn.Module):
    """Tokens int32[B, T] and their number [B] to the last hidden states [B, T, D]."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: Array, lengths: Array) -> Array:
        c = self.config
        x = Embeddings(c, name="embeddings")(tokens)
        x, _ = scanned(Block, c.depth, c.remat, c.unroll)(c, name="layers")(x, None, lengths)
        return x
