"""The language model as one GGUF file, for llama.cpp and what is built on it: adapters merged, written tensor by tensor.

GGUF holds Meta's rotary layout, so the table is `llama2c`'s under other names. Norms are float32, as llama.cpp computes with them; in a
float16 file they are rounded to float16 first, so that the file and the exported bundle are the same model.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop import hf_llama, llama2c, shards, sources, tables
from rad_jax.interop.bundle import CHAT_TEMPLATE
from rad_jax.interop.exported import Exported
from rad_jax.lazy import contiguous
from rad_jax.models.llama import LlamaConfig, frequencies
from rad_jax.prompts import load_tokenizer

TYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}  # ggml's names of what an export may ask for
BLOCK = 32  # weights of a row that share a scale in Q8_0
LARGEST_Q8_0 = 127 * 65504.0  # the scale, a 127th of a block's greatest weight, is a float16

VISION = (
    "llama.cpp computes the image towers of this model family wrongly (as of October 2026: it puts the class token last, so that every "
    "patch gets its neighbour's position), so no mmproj is written and this file alone cannot see films"
)
CARD = """---
license: other
pipeline_tag: text-generation
---
The language model of a findings generator, exported by rad_jax as GGUF. For research; not a medical device, not for diagnosis.

**No images.** {vision}. To write findings of films export with `--format=hf` and serve that with `python -m rad_jax.serving`.

    llama-server -m {file}

Licence: that of the weights and data it was made from. Vicuna: Llama 2 Community License. What the weights came from is in `receipt.json`.
"""

# Meta's names of a checkpoint, and GGUF's.
_NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "layers.{}.attention_norm": "blk.{}.attn_norm", "layers.{}.attention.wq": "blk.{}.attn_q",
    "layers.{}.attention.wk": "blk.{}.attn_k", "layers.{}.attention.wv": "blk.{}.attn_v",
    "layers.{}.attention.wo": "blk.{}.attn_output", "layers.{}.ffn_norm": "blk.{}.ffn_norm",
    "layers.{}.feed_forward.w1": "blk.{}.ffn_gate", "layers.{}.feed_forward.w2": "blk.{}.ffn_down",
    "layers.{}.feed_forward.w3": "blk.{}.ffn_up",
}  # fmt: skip


def table(config: LlamaConfig, tied: bool = False) -> tables.Table:
    """The decoder; a tied head is not in the file, as in `hf_llama.table`."""
    entries = [
        dataclasses.replace(entry, name=_NAMES[entry.name.removesuffix(".weight")] + ".weight")
        for entry in llama2c.table(config).entries
    ]
    if tied:
        shared = hf_llama.shared("token_embd.weight", (config.vocab_size, config.width))
        entries = [shared, *(entry for entry in entries if entry.name not in ("token_embd.weight", "output.weight"))]
    return tables.Table("GGUF", tuple(entries))


def write(folder: Path, model: Exported, dtype: str, progress: Callable[[int], object]) -> dict[str, str]:
    """`model-DTYPE.gguf` and a model card.

    Args:
        folder: empty, exists.
        model: what is exported; of an image-to-text model the language model goes out.
        dtype: a key of `TYPES`. Rows of a Q8_0 file that blocks of 32 do not fill stay in float16.
        progress: called with the bytes of each tensor once it is written.

    Returns:
        sha256 of each file, by its name.

    Raises:
        UserError: gguf is not installed, no language model or no tokenizer that GGUF can hold, or values that the dtype cannot hold.
    """
    gguf = library()
    if model.config is None:
        raise UserError("towers alone are no language model: export a run of stage 2 or 3, or --format=open_clip.")
    if model.tokenizer is None:
        raise UserError("a GGUF file holds the tokenizer, and the checkpoint has none: convert it with --tokenizer.")
    if dtype not in TYPES:
        raise UserError(f"--format=gguf is written in {', '.join(TYPES)}: give one of these as --dtype.")
    llm, tree = model.config.llm, model.merged()["llm"]
    layout = table(llm, model.tied)
    path = folder / f"model-{TYPES[dtype].lower()}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, model, dtype)
    _add_vocabulary(writer, vocabulary(model.tokenizer, llm.vocab_size))
    factors = rope_factors(llm)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, shape in layout.shapes().items():
        kind = gguf.GGMLQuantizationType[stored_type(shape, dtype)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
        progress(factors.nbytes)
    for name, tensor in tables.store(layout, tree):
        data = _stored(name, tensor, dtype)
        writer.write_tensor_data(data)
        progress(data.nbytes)
        del tensor, data  # before the next one is made
    writer.close()
    (folder / "README.md").write_text(CARD.format(vision=VISION, file=path.name), encoding="utf-8")
    return {name: sources.sha256(folder / name) for name in (path.name, "README.md")}


def tensor_count(path: Path) -> int:
    """How many tensors a file holds.

    Raises:
        UserError: it is cut short, or no GGUF file.
    """
    try:
        return len(library().GGUFReader(path).tensors)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not on the disk as it was written: export it again.") from error


def held(model: Exported, dtype: str) -> dict[str, Any]:
    """The decoder as the file holds it, in float32: `model`'s, rounded or quantised. It takes memory for the whole decoder."""
    assert model.config is not None
    gguf, layout = library(), table(model.config.llm, model.tied)

    def again(name: str, tensor: np.ndarray) -> np.ndarray:
        kind = gguf.GGMLQuantizationType[stored_type(tensor.shape, dtype)]
        return np.asarray(gguf.dequantize(_stored(name, tensor, dtype), kind), np.float32)

    tree = model.merged()["llm"]
    return tables.load(layout, {name: again(name, tensor) for name, tensor in tables.store(layout, tree)})


def stored_type(shape: tables.Shape, dtype: str) -> str:
    """ggml's name of the type in which a file of this dtype holds a tensor."""
    if len(shape) == 1:
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % BLOCK else TYPES[dtype]


def _stored(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor as it stands in the file.

    Raises:
        UserError: values that the dtype cannot hold.
    """
    if stored_type(tensor.shape, dtype) == "Q8_0":
        tensor = np.asarray(contiguous(tensor), np.float32)
        if not max(tensor.max(), -tensor.min()) <= LARGEST_Q8_0:  # so written that a NaN is refused
            raise UserError(f"the tensor {name} has values that q8_0 cannot hold: export with --dtype=float32.")
        return np.asarray(library().quantize(tensor, library().GGMLQuantizationType.Q8_0))
    rounded = shards.cast(name, tensor, np.dtype(np.float32 if dtype == "float32" else np.float16))
    return contiguous(rounded.astype(np.float32) if tensor.ndim == 1 else rounded)


def _describe(writer: Any, model: Exported, dtype: str) -> None:
    """Everything a reader of the file must know of the model but its vocabulary."""
    gguf = library()
    assert model.config is not None
    llm = model.config.llm
    writer.add_name("rad_jax language model")
    writer.add_license("other")
    writer.add_file_type({"float32": 0, "float16": 1, "q8_0": 7}[dtype])  # llama.h's llama_ftype
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(llm.max_positions)
    writer.add_embedding_length(llm.width)
    writer.add_block_count(llm.depth)
    writer.add_feed_forward_length(llm.mlp_dim)
    writer.add_head_count(llm.heads)
    writer.add_head_count_kv(llm.kv_heads)
    writer.add_layer_norm_rms_eps(llm.eps)
    writer.add_rope_dimension_count(llm.head_dim)
    writer.add_rope_freq_base(llm.rope_theta)
    writer.add_vocab_size(llm.vocab_size)
    if llm.rope_scaling is not None and llm.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(llm.rope_scaling.factor)
    if model.config.vision is not None:
        writer.add_description(VISION)
        writer.add_chat_template(CHAT_TEMPLATE)


def rope_factors(config: LlamaConfig) -> np.ndarray | None:
    """By what llama.cpp divides the rotary frequencies, float32 [H / 2]; None where a number or nothing says it."""
    if config.rope_scaling is None or config.rope_scaling.kind == "linear":
        return None
    plain = frequencies(config.head_dim, config.rope_theta, None)
    return np.asarray(plain / frequencies(config.head_dim, config.rope_theta, config.rope_scaling), np.float32)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Pieces in the order of their ids, how early each is joined (a higher score first), and ggml's kinds; the ids a reader must know."""

    pieces: list[str]
    scores: list[float]
    kinds: list[str]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int


def vocabulary(path: Path, rows: int) -> Vocabulary:
    """What llama.cpp's SentencePiece tokenizer needs.

    It joins the two neighbours whose piece has the best score, whichever they are. A `tokenizer.json` has ranks of pairs instead: a piece
    gets the rank of the first pair that makes it. Where a piece can be cut in two in several ways, and only some of them are pairs of the
    `tokenizer.json`, the ids of a text may differ.

    Args:
        path: of the language model's tokenizer.
        rows: V, rows of the embedding; those that no piece has are named and marked as unused.

    Raises:
        UserError: another kind of tokenizer, or one with more pieces than rows.
    """
    ours = load_tokenizer(path)
    if path.suffix == ".model":
        pieces, scores, kinds, unk = _of_sentencepiece(path)
    else:
        pieces, scores, kinds, unk = _of_json(path)
    if len(pieces) > rows:
        raise UserError(f"{path} has {len(pieces)} tokens but the model has {rows} rows: not its tokenizer.")
    missing = range(len(pieces), rows)
    return Vocabulary(
        pieces + [f"[PAD{row}]" for row in missing],
        scores + [-10000.0 for _ in missing],
        kinds + ["UNUSED" for _ in missing],
        ours.bos_id,
        ours.eos_id,
        unk,
        ours.pad_id,
    )


_Pieces = tuple[list[str], list[float], list[str], int]


def _of_sentencepiece(path: Path) -> _Pieces:
    import sentencepiece

    model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tests = (
        ("UNKNOWN", model.is_unknown),
        ("CONTROL", model.is_control),
        ("BYTE", model.is_byte),
        ("UNUSED", model.is_unused),
    )
    ids = range(model.vocab_size())
    kinds = [next((kind for kind, test in tests if test(i)), "NORMAL") for i in ids]
    return [model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids], kinds, model.unk_id()


def _of_json(path: Path) -> _Pieces:
    contents = json.loads(path.read_text(encoding="utf-8"))
    model, added = contents["model"], contents["added_tokens"]
    if model["type"] != "BPE" or not model["byte_fallback"] or model["unk_token"] not in model["vocab"]:
        raise UserError(
            f"{path}: GGUF is written for SentencePiece-like tokenizers with byte fallback, which this is not."
        )
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    pieces = sorted(ids, key=lambda piece: ids[piece])
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    special = {token["content"] for token in added if token["special"]}

    def kind(piece: str) -> str:
        if piece == model["unk_token"]:
            return "UNKNOWN"
        if piece in special:
            return "CONTROL"
        return "BYTE" if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else "NORMAL"

    scores = [-float(ranks.get(piece, len(ranks))) for piece in pieces]
    return pieces, scores, [kind(piece) for piece in pieces], ids[model["unk_token"]]


def _add_vocabulary(writer: Any, words: Vocabulary) -> None:
    kinds = library().TokenType
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words.pieces)
    writer.add_token_scores(words.scores)
    writer.add_token_types([kinds[kind] for kind in words.kinds])
    writer.add_bos_token_id(words.bos_id)
    writer.add_eos_token_id(words.eos_id)
    writer.add_unk_token_id(words.unk_id)
    writer.add_pad_token_id(words.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def library() -> ModuleType:
    """The package gguf.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("--format=gguf needs the package gguf: pip install 'gguf>=0.19.0'.") from error
    return gguf
