"""What the routes share: the engine's threads become awaitable answers, with a deadline and an end when the client leaves."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse

from rad_jax.serving import audit
from rad_jax.serving.audit import Audit
from rad_jax.serving.engine import Broken, Engine, Full, Piece, Request, Stream, Told
from rad_jax.serving.errors import ApiError
from rad_jax.serving.films import Film, Films, Preview
from rad_jax.serving.metrics import Metrics

T = TypeVar("T")


def late() -> ApiError:
    return ApiError(504, "the answer took too long and was given up.", code="timeout")


@dataclasses.dataclass
class Service:
    """One engine and its surroundings.

    Attributes:
        dicom: how a DICOM's grey values are made, one of `images.DICOM_STYLES`.
        seconds: that a request may take, from its first byte on: upload, decoding and waiting included (and sending, which
            `gate.Unread` ends).
        stopping: no further request is taken.
    """

    engine: Engine
    films: Films
    audit: Audit
    metrics: Metrics
    dicom: str
    seconds: float
    stopping: bool = False

    def check(self) -> None:
        """Raises ApiError when no request can be taken."""
        if self.stopping:
            raise ApiError(503, "the server is being stopped.", code="stopping", retry_after=10)
        if self.engine.failed:
            raise ApiError(503, f"{self.engine.failed}: the server ends, to be started again.", code="engine")
        self.audit.check()

    async def film(self, data: bytes, http: HttpRequest) -> Film:
        """Decodes what a client sent, and notes it for the audit log.

        Raises:
            ApiError: too many wait, it took too long, or the client has gone.
            UserError: it is no film, or one over the limits.
        """
        film: Film = await self._within(self.films.run(self.films.decode, data, self.dicom), http)
        http.state.record.update(audit.film_fields(film.sha256, film.pixels.shape, data))
        return film

    async def preview(self, data: bytes, http: HttpRequest) -> Preview:
        """The same film for a viewer; raises as `film`."""
        preview: Preview = await self._within(self.films.run(self.films.preview, data), http)
        http.state.record.update(audit.film_fields(preview.sha256, preview.shape, data))
        return preview

    async def _within(self, work: Coroutine[Any, Any, T], http: HttpRequest) -> T:
        """Awaits work, and ends it at the request's deadline or when its client leaves."""
        task, gone = asyncio.create_task(work), asyncio.create_task(left(http))
        left_over = self._deadline(http) - asyncio.get_running_loop().time()
        try:
            done, _ = await asyncio.wait((task, gone), timeout=left_over, return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                return await task
            if gone in done:
                http.state.record["status"] = audit.GONE
                raise ApiError(503, "the request was cancelled.", code="cancelled")
            raise late()
        finally:
            task.cancel()
            gone.cancel()

    def _deadline(self, http: HttpRequest) -> float:
        """In the loop's time."""
        return float(http.state.began) + self.seconds

    async def ask(self, request: Request, http: HttpRequest) -> "Answer":
        """Puts a request in the engine's queue.

        Raises:
            ApiError: the queue is full, its time is over, the server is being stopped, or the engine has failed for good.
            UserError: it can never be answered.
        """
        self.check()
        try:
            request.question.encode()
        except UnicodeEncodeError:  # JSON can spell halves of characters
            raise ApiError(400, "the text is no valid Unicode.", code="invalid_value") from None
        record = http.state.record
        record.update(question_characters=len(request.question), max_new_tokens=request.max_new_tokens)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Told]()
        if loop.time() > self._deadline(http):
            raise late()

        def tell(found: Told) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(pieces.put_nowait, found)

        try:
            stream = await asyncio.to_thread(self.engine.submit, request, tell)
        except Full as error:
            self.metrics.full.inc()
            raise ApiError(
                429, "the queue is full: try again later.", code="queue_full", retry_after=error.retry_after
            ) from error
        except Broken:
            self.check()  # which says so
            raise
        return Answer(stream, pieces, self._deadline(http), record, self.metrics)

    def close(self) -> None:
        """Lets what runs end, then everything."""
        self.engine.close()
        self.films.close()
        self.audit.close()


class Answer:
    """A text that is being written. Iterate it once; leaving the loop, in whatever way, frees its slot."""

    def __init__(
        self,
        stream: Stream,
        pieces: asyncio.Queue[Told],
        deadline: float,
        record: dict[str, Any],
        metrics: Metrics,
    ):
        self.stream, self._pieces, self._record, self._metrics = stream, pieces, record, metrics
        self._began = time.perf_counter()
        self._deadline = deadline

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """
        Raises:
            ApiError: it took too long, the engine failed, or the server stopped first.
        """
        first = True
        try:
            while (piece := await self._next()) is not None:
                if first:
                    seconds = time.perf_counter() - self._began
                    self._metrics.first_token.observe(seconds)
                    self._record["first_token_seconds"] = round(seconds, 4)
                    first = False
                yield piece
            if self.stream.finish_reason == "cancelled":
                raise ApiError(503, "the request was cancelled.", code="cancelled")
        finally:
            self.stream.cancel()
            self._record.update(
                finish=self.stream.finish_reason or "cancelled",
                prompt_tokens=self.stream.prompt_tokens,
                completion_tokens=self.stream.completion_tokens,
            )

    async def whole(self, http: HttpRequest) -> list[Piece]:
        """All pieces, unless the client leaves first.

        Raises:
            ApiError: as iterating does.
        """
        watch = asyncio.create_task(self._watch(http))
        try:
            return [piece async for piece in self]
        finally:
            watch.cancel()

    def usage(self) -> dict[str, int]:
        """Counted as OpenAI does, a token for each patch of the film among those of the prompt."""
        prompt, completion = self.stream.prompt_tokens, self.stream.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def _next(self) -> Piece | None:
        try:
            async with asyncio.timeout_at(self._deadline):
                found = await self._pieces.get()
        except TimeoutError:
            raise late() from None
        if isinstance(found, Broken):
            audit.say(f"error: {audit.told(found)}")
            raise ApiError(500, f"{found}.", code="engine")
        return found

    async def _watch(self, http: HttpRequest) -> None:
        """Cancels the text when the client leaves."""
        await left(http)
        http.state.record["status"] = audit.GONE
        self.stream.cancel()


async def left(http: HttpRequest) -> None:
    """Returns when the client has gone. Of a request whose body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def event_stream(
    answer: Answer, write: Callable[[Answer], AsyncIterator[str]], fail: Callable[[ApiError], str], http: HttpRequest
) -> StreamingResponse:
    """Server-sent events of an answer. An error amid them is an event, for the status has long been sent."""

    async def events() -> AsyncIterator[str]:
        done = False
        try:
            async for event in write(answer):
                yield event
            done = True
        except ApiError as error:
            http.state.record["status"] = error.status_code
            done = True
            yield fail(error)
        finally:
            answer.stream.cancel()
            if not done:
                http.state.record["status"] = audit.GONE

    return StreamingResponse(events(), media_type="text/event-stream")


async def texts(answer: Answer) -> AsyncIterator[tuple[str, Piece]]:
    """Pieces with their text, without the blank that a text begins with."""
    begun = False
    async for piece in answer:
        text = piece.text if begun else piece.text.lstrip()
        begun = begun or bool(text)
        yield text, piece
