"""The tokenizer of a language model as transformers wants it: one `tokenizer.json` with `<image>` and `<pad>`, and its settings.

Original LLaVA tokenises the words before and after the image apart, so that the latter begin with a blank of their own. Here the
same comes out because `<image>` is a special token that is not normalised, and SentencePiece's leading blank goes before each stretch.
"""

import dataclasses
from pathlib import Path
from typing import Any

from rad_jax.errors import UserError
from rad_jax.prompts import load_tokenizer

IMAGE, PAD = "<image>", "<pad>"
_BLANK = "\u2581"


@dataclasses.dataclass(frozen=True)
class BundleTokenizer:
    """The text of `tokenizer.json` and the ids in it that a model must know; `size` counts all tokens, the added ones included."""

    text: str
    bos_id: int
    eos_id: int
    image_id: int
    pad_id: int
    size: int
    bos: str
    eos: str
    unk: str | None

    def settings(self, max_length: int) -> dict[str, Any]:
        """The contents of `tokenizer_config.json`."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "legacy": True,  # else a reader that turns it into a LlamaTokenizer drops the blank after the image
            "bos_token": self.bos,
            "eos_token": self.eos,
            "unk_token": self.unk,
            "pad_token": PAD,
            "extra_special_tokens": {"image_token": IMAGE},
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "attention_mask"],
        }


def build(path: Path, rows: int, image_id: int | None = None) -> BundleTokenizer:
    """The bundle's tokenizer from the one that the model was trained with.

    Args:
        path: `tokenizer.json` or SentencePiece's `tokenizer.model`.
        rows: V, rows of the model's embedding; ids from there on are free for `<image>` and `<pad>`.
        image_id: the row that the model has for `<image>` already, if it has one; `<pad>` comes after it.

    Raises:
        UserError: a BERT vocabulary, or more tokens than rows.
    """
    from tokenizers import AddedToken, Tokenizer

    ours = load_tokenizer(path)
    if path.suffix == ".txt":
        raise UserError(f"{path}: a BERT vocabulary cannot be the tokenizer of a language model.")
    pipeline: Any = _from_sentencepiece(path) if path.suffix == ".model" else Tokenizer.from_file(str(path))
    if pipeline.get_vocab_size() > rows:
        raise UserError(
            f"{path} has {pipeline.get_vocab_size()} tokens but the model has {rows} rows: not its tokenizer."
        )
    if pipeline.token_to_id(IMAGE) is None:
        start = rows if image_id is None else image_id
        # Ids follow one another in a tokenizer; names for rows that no piece has keep `<image>` behind the last row.
        pipeline.add_special_tokens([f"<unused{row}>" for row in range(pipeline.get_vocab_size(), start)])
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (IMAGE, PAD)])
    if image_id is not None and pipeline.token_to_id(IMAGE) != image_id:
        raise UserError(
            f"{path}: <image> would get the id {pipeline.token_to_id(IMAGE)}, but the model has it at {image_id}."
        )
    bos, eos = pipeline.id_to_token(ours.bos_id), pipeline.id_to_token(ours.eos_id)
    pipeline.post_processor = _begins_with(bos, ours.bos_id)
    return BundleTokenizer(
        text=pipeline.to_str(pretty=True) + "\n",
        bos_id=ours.bos_id,
        eos_id=ours.eos_id,
        image_id=pipeline.token_to_id(IMAGE),
        pad_id=pipeline.token_to_id(PAD),
        size=pipeline.get_vocab_size(),
        bos=bos,
        eos=eos,
        unk="<unk>" if pipeline.token_to_id("<unk>") is not None else None,
    )


def alone(path: Path, max_length: int) -> dict[str, Any]:
    """The tokenizer's files for a language model without images, by name: the tokenizer that the model was trained with, and its settings.

    Args:
        path: `tokenizer.json`, which gets the leading BOS where it says nothing of one, or SentencePiece's `tokenizer.model`.
        max_length: longest row of the model.
    """
    from tokenizers import Tokenizer

    ours = load_tokenizer(path)
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": max_length}
    if path.suffix == ".model":
        import sentencepiece

        named: Any = sentencepiece.SentencePieceProcessor(model_file=str(path)).id_to_piece
        text = path.read_bytes()
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
    else:
        pipeline = Tokenizer.from_file(str(path))
        named, text = pipeline.id_to_token, path.read_bytes()
        if pipeline.post_processor is None:
            pipeline.post_processor = _begins_with(named(ours.bos_id), ours.bos_id)
            text = (pipeline.to_str(pretty=True) + "\n").encode()
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, number in (("bos", ours.bos_id), ("eos", ours.eos_id), ("pad", ours.pad_id)):
        settings[f"{name}_token"] = named(number)
    return {path.name: text, "tokenizer_config.json": settings}


def _begins_with(token: str, number: int) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


def _from_sentencepiece(path: Path) -> Any:
    """SentencePiece's byte-pair model as a `tokenizers` pipeline.

    A model file holds pieces and scores but no merges. Every way to cut a piece in two pieces is a merge; its rank is the rank of what
    it makes, because SentencePiece joins the pair with the best score first.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    ranked = []
    for i, piece in enumerate(pieces):
        if model.is_control(i) or model.is_unknown(i) or model.is_byte(i):
            continue
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        cuts = sorted((ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids)
        ranked += [(-model.get_score(i), rank, a, b) for rank, (_, _, a, b) in enumerate(cuts)]
    ranked.sort(key=lambda item: item[0])  # stable: equal scores keep the order of the pieces
    merges = [(a, b) for _, _, a, b in ranked]
    pipeline = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)])
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
    pipeline.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return pipeline
