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
    """Whether a part's kernels train; `part` is the beginning of their paths: "params/llm/layers/"."""
    return any(re.fullmatch(pattern, part + "kernel") for pattern in patterns)


# ----------------------------------------------------------------------------------------------------------------------- products


def linear(weights: float, real: float, padded: float, *, passes: bool, learns: bool, again: float = 0.0) -> Count:
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

    "splash" and "xla" leave out blocks above the diagonal; the kernel "splash" computes the scores again in each of its two backward
    kernels.
    """
    forward = 4 * width * real * real * (0.5 if causal else 1.0)
    pairs = float(padded * padded)
    backward = 2.0
    if impl.startswith("splash"):
        pairs, backward = splash_pairs(padded, causal), 3.5
    elif impl == "xla" and causal:
        pairs = xla_pairs(padded)
    executed = 4 * width * pairs * (1 + (backward if passes else 0.0) + again)
    return Count(forward, forward * (3 if passes else 1), 3 * forward, executed)


def xla_pairs(length: int) -> float:
    """Pairs of a query and a key in the causal blocks of plain operations."""
    from rad_jax.models.attention import query_blocks

    return float(sum((end - start) * end for start, end in query_blocks(length, causal=True)))


def splash_pairs(length: int, causal: bool) -> float:
    """Pairs of a query and a key that splash attention's blocks cover."""
    from rad_jax.models.attention import _blocks

    padded, block = _blocks(length, causal)
    count = padded // block
    return float(block * block * (count * (count + 1) // 2 if causal else count * count))


# ----------------------------------------------------------------------------------------------------------------------- towers and decoder

# Of each product of a block, the share that the backward pass computes again under a remat policy (models.layers.REMAT_POLICIES).
# A block's own output, and so the base product of `down`, is needed by nothing in the block. XLA's attention keeps no scores: under a
# policy that keeps what attention gives, its first product alone is repeated. "a" and "b" are the adapters' two matrices.
_BLOCK = ("q", "k", "v", "o", "gate", "up")
_REPEATED: dict[str, tuple[str, ...]] = {
    "none": (),
    "dots": ("scores", "sums"),
    "minimal": ("scores",),
    "attention": ("scores", "o", "gate", "up", "b"),
    "full": ("scores", "sums", *_BLOCK, "a", "b"),
}


def _again(remat: str, impl: str) -> float:
    """The share of attention's forward pass that is repeated. Splash keeps its output with what its backward pass needs, or neither."""
    if impl.startswith("splash"):
        return float("sums" in _REPEATED[remat])
    return ("scores" in _REPEATED[remat]) / 2 + ("sums" in _REPEATED[remat]) / 2


def _encoder(
    c: VitConfig | BertConfig, blocks: int, real: float, padded: int, learns: bool, scaled: bool
) -> tuple[Count, Count]:
    """Matrices and attention of an encoder's blocks for one row; `scaled` where what a sub-layer gives is needed for a gradient."""
    square, wide = c.width**2, c.width * c.mlp_dim
    repeated = _REPEATED[c.remat] if learns else ()
    again = 3 * square * ("q" in repeated)
    if repeated and c.remat != "dots":
        kept = c.remat == "minimal"  # the sum after attention, and the hidden layer
        again += square * (scaled or not kept) + wide * (not kept) + wide * scaled
    matrices = 4 * square + 2 * wide
    products = linear(matrices, real, padded, passes=learns, learns=learns, again=again / matrices)
    share = _again(c.remat, c.attention) if learns else 0.0
    scores = attention(c.width, real, padded, causal=False, passes=learns, impl=c.attention, again=share)
    return _times(products, blocks), _times(scores, blocks)


def vision(config: VitConfig, learns: bool) -> dict[str, Count]:
    """The image tower up to the block whose features are used, for one image."""
    c = config
    blocks, scores = _encoder(c, c.blocks_used, c.tokens, c.tokens, learns, c.layer_scale)
    embedding = linear(c.patch_size**2 * 3 * c.width, c.patches, c.patches, passes=False, learns=learns)
    return {"vision": blocks + embedding, "vision attention": scores}


def text(config: BertConfig, lengths: Lengths, learns: bool) -> dict[str, Count]:
    """The text tower for one text. Its norms stand after the sums, which their gradients need."""
    blocks, scores = _encoder(config, config.depth, lengths.text, lengths.padded_text, learns, scaled=True)
    return {"text": blocks, "text attention": scores}


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


def decoder(config: LlavaConfig, trainable: Sequence[str], lengths: Lengths, backward: bool) -> dict[str, Count]:
    """The language model with its adapters and its head, for one row; `backward` is whether a gradient goes through it."""
    from rad_jax.models.attention import whole_blocks

    c, rank = config.llm, config.lora.rank if config.lora else 0
    real, padded = lengths.text + config.image_tokens, lengths.padded_text + config.image_tokens
    own, tuned = (learns(trainable, f"{name}/llm/layers/") for name in ("params", "lora"))
    repeated = _REPEATED[c.remat] if backward else ()
    base = adapters = Count()
    for name, (inputs, outputs) in decoder_matrices(c).items():
        again = float(name in repeated)
        rows = whole_blocks(padded, c.attention) if name in ("q", "k", "v", "o") else padded
        base += linear(inputs * outputs, real, rows, passes=backward, learns=own, again=again)
        if config.lora is not None and name in config.lora.targets:
            shares = float("a" in repeated), again * ("b" in repeated)
            for weights, share in zip((inputs * rank, rank * outputs), shares, strict=True):
                adapters += linear(weights, real, rows, passes=backward, learns=tuned, again=share)
    share = _again(c.remat, c.attention) if backward else 0.0
    channels = c.heads * c.head_dim
    scores = attention(channels, real, padded, causal=True, passes=backward, impl=c.attention, again=share)
    head = linear(
        c.width * c.vocab_size,
        lengths.targets,
        lengths.padded_targets,
        passes=backward,
        learns=learns(trainable, "params/llm/head/"),
    )
    parts = {"llm": _times(base, c.depth), "llm attention": _times(scores, c.depth), "head": head}
    return parts | ({"lora": _times(adapters, c.depth)} if config.lora else {})


def _times(count: Count, times: int) -> Count:
    return Count(*(times * value for value in dataclasses.astuple(count)))


# ----------------------------------------------------------------------------------------------------------------------- objectives


def training(
    model: LlavaConfig | ClipConfig, trainable: Sequence[str], lengths: Lengths, batch: int, num_micro: int = 1
) -> dict[str, Count]:
    """FLOPs of one row of a train step, by part of the model.

    Args:
        model: the shapes, and what they say of remat and attention.
        trainable: patterns over variable paths, as in a config.
        lengths: of the row's text.
        batch: B, rows of the global batch; a pair is compared with every other one.
        num_micro: turns that a batch goes through in. The towers of pairs run once more then, for features without a gradient.
    """
    if isinstance(model, ClipConfig):
        return _contrastive(model, trainable, lengths, batch, num_micro > 1)
    seen, tuned = learns(trainable, "params/vision/blocks/"), learns(trainable, "params/projector/")
    learned = any(learns(trainable, f"{name}/llm/layers/") for name in ("params", "lora"))
    images = _images(model, seen, tuned) if model.vision else {}
    return images | decoder(model, trainable, lengths, backward=seen or tuned or learned)


def _images(model: LlavaConfig, seen: bool, tuned: bool) -> dict[str, Count]:
    """Tower and projector; whether each learns."""
    assert model.vision is not None
    patches, width = model.vision.patches, model.llm.width
    first = linear(model.vision.width * width, patches, patches, passes=seen, learns=tuned)
    if model.projector == "linear":
        return {**vision(model.vision, seen), "projector": first}
    second = linear(width * width, patches, patches, passes=seen or tuned, learns=tuned)
    return {**vision(model.vision, seen), "projector": first + second}


def _contrastive(
    model: ClipConfig, trainable: Sequence[str], lengths: Lengths, batch: int, twice: bool
) -> dict[str, Count]:
    seen, read = learns(trainable, "params/vision/blocks/"), learns(trainable, "params/text/layers/")
    width, narrow = model.embed_dim, (model.text.width + model.embed_dim) // 2
    heads = linear(model.vision.width * width, 1, 1, passes=seen, learns=learns(trainable, "params/vision_head/"))
    heads += linear(
        narrow * (model.text.width + width), 1, 1, passes=read, learns=learns(trainable, "params/text_head/fc1/")
    )
    towers = {**vision(model.vision, seen), **text(model.text, lengths, read), "heads": heads}
    if twice:
        # Without a gradient, and so without its repetitions: what padding makes of the forward pass.
        forward = {**vision(model.vision, False), **text(model.text, lengths, False)}
        again = {name: Count(executed=part.executed) for name, part in forward.items()}
        towers |= {name: towers[name] + part for name, part in again.items()}
    # An image is compared with all texts; softmax compares the text with all images too. Logits are not kept but computed again.
    compared = linear(batch * width, 1, 1, passes=True, learns=True, again=1.0)
    directions = 2 if model.loss == "softmax" else 1
    return {**towers, "pairs": dataclasses.replace(compared, executed=directions * compared.executed)}


def writing(model: LlavaConfig, lengths: Lengths, new_tokens: int) -> dict[str, Count]:
    """FLOPs of one row of generation: "prefill" of the prompt, and "decode" of `new_tokens` more one by one; nothing is trained.

    A decoding step attends to the whole cache, which holds the padded prompt and all tokens that may come.
    """
    prompt = dataclasses.replace(lengths, targets=1, padded_targets=1)
    first = total((_images(model, False, False) if model.vision else {}) | decoder(model, (), prompt, backward=False))
    c, extra = model.llm, model.image_tokens
    matrices = decoder_matrices(c)
    weights = sum(inputs * outputs for inputs, outputs in matrices.values())
    if model.lora is not None:
        weights += model.lora.rank * sum(sum(matrices[name]) for name in model.lora.targets)
    products = 2 * (c.depth * weights + c.width * c.vocab_size)
    channels = 4 * c.depth * c.heads * c.head_dim
    decode = new_tokens * (products + channels * (lengths.text + extra + new_tokens / 2))
    executed = new_tokens * (products + channels * (lengths.padded_text + extra + new_tokens))
    return {
        "prefill": Count(first.forward, first.forward, first.forward, first.executed),
        "decode": Count(decode, decode, decode, executed),
    }
