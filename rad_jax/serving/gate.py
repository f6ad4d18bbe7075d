"""The gate that counts a request's bytes while they arrive, and the end of a connection whose answer is not read."""

import asyncio
import dataclasses

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rad_jax.serving import limits
from rad_jax.serving.errors import ApiError, error_response


@dataclasses.dataclass
class Unread:
    """ASGI middleware: a client that leaves its answer unread when the request's `seconds` are over is taken for one that has gone.

    Sending waits while what was sent before is not read. `scope["state"]["abort"]`, of `app.Connection`, cuts such a connection; for those
    within this is a client that has left, and the wait is over.
    """

    app: ASGIApp
    seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        abort = scope.get("state", {}).get("abort")
        if scope["type"] != "http" or abort is None:
            return await self.app(scope, receive, send)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.seconds

        async def within(message: Message) -> None:
            timer = loop.call_at(deadline, abort)
            try:
                await send(message)  # of one that need not wait the timer never rings
            finally:
                timer.cancel()

        await self.app(scope, receive, within)


@dataclasses.dataclass
class BodyGate:
    """ASGI middleware: refuses a body over `BODY` before, or while, it arrives; one that dawdles; and all when `BODIES` are held."""

    app: ASGIApp
    held: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(announced) if announced.isdigit() else 0
        if refusal := self.refusal(size, size):
            return await error_response(refusal)(scope, receive, _lingering(send))
        body = _Body(self, receive)

        async def answer(message: Message) -> None:
            await (_lingering(send) if body.refused else send)(message)

        body.hold(size)
        try:
            await self.app(scope, body.receive, answer)
        finally:
            self.held -= body.size

    def refusal(self, size: int, more: int) -> ApiError | None:
        """Why a body of this size, of which so many bytes are not held yet, cannot be taken; None if it can."""
        if size > limits.BODY:
            return ApiError(413, f"the request is larger than {limits.megabytes(limits.BODY)}.", code="too_large")
        if self.held + more > limits.BODIES:
            return ApiError(429, "too many large requests at once: try again.", code="busy", retry_after=1)
        return None


def _lingering(send: Send) -> Send:
    """Waits between an answer and its end, at which the connection is closed, because nobody reads the rest of the request: a client that is
    still sending finds the answer whole before it finds that."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            await send({**message, "more_body": True})
            await asyncio.sleep(limits.LINGER_SECONDS)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    return sent


class _Body:
    """One request's body: counts it, and gives it `BODY_SECONDS`."""

    def __init__(self, gate: BodyGate, receive: Receive):
        self.size, self._gate, self._receive = 0, gate, receive
        self._arrived, self._whole, self.refused = 0, False, False
        self._deadline = asyncio.get_running_loop().time() + limits.BODY_SECONDS

    def hold(self, size: int) -> None:
        self.size += size
        self._gate.held += size

    async def receive(self) -> Message:
        if self._whole:  # what comes now is the client's going away
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time.", code="timeout") from None
        self._arrived += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        more = self._arrived - self.size  # sent in chunks, without its length
        if more > 0:
            if refusal := self._gate.refusal(self._arrived, more):
                self.refused = True
                raise refusal
            self.hold(more)
        return message
