"""FLOPs by formula, 2 per multiply and add, matrix products only; what a step must compute, and what it does compute.

Four counts of one row (PaLM, appendix B of arXiv 2204.02311, carried over to frozen weights):

    forward   the forward pass: 2 N per token, and causal attention's half of the square
    needed    forward and backward, nothing twice: a weight costs 2 N more if a gradient passes through it, 2 N more if it learns. A frozen
              language model under adapters is 4 N, adapters are 6 N, the frozen image tower is 2 N
    trained   6 N throughout, as if every weight of the language model learned: what others print
    executed  what the program does: padding, attention's masked half where the implementation computes it, and what remat computes again

`forward`, `needed` and `trained` count real tokens; `executed` counts whole rows.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import ClipConfig
from rad_jax.models.llama import LlamaConfig
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import VitConfig


@dataclasses.dataclass(frozen=True)
class Count:
    """FLOPs of one part of the model for one row; see above."""

    forward: float = 0.0
    needed: float = 0.0
    trained: float = 0.0
    executed: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def total(parts: Mapping[str, Count]) -> Count:
    """The sum of all parts."""
    return sum(parts.values(), Count())


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Text tokens of a row and targets among them: real ones on average, and with padding (T, U)."""

    text: float
    targets: float
    padded_text: int
    padded_targets: int


def learns(patterns: Sequence[str], part: str) -> bool:
    """Whether any of a part's variables trains; `part` is the beginning of their paths, up to the layer: "params/llm/layers/"."""
    return any(re.fullmatch(pattern, part + "kernel") for pattern in patterns)


# ----------------------------------------------------------------------------------------------------------------------- products


def linear(
    weights: float, real: float, padded: float, *, passes: bool, learns: bool, again: float = 0.0
) -> Count:
    """A matrix of `weights` elements applied to so many tokens.

    Args:
        weights: elements; real, padded: tokens.
        passes: whether a gradient goes on through it. learns: whether it has one of its own.
        again: the share of the forward pass that the backward pass repeats.
    """
    factor = 1 + passes + learns
    forward = 2 * weights * real
    return Count(forward, factor * forward, 3 * forward, 2 * weights * padded * (factor + again))


def attention(
    width: int, real: float, padded: int, *, causal: bool, passes: bool, impl: str, again: float = 0.0
) -> Count:
    """Scores and weighted sums of `width` = N H channels; their backward pass is two products for each of the two.

    The kernel "splash" leaves out blocks above the diagonal and computes the scores again in each of its two backward kernels.
    """
    forward = 4 * width * real * real * (0.5 if causal else 1.0)
    pairs = float(padded * padded)
    backward = 2.0
    if impl.startswith("splash"):
        pairs, backward = splash_pairs(padded, causal), 3.5
    executed = 4 * width * pairs * (1 + (backward if passes else 0.0) + again)
    return Count(forward, forward * (3 if passes else 1), 3 * forward, executed)


def splash_pairs(length: int, causal: bool) -> float:
    """Pairs of a query and a key that splash attention's blocks cover."""
    from rad_jax.models.attention import _blocks

    padded, block = _blocks(length)
    count = padded // block
    return float(block * block * (count * (count + 1) // 2 if causal else count * count))


# ----------------------------------------------------------------------------------------------------------------------- towers and decoder

# Which products of a block the backward pass repeats under a remat policy; those of a decoder that are not named are kept.
_DECODER = ("q", "k", "v", "attention", "o", "gate", "up")  # the output of `down` is needed by nothing in its own block
_REPEATED: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": _DECODER,
    "dots": ("attention",),
}


def vision(config: VitConfig, *, passes: bool, learns: bool) -> dict[str, Count]:
    """The image tower up to the block whose features are used, for one image."""
    c, tokens = config, config.tokens
    again = float(config.remat == "full" and learns)
    per_block = 4 * c.width**2 + 2 * c.width * c.mlp_dim
    matrices = c.blocks_used * per_block
    patches = c.patch_size**2 * 3 * c.width
    return {
        "vision": linear(matrices, tokens, tokens, passes=learns, learns=learns, again=again)
        + linear(patches, c.patches, c.patches, passes=False, learns=learns),
        "vision attention": _repeat(
            attention(
                c.width,
                tokens,
                tokens,
                causal=False,
                passes=learns,
                impl=c.attention,
                again=float(c.remat in ("full", "dots") and learns),
            ),
            c.blocks_used,
        ),
    }


def text(config: BertConfig, lengths: Lengths, *, learns: bool) -> dict[str, Count]:
    """The text tower for one text."""
    c = config
    matrices = c.depth * (4 * c.width**2 + 2 * c.width * c.mlp_dim)
    again = float(c.remat == "full" and learns)
    return {
        "text": linear(matrices, lengths.text, lengths.padded_text, passes=learns, learns=learns, again=again),
        "text attention": _repeat(
            attention(
                c.width,
                lengths.text,
                lengths.padded_text,
                causal=False,
                passes=learns,
                impl=c.attention,
                again=float(c.remat in ("full", "dots") and learns),
            ),
            c.depth,
        ),
    }


def decoder_matrices(c: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Input and output width of each projection of a block."""
    heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {
        "q": (c.width, heads),
        "k": (c.width, kv),
        "v": (c.width, kv),
        "o": (heads, c.width),
        "gate": (c.width, c.mlp_dim),
        "up": (c.width, c.mlp_dim),
        "down": (c.mlp_dim, c.width),
    }


def _decoder(config: LlavaConfig, trainable: Sequence[str], lengths: Lengths, passes: bool) -> dict[str, Count]:
    c, extra = config.llm, config.image_tokens
    real, padded = lengths.text + extra, lengths.padded_text + extra
    repeated = _REPEATED[c.remat]
    own = learns(trainable, "params/llm/layers/")
    backward = passes or own or config.lora is not None
    base, adapters = Count(), Count()
    for name, (inputs, outputs) in decoder_matrices(c).items():
        again = float(name in repeated)
        base += linear(inputs * outputs, real, padded, passes=backward, learns=own, again=again)
        if config.lora is not None and name in config.lora.targets:
            rank, tuned = config.lora.rank, learns(trainable, "lora/llm/layers/")
            first = float(c.remat == "full")
            adapters += linear(inputs * rank, real, padded, passes=backward, learns=tuned, again=first)
            adapters += linear(rank * outputs, real, padded, passes=backward, learns=tuned, again=again * first)
    scores = attention(
        c.heads * c.head_dim,
        real,
        padded,
        causal=True,
        passes=backward,
        impl=c.attention,
        again=float("attention" in repeated),
    )
    parts = {"llm": _repeat(base, c.depth), "llm attention": _repeat(scores, c.depth)}
    if config.lora is not None:
        parts["lora"] = _repeat(adapters, c.depth)
    head = linear(
        c.width * c.vocab_size,
        lengths.targets,
        lengths.padded_targets,
        passes=backward,
        learns=learns(trainable, "params/llm/head/"),
    )
    return {**parts, "head": head}


def _repeat(count: Count, times: int) -> Count:
    return Count(*(times * value for value in dataclasses.astuple(count)))


# ----------------------------------------------------------------------------------------------------------------------- objectives


def training(model: LlavaConfig | ClipConfig, trainable: Sequence[str], lengths: Lengths, batch: int) -> dict[str, Count]:
    """FLOPs of one row of a train step, by part of the model.

    Args:
        model: the shapes, and what they say of remat and attention.
        trainable: patterns over variable paths, as in a config.
        lengths: of the row's text.
        batch: B, rows of the global batch; a pair is compared with every other one.
    """
    if isinstance(model, ClipConfig):
        return _contrastive(model, trainable, lengths, batch)
    parts: dict[str, Count] = {}
    upstream = False
    if model.vision is not None:
        seen, patches = learns(trainable, "params/vision/blocks/"), model.vision.patches
        parts |= vision(model.vision, passes=seen, learns=seen)
        tuned = learns(trainable, "params/projector/")
        width = model.llm.width
        parts["projector"] = linear(model.vision.width * width, patches, patches, passes=seen, learns=tuned) + linear(
            width * width, patches, patches, passes=seen or tuned, learns=tuned
        )
        upstream = seen or tuned
    return parts | _decoder(model, trainable, lengths, upstream)


def _contrastive(model: ClipConfig, trainable: Sequence[str], lengths: Lengths, batch: int) -> dict[str, Count]:
    seen, read = learns(trainable, "params/vision/blocks/"), learns(trainable, "params/text/layers/")
    parts = vision(model.vision, passes=seen, learns=seen) | text(model.text, lengths, learns=read)
    hidden = (model.text.width + model.embed_dim) // 2
    heads = linear(
        model.vision.width * model.embed_dim, 1, 1, passes=seen, learns=learns(trainable, "params/vision_head/")
    )
    heads += linear(
        hidden * (model.text.width + model.embed_dim), 1, 1, passes=read, learns=learns(trainable, "params/text_head/")
    )
    return {**parts, "heads": heads, "pairs": linear(batch * model.embed_dim, 1, 1, passes=True, learns=True)}


def writing(model: LlavaConfig, lengths: Lengths, new_tokens: int) -> dict[str, Count]:
    """FLOPs of one row of generation: "prefill" of the prompt and "decode" of `new_tokens` more; nothing is trained.

    A decoding step attends to the whole cache, which holds the padded prompt and all tokens that may come.
    """
    frozen = dataclasses.replace(lengths, targets=1, padded_targets=1)
    inference = dataclasses.replace(model, llm=dataclasses.replace(model.llm, remat="none"))
    first = {name: part for name, part in training(inference, (), frozen, 1).items()}
    c, extra = model.llm, model.image_tokens
    per_token = c.depth * sum(inputs * outputs for inputs, outputs in decoder_matrices(c).values())
    if model.lora is not None:
        widths = (sum(decoder_matrices(c)[name]) for name in model.lora.targets)
        per_token += c.depth * model.lora.rank * sum(widths)
    per_token += c.width * c.vocab_size
    channels, seen = c.heads * c.head_dim * c.depth, lengths.text + extra + new_tokens / 2
    cache = lengths.padded_text + extra + new_tokens
    decode = new_tokens * (2 * per_token + 4 * channels * seen)
    executed = new_tokens * (2 * per_token + 4 * channels * cache)
    prefill = _forward_only(first)
    return {"prefill": prefill, "decode": Count(decode, decode, decode, executed)}


def _forward_only(parts: Mapping[str, Count]) -> Count:
    found = total(parts)
    return Count(found.forward, found.forward, found.forward, found.executed)


def parameters(tree: Any) -> int:
    """Elements of all arrays in a tree."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree))
