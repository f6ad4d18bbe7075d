"""Text: tokenizers, the conversation templates of LLaVA-Rad, and where the loss falls.

Three kinds of tokenizer file are read: a `tokenizer.json` (the kind `train_tokenizer` writes), the SentencePiece
`tokenizer.model` of Llama and Vicuna, and the `vocab.txt` of an uncased BERT. All of them encode user text as plain
text: a literal `</s>` in a report never becomes the end-of-sequence token.

The templates follow LLaVA-Rad (Zambrano Chaves et al. 2025) and so LLaVA-1.5:

    plain   <s> <image> findings \\n                                          loss on "findings \\n"
    v1      <s> system USER: <image> \\n question ASSISTANT: findings </s>    loss on "findings </s>"

The stretches before and after the image are tokenised on their own, each with SentencePiece's leading blank.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rad_jax.errors import UserError

IMAGE_ID = -200  # stands for the image in token ids; replaced by the image's features in the model
NO_LOSS = -100
MIN_VOCAB_SIZE = 512

# The Vicuna v1.1 system prompt (FastChat, Apache-2.0), word for word: the language model was tuned on it.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_SPECIAL = ("<unk>", "<s>", "</s>")
_ENDS = ("<|begin_of_text|>", "<|end_of_text|>")  # what Llama 3 has in place of <s> and </s>
_BLANK = "\u2581"  # SentencePiece's visible blank


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of one conversation, and for each the label: the id itself, or NO_LOSS where there is none."""

    ids: list[int]
    labels: list[int]


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    path: Path
    bos_id: int
    eos_id: int
    pad_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text` read as plain text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer by the kind of its file.

    Args:
        path: `*.json` (tokenizers), `*.model` (SentencePiece) or `*.txt` (uncased BERT vocabulary).

    Raises:
        UserError: no such file, an unknown kind, a damaged file, or one without the special tokens.
    """
    path = Path(path)
    kinds = {".json": _load_json, ".model": _SentencePiece, ".txt": _load_bert}
    if path.suffix not in kinds:
        raise UserError(f"{path}: unknown kind of tokenizer, expected tokenizer.json, tokenizer.model or vocab.txt")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    try:
        return kinds[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception and RuntimeError on a damaged file
        raise UserError(f"{path}: damaged tokenizer file ({error})") from error


class _SentencePiece:
    """A SentencePiece model such as Llama's; it has no pad token, so that unk pads, as in LLaVA."""

    def __init__(self, path: Path):
        import sentencepiece

        self.path = path
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path}: tokenizer without the pieces <s> and </s>")
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self._model.unk_id()
        self.vocab_size = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if i not in (self.bos_id, self.eos_id, self.pad_id)])


class _Json:
    """A `tokenizers` pipeline: trained here, a Llama tokenizer.json, or WordPiece."""

    def __init__(self, path: Path, pipeline: Any, bos: str, eos: str, pads: Sequence[str]):
        self.path = path
        self._pipeline = pipeline
        # Special tokens written out in a text are text.
        self._pipeline.encode_special_tokens = True
        ids = {token: pipeline.token_to_id(token) for token in (bos, eos, *pads)}
        if ids[bos] is None or ids[eos] is None:
            raise UserError(f"{path}: tokenizer without the tokens {bos} and {eos}")
        self.bos_id, self.eos_id = ids[bos], ids[eos]
        self.pad_id = next((ids[pad] for pad in pads if ids[pad] is not None), ids[eos])
        self.vocab_size = pipeline.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._pipeline.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._pipeline.decode([int(i) for i in ids], skip_special_tokens=True)


def _load_json(path: Path) -> Tokenizer:
    import tokenizers

    pipeline = tokenizers.Tokenizer.from_file(str(path))
    bos, eos = _ENDS if pipeline.token_to_id(_ENDS[0]) is not None else ("<s>", "</s>")
    return _Json(path, pipeline, bos, eos, ("<pad>", "<unk>"))


def _load_bert(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pipeline = Pipeline(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=True)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.WordPiece()
    pipeline.add_special_tokens(
        [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if pipeline.token_to_id(token) is not None]
    )
    return _Json(path, pipeline, "[CLS]", "[SEP]", ("[PAD]",))


def question(indication: str | None) -> str:
    """The question of LLaVA-Rad; an indication of None was not given, an empty one was given and is empty."""
    if indication is None:
        return "Provide a description of the findings in the radiology image."
    reason = indication.replace("\n", " ")
    return f"Provide a description of the findings in the radiology image given the following indication: {reason}"


def view_question(view: str) -> str:
    """The question of LLaVA-Rad's loader of all views; a view that is not known is "Unknown"."""
    return f"Given the chest X-ray image from {view or 'Unknown'} view, describe the findings in the image: "


def render_plain(tokenizer: Tokenizer, findings: str, slot: Sequence[int] = (IMAGE_ID,)) -> Example:
    """The template of projector alignment: image, findings, newline; loss on all that follows the image; no EOS.

    Ids of words in `slot` stand where the image would, for pretraining on text alone.
    """
    return _example([tokenizer.bos_id, *slot], tokenizer.encode(findings + "\n"))


def render_v1(tokenizer: Tokenizer, question: str, findings: str | None, slot: Sequence[int] = (IMAGE_ID,)) -> Example:
    """The conversation of fine-tuning and of inference; loss on the findings and the EOS.

    The answer is tokenised apart from the prompt. That gives the ids of the whole string, because pieces never reach
    over a blank, and makes the prompt of training the prompt of generation.

    Args:
        tokenizer: of the language model.
        question: as `question` makes it.
        findings: the answer; None ends the ids after "ASSISTANT:", for generation.
        slot: what stands where the image does, as in `render_plain`.
    """
    prompt = [tokenizer.bos_id, *tokenizer.encode(f"{SYSTEM} USER: "), *slot]
    prompt += tokenizer.encode(f"\n{question} ASSISTANT:")
    return _example(prompt, [] if findings is None else [*tokenizer.encode(findings), tokenizer.eos_id])


def render_clip(tokenizer: Tokenizer, text: str, max_length: int) -> Example:
    """The text tower's input: BOS (or [CLS]), at most max_length - 2 tokens, EOS (or [SEP]); no loss on tokens."""
    return _example([tokenizer.bos_id, *tokenizer.encode(text)[: max_length - 2], tokenizer.eos_id], [])


def _example(prompt: list[int], answer: list[int]) -> Example:
    return Example(ids=prompt + answer, labels=[NO_LOSS] * len(prompt) + answer)


def train_tokenizer(rows: Iterable[tuple[str | None, str]], vocab_size: int, out: str | os.PathLike[str]) -> Tokenizer:
    """Trains a byte-pair tokenizer in the manner of Llama's and writes it as one `tokenizer.json`.

    It is trained on whole conversations, so that the words of the prompt become single pieces too. The same rows give
    the same file. transformers' `PreTrainedTokenizerFast` loads it and gives the same ids.

    Args:
        rows: (indication or None, findings) of the training studies.
        vocab_size: number of pieces: 3 special tokens, 256 bytes, the rest learned, as far as the text goes.
        out: the file to write.

    Returns:
        The tokenizer, loaded from the file.

    Raises:
        UserError: vocab_size below 512, or no text.
    """
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import models, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size={vocab_size} is too small for a tokenizer, use at least {MIN_VOCAB_SIZE}")
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    # Rare characters stay bytes: an alphabet of all scripts must not use up the room for words.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=pieces,
        limit_alphabet=(vocab_size - len(pieces)) // 4,
        show_progress=False,
    )
    pipeline = Pipeline(models.BPE())
    _add_text_steps(pipeline)
    pipeline.train_from_iterator(_conversations(rows), trainer)
    learned = json.loads(pipeline.to_str())["model"]
    if len(learned["vocab"]) == len(pieces):
        raise UserError(f"{out}: no text to train a tokenizer on")
    # The trainer knows bytes only as special tokens; in the finished model they are ordinary pieces.
    merges = [tuple(pair) for pair in learned["merges"]]
    pipeline = Pipeline(models.BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    _add_text_steps(pipeline)
    pipeline.add_special_tokens(list(_SPECIAL))
    Path(out).write_text(pipeline.to_str(pretty=True) + "\n", encoding="utf-8")
    return load_tokenizer(out)


def _add_text_steps(pipeline: Any) -> None:
    """Gives the pipeline Llama's blanks, pieces that keep to one word, digit, mark or newline, and the way back."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)])
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_BLANK, "merged_with_next"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _conversations(rows: Iterable[tuple[str | None, str]]) -> Iterator[str]:
    for indication, findings in rows:
        yield f"{SYSTEM} USER: "
        yield f"\n{question(indication)} ASSISTANT: {findings}\n"
