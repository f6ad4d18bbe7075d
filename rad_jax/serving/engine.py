"""The engine: requests wait in a bounded queue, join the rows that are being written, and leave when their text has ended.

One worker thread owns the model. Between two steps of the rows in progress it takes waiting requests in, as many as there are free slots in the
cache and as one prefill may hold, so that a text that is being written is never held up by more than that.
"""

import collections
import dataclasses
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from rad_jax import images
from rad_jax.errors import UserError
from rad_jax.prompts import IMAGE_ID, Tokenizer
from rad_jax.serving import text
from rad_jax.serving.sampling import Sampler

MAX_ASPECT = 8  # of films: a sliver of pixels would become a giant when its short side is scaled up
FAILURES = 3  # in a row, after which the engine is taken to be broken for good
# After an error of these the process can no longer use its card; running out of its memory is none of them.
_DEVICE_ERROR = re.compile(r"(?:CUDA|cuBLAS|cuDNN|HIP) error|CUBLAS_STATUS|CUDNN_STATUS", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        film: uint8 [Y, X], grey, of any size; None for text alone.
        question: the user's words; special tokens in them are text.
        max_new_tokens: the text ends after so many tokens, or where the row is full.
        temperature: 0 is greedy; else logits are divided by it.
        top_p: sample among the most probable tokens that together have this share.
        seed: of the sampling.
        stop: the text ends before the first of these.
        attention: also say where each token looked.
    """

    film: np.ndarray | None
    question: str
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    attention: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token more.

    Attributes:
        text: what is new of the text: "" while a character is incomplete or a stop string may have begun.
        token: its id; the end of sequence has one too.
        attention: float32 [p, p] over the patches of the film, from where the token was chosen; sums to 1. None if not asked for.
    """

    text: str
    token: int
    attention: np.ndarray | None


class Full(Exception):
    """The queue is full. `retry_after`: seconds after which there should be room, at least 1."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full, try again in {retry_after} s")
        self.retry_after = retry_after


class Broken(Exception):
    """The engine failed on a request, for a reason that is not the request's. The message quotes nothing of it."""


# What a stream has to say: pieces, then None; or what went wrong, which is the last.
Told: TypeAlias = Piece | Broken | None


class Stream:
    """The pieces of one request as they come; to be iterated by one thread, unless it was submitted with a `tell`.

    Attributes:
        finish_reason: None while it runs; then "stop" (the text ended, or a stop string), "length" or "cancelled".
        prompt_tokens: with one for each patch of the film.
        completion_tokens: so far, the end of sequence included.
    """

    def __init__(self, prompt_tokens: int, tell: Callable[[Told], object] | None):
        self.finish_reason: str | None = None
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.cancelled = False
        self._queue: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self.tell = tell or self._queue.put  # for the engine alone

    def __iter__(self) -> Iterator[Piece]:
        """
        Raises:
            Broken: the engine failed.
        """
        while (found := self._queue.get()) is not None:
            if isinstance(found, Broken):
                raise found
            yield found

    def cancel(self) -> None:
        """Frees the request's slot, or its place in the queue, before the next step."""
        self.cancelled = True


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What serves: for answers, logs and the model card."""

    name: str
    version: str
    bundle_sha256: str
    device: str
    dtype: str
    weights: str
    slots: int
    max_tokens: int
    image_size: int
    template: str = "v1"


class Runner(Protocol):
    """What the engine asks of a model: `rad_jax.serving.model.Model`."""

    slots: int
    max_tokens: int

    def prefill(self, prompts: Sequence[Any], slot: int) -> tuple[Any, list[np.ndarray | None]]: ...
    def step(self, rows: Sequence[Any]) -> tuple[Any, list[np.ndarray | None]]: ...
    def move(self, source: int, target: int, length: int) -> None: ...


class _Row:
    """A request: waiting, or in the slot of its place among the rows."""

    def __init__(self, request: Request, ids: list[int], film: np.ndarray | None, stream: Stream, writer: Any):
        self.ids, self.film, self.stream = ids, film, stream
        self.length = stream.prompt_tokens  # in the cache
        self.token = -1
        self.attention = request.attention and film is not None
        self.limit = request.max_new_tokens
        self.detokenizer, self.stops = writer, text.Stops(request.stop)
        greedy = request.temperature == 0
        self.sampler = None if greedy else Sampler(request.temperature, request.top_p, request.seed)
        self.began = time.monotonic()


class Engine:
    """Serves one model to many threads.

    Args:
        model: what computes; only the worker thread uses it.
        tokenizer: of the bundle.
        open_: for each id whether it may leave the text open, see `text.open_pieces`.
        eos_ids: ids that end a text.
        info: for `info`.
        patches: tokens of a film.
        queue_size: requests that may wait.
        prefill_tokens: of prompts that are taken in together, if there are several.

    Attributes:
        info: what serves.
        others: how many cores other work of this process's wants now, as the decoding of films; a CPU's engine leaves them that many.
        failed: None, or why no request will be answered any more: the card failed, or FAILURES steps in a row did. Only a new process
            helps then.
    """

    def __init__(
        self,
        model: Runner,
        tokenizer: Tokenizer,
        open_: Sequence[bool],
        eos_ids: frozenset[int],
        info: EngineInfo,
        patches: int,
        queue_size: int,
        prefill_tokens: int,
    ):
        self.info = info
        self.others: Callable[[], int] = lambda: 0
        self.failed: str | None = None
        self._model, self._tokenizer, self._open, self._eos = model, tokenizer, open_, eos_ids
        self._patches, self._queue_size, self._prefill_tokens = patches, queue_size, prefill_tokens
        self._waiting: collections.deque[_Row] = collections.deque()
        self._rows: list[_Row] = []
        self._lock = threading.Condition()
        self._closing = False
        self._tokens_total = self._requests_total = 0
        self._seconds = 1.0  # of a request, a moving mean
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, tell: Callable[[Told], object] | None = None) -> Stream:
        """Puts a request in the queue. Image and words are prepared here, in the caller's thread.

        Args:
            request: what is asked.
            tell: gets every piece in the worker thread, which waits for it. Without it the stream is to be iterated: simpler, but a
                thread that wakes at every token takes the interpreter from the worker.

        Raises:
            UserError: it can never be served: a film that is none, numbers out of range, or a prompt that fills a row.
            Full: so many are waiting already.
            Broken: the engine has `failed`.
        """
        check(request)
        if self._closing:
            raise Full(1)
        film = None if request.film is None else square(request.film, self.info.image_size)
        ids = text.prompt(self._tokenizer, request.question, film is not None)
        tokens = len(ids) - 1 + self._patches if film is not None else len(ids)
        if tokens >= self._model.max_tokens:
            raise UserError(
                f"the prompt has {tokens} tokens, but a row holds {self._model.max_tokens} with its text: ask a shorter question."
            )
        row = _Row(request, ids, film, Stream(tokens, tell), text.Detokenizer(self._tokenizer, self._open))
        with self._lock:
            if self.failed:
                raise Broken(self.failed)
            if self._closing or len(self._waiting) >= self._queue_size:
                ahead = len(self._waiting) / self._model.slots
                raise Full(max(1, math.ceil(ahead * self._seconds)))
            self._waiting.append(row)
            self._requests_total += 1
            self._lock.notify()
        return row.stream

    def close(self, drain: bool = True) -> None:
        """Takes no more requests and waits for those it has, or without `drain` cancels them."""
        with self._lock:
            self._closing = True
            if not drain:
                for row in (*self._waiting, *self._rows):
                    row.stream.cancel()
            self._lock.notify()
        self._thread.join()

    def stats(self) -> dict[str, float]:
        """queued, running: requests; tokens_total, requests_total: since the start; kv_tokens_used, kv_tokens_total: of the cache."""
        with self._lock:
            return {
                "queued": len(self._waiting),
                "running": len(self._rows),
                "tokens_total": self._tokens_total,
                "requests_total": self._requests_total,
                "kv_tokens_used": sum(row.length for row in self._rows),
                "kv_tokens_total": self._model.slots * self._model.max_tokens,
            }

    # ------------------------------------------------------------------------------------------------- the worker thread

    def _run(self) -> None:
        import torch

        cores, failures = torch.get_num_threads(), 0
        while self.failed is None:
            new: list[_Row] = []
            try:
                with self._lock:
                    while not (self._waiting or self._rows or self._closing):
                        self._lock.wait()
                    if self._closing and not self._waiting and not self._rows:
                        return
                # With more threads than cores each operation waits for the last of its threads to get one.
                if (threads := max(1, cores - self.others())) != torch.get_num_threads():
                    torch.set_num_threads(threads)
                self._leave([row for row in self._rows if row.stream.cancelled], "cancelled")
                with self._lock:
                    self._admit(new)
                if new:
                    self._prefill(new)
                if self._rows:
                    self._step()
                failures = 0
            except Exception as error:  # a failing device must not leave anybody waiting
                failures += 1
                self._break(new, error, failures)

    def _admit(self, new: list[_Row]) -> None:
        """Takes over to `new` what fits of the queue: the first always, if there is a slot."""
        room = self._prefill_tokens
        for row in [row for row in self._waiting if row.stream.cancelled]:
            self._waiting.remove(row)
            self._finish(row, "cancelled")
        free = self._model.slots - len(self._rows)
        while self._waiting and len(new) < free and (not new or self._waiting[0].length <= room):
            row = self._waiting.popleft()
            room -= row.length
            new.append(row)

    def _prefill(self, new: list[_Row]) -> None:
        from rad_jax.serving.model import Prompt

        first = len(self._rows)
        self._rows.extend(new)
        logits, maps = self._model.prefill([Prompt(row.ids, row.film, row.attention) for row in new], first)
        self._choose(new, logits, maps)

    def _step(self) -> None:
        from rad_jax.serving.model import Row

        rows = list(self._rows)
        asked = [Row(row.token, row.length, _place(row)) for row in rows]
        logits, maps = self._model.step(asked)
        for row in rows:
            row.length += 1
        self._choose(rows, logits, maps)

    def _choose(self, rows: list[_Row], logits: Any, maps: Sequence[np.ndarray | None]) -> None:
        """Gives every row its next token, and lets those go whose text has ended, or whose numbers are none."""
        import torch

        found = logits.argmax(-1, keepdim=True)
        # Where a row holds a NaN, it is what argmax finds; -inf alone is in order, of ids that are suppressed. Both are read at once.
        greedy, largest = torch.cat((found.double(), logits.gather(-1, found).double()), 1).T.tolist()
        ended: dict[str, list[_Row]] = {"stop": [], "length": [], "overflow": []}
        for i, row in enumerate(rows):
            if not math.isfinite(largest[i]):
                ended["overflow"].append(row)
                continue
            row.token = int(greedy[i]) if row.sampler is None else row.sampler.choose(logits[i].cpu().numpy())
            stream = row.stream
            stream.completion_tokens += 1
            full = stream.completion_tokens >= row.limit or row.length >= self._model.max_tokens
            reason = "stop" if row.token in self._eos else "length" if full else None
            shown = row.stops.push(row.detokenizer.push(row.token))
            if reason is not None and not row.stops.found:
                shown += row.stops.push(row.detokenizer.end())
                shown += row.stops.end()
            if row.stops.found:
                reason = "stop"
            if reason is not None:
                ended[reason].append(row)
            stream.tell(Piece(shown, row.token, maps[i]))
        self._tokens_total += len(rows) - len(ended["overflow"])
        for reason, gone in ended.items():
            self._leave(gone, reason)

    def _leave(self, gone: Sequence[_Row], reason: str) -> None:
        """Ends rows, with a `finish_reason` or by "overflow", and closes the gaps they leave with the last ones."""
        for row in gone:
            place, last = self._rows.index(row), len(self._rows) - 1
            if place != last:
                self._model.move(last, place, self._rows[last].length)
                self._rows[place] = self._rows[last]
            self._rows.pop()
            self._finish(row, reason)

    def _finish(self, row: _Row, reason: str) -> None:
        if reason != "cancelled":
            self._seconds += 0.2 * (time.monotonic() - row.began - self._seconds)
        if reason == "overflow":
            advice = "" if self.info.dtype == "float32" else ": serve the bundle with --dtype=float32"
            row.stream.tell(Broken(f"the model's numbers overflowed in {self.info.dtype} on this request{advice}"))
            return
        row.stream.finish_reason = reason
        row.stream.tell(None)

    def _break(self, new: Sequence[_Row], error: Exception, failures: int) -> None:
        """Tells the rows in progress that they have failed. What waits is tried, unless nothing can be expected to work any more."""
        kind = type(error).__name__
        with self._lock:
            if _DEVICE_ERROR.search(str(error)):
                self.failed = f"the device failed ({kind})"
            elif failures >= FAILURES:
                self.failed = f"the engine failed {failures} times in a row ({kind})"
            broken = [*self._rows, *(row for row in new if row not in self._rows)]
            self._rows.clear()
            if self.failed:
                broken += self._waiting
                self._waiting.clear()
        for row in broken:
            told = Broken(self.failed or f"the engine failed on this request ({kind})")
            row.stream.tell(told.with_traceback(error.__traceback__))  # for the log, which says where


def check(request: Request) -> None:
    """Refuses numbers that mean nothing.

    Raises:
        UserError: which one, and what it may be.
    """
    film = request.film
    if film is not None and (film.dtype != np.uint8 or film.ndim != 2 or not film.size):
        raise UserError("a film is a grey image of 8 bits (uint8 [Y, X]).")
    if film is not None and max(film.shape) > MAX_ASPECT * min(film.shape):
        raise UserError(f"a film's long side is at most {MAX_ASPECT} times its short one.")
    if request.max_new_tokens < 1:
        raise UserError("max_new_tokens must be at least 1.")
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        raise UserError("temperature must be 0 or more.")
    if not 0 < request.top_p <= 1:
        raise UserError("top_p must be above 0 and at most 1.")
    if request.seed < 0:
        raise UserError("seed must be 0 or more.")


def square(film: np.ndarray, size: int) -> np.ndarray:
    """The middle square of a film uint8 [Y, X], as in training."""
    return np.ascontiguousarray(images.centre_crop(images.resize_short(film, size), size))


def _place(row: _Row) -> int | None:
    """Where the film's patches begin in a row whose attention is wanted."""
    return row.ids.index(IMAGE_ID) if row.attention else None
