"""Writing findings: one prefill of the prompt and its image, then one token at a time over a key-value cache, a batch at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rad_jax.images import normalise
from rad_jax.models.llava import Llava
from rad_jax.state import Tree

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "eos_id", "temperature", "top_p"))
def generate(
    model: Llava,
    variables: Tree,
    batch: dict[str, Any],
    rng: Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Array:
    """Continues each prompt until its end-of-sequence token, or for `max_new_tokens`.

    Args:
        model: the model; variables: its weights and adapters.
        batch: tokens int32 [B, T], length int32 [B], and image uint8 [B, Y, X] unless the model is text only.
        rng: key for sampling; not used when greedy.
        max_new_tokens: U, at most this many.
        eos_id: ends a text.
        temperature: 0 is greedy; else logits are divided by it.
        top_p: sample among the most probable tokens that together have this share (Holtzman et al. 2020).

    Returns:
        int32 [B, U]; positions after a row's end hold `eos_id`.
    """
    images, vision = None, model.config.vision
    if vision is not None and "image" in batch:
        images = normalise(batch["image"], jnp, vision.pixel_mean, vision.pixel_std)
    logits, lengths, cache = model.apply(variables, batch["tokens"], batch["length"], images, method="prefill")
    room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, room), cache)
    rows = lengths.shape[0]

    def choose(logits: Array, step: Array) -> Array:
        if temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        return sample(logits / temperature, jax.random.fold_in(rng, step), top_p)

    def more(carry: Any) -> Array:
        step, _, _, done, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def one(carry: Any) -> Any:
        step, logits, cache, done, out = carry
        token = jnp.where(done, eos_id, choose(logits, step))
        out = out.at[:, step].set(token)
        done = done | (token == eos_id)
        logits, cache = model.apply(variables, token, lengths + step, cache, method="extend")
        return step + 1, logits, cache, done, out

    start = (jnp.zeros((), jnp.int32), logits, cache, jnp.zeros(rows, bool))
    out = jnp.full((rows, max_new_tokens), eos_id, jnp.int32)
    return jax.lax.while_loop(more, one, (*start, out))[-1]


def sample(logits: Array, key: Array, top_p: float) -> Array:
    """One token per row [B] of logits [B, V] from the smallest set of tokens whose probabilities reach `top_p`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    kept = (before < top_p) | (ordered == ordered[..., :1])  # the most probable token always
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf)).astype(jnp.int32)
