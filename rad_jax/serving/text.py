"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

import re
from collections.abc import Sequence
from typing import Any

from rad_jax.prompts import IMAGE_ID, SYSTEM, Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_DAMAGED = "\ufffd"


def prompt(tokenizer: Tokenizer, question: str, image: bool) -> list[int]:
    """Token ids of a question in LLaVA's `v1` conversation, as the bundle's chat template has them; IMAGE_ID stands for the film.

    The question is read as plain text: special tokens written out in it are text.
    """
    if not image:
        return [tokenizer.bos_id, *tokenizer.encode(f"{SYSTEM} USER: {question} ASSISTANT:")]
    before, after = tokenizer.encode(f"{SYSTEM} USER: "), tokenizer.encode(f"\n{question} ASSISTANT:")
    return [tokenizer.bos_id, *before, IMAGE_ID, *after]


class Detokenizer:
    """The text of a growing list of ids. What `push` and `end` give, put together, is `decode` of all ids.

    Only the last ids are decoded again. A character may be spread over several ids of one byte each, and bytes that make no character
    change how those before them read, so text is held back until an id follows that is neither a byte nor left out of texts.

    Args:
        tokenizer: of the ids.
        open_: for each id whether it may leave the text open, see `open_pieces`.
    """

    def __init__(self, tokenizer: Tokenizer, open_: Sequence[bool]):
        self._decode, self._open = tokenizer.decode, open_
        self._ids: list[int] = []
        self._done = 0  # ids whose text has been given

    def push(self, token: int) -> str:
        """The text that has become certain with this id."""
        self._ids.append(token)
        return "" if self._open[token] else self._new(ending=False)

    def end(self) -> str:
        """What was held back."""
        return self._new(ending=True)

    def _new(self, ending: bool) -> str:
        # The ids given last are decoded along, because a blank may hang on what stands before it.
        before, text = self._decode(self._ids[: self._done]), self._decode(self._ids)
        if text.endswith(_DAMAGED) and not ending:
            return ""
        if new := text[len(before) :]:
            self._ids, self._done = self._ids[self._done :], len(self._ids) - self._done
        return new


class Stops:
    """Cuts a text at the first of its stop strings, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = [stop for stop in stops if stop], ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far may be shown."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._release(min(places))
        return self._release(len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0))

    def end(self) -> str:
        """What was held back."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown


def open_pieces(pipeline: Any, rows: int) -> list[bool]:
    """For each id below `rows` whether it is a single byte (SentencePiece's `<0x0A>`) or a special token, which no text shows.

    Args:
        pipeline: a `tokenizers.Tokenizer`.
        rows: of the embedding.
    """
    special = {number for number, token in pipeline.get_added_tokens_decoder().items() if token.special}
    return [
        number in special or _BYTE.fullmatch(pipeline.id_to_token(number) or "") is not None for number in range(rows)
    ]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
