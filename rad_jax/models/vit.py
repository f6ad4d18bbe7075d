"""Vision transformer (Dosovitskiy et al. 2021) in timm's pre-norm form: the image tower of BiomedCLIP-CXR, OpenAI CLIP, DINOv2 and SigLIP."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rad_jax import images as pixels
from rad_jax.models.attention import EncoderAttention, Impl
from rad_jax.models.layers import Dense, LayerNorm, Mlp, scanned

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Shape of the tower. `feature_layer` picks a hidden state, counted as in LLaVA: 0 is the embedding, -1 the last block's output;
    None is the whole tower with its final norm. `pixel_mean` and `pixel_std` are the channel statistics its images are normalised with."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    eps: float = 1e-6
    activation: str = "gelu"
    patch_bias: bool = True
    layer_scale: bool = False
    pre_norm: bool = False
    class_token: bool = True
    pixel_mean: tuple[float, float, float] = pixels.MEAN
    pixel_std: tuple[float, float, float] = pixels.STD
    feature_layer: int | None = None
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: Impl = "xla"

    def __post_init__(self) -> None:
        # From JSON they are lists, and a config must be hashable.
        for name in ("pixel_mean", "pixel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def patches(self) -> int:
        """P, the number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """The patches, and the class token where there is one."""
        return self.patches + self.class_token

    @property
    def blocks_used(self) -> int:
        """How many blocks the chosen features need; later blocks have no parameters here and are not computed."""
        if self.feature_layer is None:
            return self.depth
        return self.feature_layer if self.feature_layer >= 0 else self.depth + 1 + self.feature_layer


class Block(nn.Module):
    config: VitConfig

    @nn.compact
    def __call__(self, x: Array, _: None, __: None) -> tuple[Array, None]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        y = LayerNorm(c.eps, dtype, name="norm1")(x)
        y = EncoderAttention(c.heads, dtype, c.attention, name="attn")(y, None)
        x = checkpoint_name(x + self._scaled("ls1", y), "middle")
        y = LayerNorm(c.eps, dtype, name="norm2")(x)
        y = Mlp(c.mlp_dim, c.activation, dtype, name="mlp")(y)
        return x + self._scaled("ls2", y), None

    def _scaled(self, name: str, y: Array) -> Array:
        """LayerScale (Touvron et al. 2021): a learned gain per channel."""
        if not self.config.layer_scale:
            return y
        init = nn.with_logical_partitioning(nn.initializers.constant(1e-5), ("norm",))
        return y * self.param(name, init, y.shape[-1:], jnp.float32).astype(y.dtype)


class Vit(nn.Module):
    """Images float[B, Y, X, C], normalised, to tokens [B, 1 + P, D]: class token first, then patches row by row.

    Without a class token (SigLIP) the patches alone, [B, P, D].
    """

    config: VitConfig

    @nn.compact
    def __call__(self, images: Array) -> Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = self._patches(images, dtype)
        axes, shape = (None, None, "norm"), (1, c.tokens, c.width)
        if c.class_token:
            token = self.param("cls_token", _named(nn.initializers.normal(0.02), axes), (1, 1, c.width), jnp.float32)
            x = jnp.concatenate([jnp.broadcast_to(token.astype(dtype), (x.shape[0], 1, c.width)), x], axis=1)
        # Embedded patches of a film have size 1: places at timm's 0.02 would be drowned, and left and right take long to tell apart.
        positions = self.param("pos_embed", _named(nn.initializers.normal(0.5), axes), shape, jnp.float32)
        x = x + positions.astype(dtype)
        if c.pre_norm:
            x = LayerNorm(c.eps, dtype, name="pre_norm")(x)
        x, _ = scanned(Block, c.blocks_used, c.remat, c.unroll)(c, name="blocks")(x, None, None)
        return LayerNorm(c.eps, dtype, name="norm")(x) if c.feature_layer is None else x

    def _patches(self, images: Array, dtype: Any) -> Array:
        """Non-overlapping convolution written as one matrix product: [B, Y, X, C] -> [B, P, D]."""
        c = self.config
        batch, height, width, channels = images.shape
        p, rows, columns = c.patch_size, height // c.patch_size, width // c.patch_size
        images = images[
            :, : rows * p, : columns * p
        ]  # as a convolution leaves what fills no patch (384 pixels in patches of 14)
        x = images.reshape(batch, rows, p, columns, p, channels).transpose(0, 1, 3, 2, 4, 5)
        axes = ("patch_y", "patch_x", "channels", "embed")
        embed = Dense((c.width,), axes, in_axes=3, use_bias=c.patch_bias, dtype=dtype, name="patch_embed")
        return embed(x.reshape(batch, rows * columns, p, p, channels))


def _named(init: Any, axes: tuple[str | None, ...]) -> Any:
    return nn.with_logical_partitioning(init, axes)
