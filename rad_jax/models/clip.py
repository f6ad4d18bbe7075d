"""Two-tower contrastive model (Radford et al. 2021) in open_clip's `CustomTextCLIP` form: ViT, BERT, two heads, a temperature, a bias."""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rad_jax.models.bert import Bert, BertConfig
from rad_jax.models.layers import ACTIVATIONS, Dense
from rad_jax.models.vit import Vit, VitConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The towers, E, the width of the shared embedding, and the loss it is trained with: "sigmoid" (SigLIP) has a bias, and starts elsewhere."""

    vision: VitConfig
    text: BertConfig
    embed_dim: int
    loss: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"contrastive loss {self.loss!r} is not one of softmax, sigmoid")
        if not self.vision.class_token:
            raise ValueError("the contrastive model embeds an image by its class token, but this tower has none")

    @property
    def image_tokens(self) -> int:
        """Tokens an image gives: its patches and the class token."""
        return self.vision.tokens


class TextHead(nn.Module):
    """open_clip's `mlp` text projection: bias-free Linear, GELU, Linear; the hidden width is half-way between in and out."""

    embed_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.dtype)
        hidden = (x.shape[-1] + self.embed_dim) // 2
        x = Dense((hidden,), ("embed", "mlp"), use_bias=False, dtype=dtype, name="fc1")(x)
        x = ACTIVATIONS["gelu"](x)
        return Dense((self.embed_dim,), ("mlp", "embed"), use_bias=False, dtype=dtype, name="fc2")(x)


class Clip(nn.Module):
    """Images and texts to unit vectors [B, E] in one space, and the learned temperature and bias of their products."""

    config: ClipConfig

    def setup(self) -> None:
        c = self.config
        self.vision = Vit(c.vision)
        self.vision_head = Dense((c.embed_dim,), ("embed", "mlp"), use_bias=False, dtype=jnp.dtype(c.vision.dtype))
        self.text = Bert(c.text)
        self.text_head = TextHead(c.embed_dim, c.text.dtype)
        # Starts of Radford et al. 2021, and of Zhai et al. 2023 (SigLIP).
        self.logit_scale = self._number("logit_scale", math.log(1 / 0.07) if c.loss == "softmax" else math.log(10))
        if c.loss == "sigmoid":
            self.logit_bias = self._number("logit_bias", -10.0)

    def encode_image(self, images: Array) -> Array:
        """float[B, Y, X, C] -> float32[B, E], unit length, from the class token after the final norm."""
        return _unit(self.vision_head(self.vision(images)[:, 0]))

    def encode_text(self, tokens: Array, lengths: Array) -> Array:
        """int32[B, T], int32[B] -> float32[B, E], unit length, from the first token's last hidden state."""
        return _unit(self.text_head(self.text(tokens, lengths)[:, 0]))

    def scale(self) -> Array:
        """Inverse temperature, at most 100 as in the paper."""
        return jnp.exp(jnp.minimum(self.logit_scale, math.log(100.0)))

    def bias(self) -> Array:
        """What is added to scaled products; a softmax does not see it."""
        return self.logit_bias if self.config.loss == "sigmoid" else jnp.zeros((), jnp.float32)

    def __call__(self, images: Array, tokens: Array, lengths: Array) -> tuple[Array, Array, Array, Array]:
        return self.encode_image(images), self.encode_text(tokens, lengths), self.scale(), self.bias()

    def _number(self, name: str, start: float) -> Array:
        return self.param(name, nn.with_logical_partitioning(nn.initializers.constant(start), ()), (), jnp.float32)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    # torch.nn.functional.normalize's guard, so that an all-zero vector stays zero.
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)), 1e-12)
