"""LLaVA (Liu et al. 2023): image features stand in the place of one token among the words of a decoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rad_jax.lora import LoraSpec
from rad_jax.models.llama import Cache, Llama, LlamaConfig, Step
from rad_jax.models.projector import Projector
from rad_jax.models.vit import Vit, VitConfig
from rad_jax.prompts import IMAGE_ID

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """The parts; without `vision` it is a plain language model (text pretraining). `projector`: one of `projector.KINDS`."""

    llm: LlamaConfig
    vision: VitConfig | None = None
    lora: LoraSpec | None = None
    projector: str = "mlp2x_gelu"

    @property
    def image_tokens(self) -> int:
        """How many tokens a row grows by when its image takes the place of one: P - 1."""
        return self.vision.patches - 1 if self.vision else 0


class Llava(nn.Module):
    """Tokens with one placeholder, and an image, to logits."""

    config: LlavaConfig

    def setup(self) -> None:
        c = self.config
        self.llm = Llama(c.llm, c.lora)
        if c.vision is not None:
            self.vision = Vit(c.vision)
            self.projector = Projector(c.llm.width, jnp.dtype(c.llm.dtype), c.projector)

    def encode_image(self, images: Array) -> Array:
        """float[B, Y, X, C] -> [B, P, D]: patch features of the chosen block (a class token is dropped), projected."""
        return self.projector(self.vision(images)[:, -self.vision.config.patches :])

    def splice(self, tokens: Array, lengths: Array, image_features: Array | None) -> tuple[Array, Array, Array]:
        """Words and image in one row.

        Args:
            tokens: int32 [B, T] with one `IMAGE_ID` each, when there are images.
            lengths: int32 [B], real tokens of a row.
            image_features: [B, P, D], or None for text alone.

        Returns:
            Embeddings [B, S, D] with S = T - 1 + P, their lengths [B], and for each token its place in the row, int32 [B, T].
        """
        words = self.llm.embed_tokens(jnp.maximum(tokens, 0))
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if image_features is None:
            return words, lengths, places
        patches = image_features.shape[1]
        placeholder = jnp.argmax(tokens == IMAGE_ID, axis=1)[:, None]
        rows = jnp.arange(tokens.shape[1] - 1 + patches)[None, :]
        # A row's source among [words; patches]: words before the placeholder, the patches, then the words after it.
        from_image = (rows >= placeholder) & (rows < placeholder + patches)
        word = jnp.where(rows < placeholder, rows, rows - patches + 1)
        source = jnp.where(from_image, tokens.shape[1] + rows - placeholder, word)
        both = jnp.concatenate([words, image_features.astype(words.dtype)], axis=1)
        spliced = jnp.take_along_axis(both, source[:, :, None], axis=1)
        places = places + jnp.where(places > placeholder, patches - 1, 0)
        return nn.with_logical_constraint(spliced, ("batch", "length", "act_embed")), lengths + patches - 1, places

    def __call__(self, tokens: Array, lengths: Array, images: Array | None, target_positions: Array) -> Array:
        """Logits where there are labels, nowhere else.

        Args:
            tokens: int32 [B, T]; lengths: int32 [B]; images: float [B, Y, X, C] or None.
            target_positions: int32 [B, U], indices into `tokens` of the tokens that predict a label.

        Returns:
            float32 [B, U, V].
        """
        features = None if images is None else self.encode_image(images)
        x, lengths, places = self.splice(tokens, lengths, features)
        x, _ = self.llm.decode(x, Step(_positions(x), lengths))
        at = jnp.take_along_axis(places, target_positions, axis=1)
        return self.llm.logits(jnp.take_along_axis(x, at[:, :, None], axis=1))

    def prefill(self, tokens: Array, lengths: Array, images: Array | None) -> tuple[Array, Array, Cache]:
        """A prompt's next-token logits float32 [B, V], its length in the row [B], and its keys and values [L, B, K, S, H]."""
        features = None if images is None else self.encode_image(images)
        x, lengths, _ = self.splice(tokens, lengths, features)
        x, cache = self.llm.decode(x, Step(_positions(x), lengths))
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
        return self.llm.logits(last[:, 0]), lengths, cache

    def extend(self, tokens: Array, positions: Array, cache: Cache, seen: Array, slot: Array) -> tuple[Array, Cache]:
        """One more token per row.

        Args:
            tokens, positions: int32 [B], and where in its row each stands.
            cache: keys and values; seen: bool [B, T], which of its places are the row's; slot: int32, where the new ones go, in all rows.

        Returns:
            Logits float32 [B, V] and the updated cache.
        """
        step = Step(positions[:, None], seen=seen, slot=slot)
        x, cache = self.llm.decode(self.llm.embed_tokens(tokens[:, None]), step, cache)
        return self.llm.logits(x[:, 0]), cache


def _positions(x: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
