"""Writing findings: one prefill of the prompt and its image, then one token at a time over a key-value cache, a batch at once.

Under `jax.set_mesh` and linen's logical rules the rows of the batch lie over the data and fsdp axes, the heads of the cache over tensor.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rad_jax.images import normalise
from rad_jax.models.llama import Cache
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
    """Continues each prompt until its end-of-sequence token, or for `max_new_tokens`; ends when all rows have ended.

    Args:
        model: the model; variables: its weights and adapters.
        batch: tokens int32 [B, T], length int32 [B], image uint8 [B, Y, X] unless the model is text only, and index int32 [B], a
            number per row that its samples depend on, wherever in a batch it stands; nothing is written for rows below zero. Without
            it rows are counted.
        rng: key for sampling; not used when greedy.
        max_new_tokens: U, at most this many.
        eos_id: ends a text.
        temperature: 0 is greedy; else logits are divided by it.
        top_p: sample among the most probable tokens that together have this share (Holtzman et al. 2020).

    Returns:
        int32 [B, U]; positions after a row's end hold `eos_id`.
    """
    index = batch.get("index", jnp.arange(len(batch["length"])))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, index)
    logits, lengths, cache = prefill(model, variables, batch, max_new_tokens)
    loop = functools.partial(decode, max_new_tokens=max_new_tokens, eos_id=eos_id, temperature=temperature, top_p=top_p)
    return loop(model, variables, logits, lengths, cache, index < 0, keys)


def prefill(model: Llava, variables: Tree, batch: dict[str, Any], room: int) -> tuple[Array, Array, Cache]:
    """The prompts' next-token logits float32 [B, V], their lengths with the image int32 [B], and a cache with `room` for more tokens.

    Args: as in `generate`.

    Returns:
        Keys and values are [L, B, K, S + room, H] each, with S = T - 1 + P, or T without images.
    """
    images, vision = None, model.config.vision
    if vision is not None and "image" in batch:
        images = normalise(batch["image"], jnp, vision.pixel_mean, vision.pixel_std)
    logits, lengths, cache = model.apply(variables, batch["tokens"], batch["length"], images, method="prefill")

    def widened(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))
        return nn.with_logical_constraint(x, (None, "batch", "act_heads", "length", None))

    return logits, lengths, jax.tree.map(widened, cache)


def decode(
    model: Llava,
    variables: Tree,
    logits: Array,
    lengths: Array,
    cache: Cache,
    done: Array,
    keys: Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Array:
    """The loop over tokens: int32 [B, U].

    Args:
        model, variables, max_new_tokens, eos_id, temperature, top_p: as in `generate`.
        logits, lengths, cache: as `prefill` gives them, with room for `max_new_tokens`.
        done: bool [B], rows for which nothing is written.
        keys: [B], for sampling.
    """

    def choose(logits: Array, step: Array) -> Array:
        if temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        return sample(logits / temperature, jax.vmap(jax.random.fold_in, (0, None))(keys, step), top_p)

    def more(carry: Any) -> Array:
        step, _, _, done, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def one(carry: Any) -> Any:
        step, logits, cache, done, out = carry
        token = jnp.where(done, eos_id, choose(logits, step))
        out = out.at[:, step].set(token)
        logits, cache = decode_step(model, variables, token, step, lengths, cache, max_new_tokens)
        return step + 1, logits, cache, done | (token == eos_id), out

    if model.config.llm.unroll >= model.config.llm.depth:
        model, variables, cache = apart(model, variables, cache)
    out = jnp.full((len(lengths), max_new_tokens), eos_id, jnp.int32)
    return jax.lax.while_loop(more, one, (jnp.zeros((), jnp.int32), logits, cache, done, out))[-1]


def apart(model: Llava, variables: Tree, cache: Cache) -> tuple[Llava, Tree, Cache]:
    """The same model with layers, their variables and their caches apart: from a stack, XLA's CPU backend copies each of them in every step."""
    depth = range(model.config.llm.depth)

    def split(collection: Tree) -> Tree:
        llm = dict(collection.get("llm", {}))
        stacked = llm.pop("layers", {})
        layers = {f"layers_{layer}": jax.tree.map(lambda x, layer=layer: x[layer], stacked) for layer in depth}
        return {**collection, "llm": {**llm, **layers}}

    config = dataclasses.replace(model.config, llm=dataclasses.replace(model.config.llm, stacked=False))
    caches = tuple((cache[0][layer], cache[1][layer]) for layer in depth)
    return Llava(config), {name: split(collection) for name, collection in variables.items()}, caches


def decode_step(
    model: Llava, variables: Tree, tokens: Array, step: Array, lengths: Array, cache: Cache, room: int
) -> tuple[Array, Cache]:
    """One more token per row.

    However long their prompts, the rows' new tokens stand at one place of the cache, after the longest prompt: writing to a place of each
    row's own is slow on a TPU.

    Args:
        tokens: int32 [B]; step: how many were written before them.
        lengths: int32 [B], of the prompts with the image.
        cache: as `prefill` gives it, with `room` places for new tokens.

    Returns:
        The next logits float32 [B, V] and the updated cache.
    """
    length = jax.tree.leaves(cache)[0].shape[-2]
    first, places = length - room, jnp.arange(length)
    seen = (places < lengths[:, None]) | ((places >= first) & (places < first + step))
    return model.apply(variables, tokens, lengths + step, cache, seen, first + step, method="extend")


def sample(logits: Array, keys: Array, top_p: float) -> Array:
    """One token per row [B] of logits [B, V], with its key of [B], from the smallest set of tokens whose probabilities reach `top_p`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    kept = (before < top_p) | (ordered == ordered[..., :1])  # the most probable token always
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.vmap(jax.random.categorical)(keys, jnp.where(logits >= least, logits, -jnp.inf)).astype(jnp.int32)
