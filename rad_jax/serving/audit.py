"""Two records of what was asked: the access log, one line of stdout a request, and the audit log, a file of JSON lines.

Neither holds anything of a patient: no text, no file name, no tag of a DICOM, no path that is not a route, no query. A film is told by the
SHA-256 of its decoded pixels: the 8 bits that a model sees, or the 16 bits of /v1/film.
"""

import asyncio
import dataclasses
import datetime
import json
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rad_jax.errors import UserError
from rad_jax.serving.errors import ApiError, error_response

ROUTES = {"/v1/chat/completions", "/v1/findings", "/v1/film"}  # those that films and texts are sent to
GONE = 499  # the client went away before it had its answer (nginx's number)


class Audit:
    """The audit log: a file that is only added to, a whole line at a time. `broken` once a line has been lost, and for good."""

    def __init__(self, path: Path | None, **always: str):
        self._always, self._file, self.broken, self._torn = always, -1, False, False
        if path:
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                self._torn = is_torn(path)
            except OSError as error:
                raise UserError(f"{path}: the audit log cannot be written ({error.strerror}).") from error

    def write(self, **fields: Any) -> None:
        """Adds a line; once that has failed, no further request is answered (`check`), though its line is still tried."""
        if self._file < 0:
            return
        line = ("\n" if self._torn else "") + json.dumps({"time": now(), **fields, **self._always}) + "\n"
        reason = "only a part of a line"
        try:
            written = os.write(self._file, line.encode())
        except OSError as error:
            written, reason = 0, error.strerror or type(error).__name__
        if written == len(line):
            self._torn = False
            return
        self._torn = self._torn or written > 0
        self.broken = True
        say(f"error: the audit log cannot be written ({reason})")

    def check(self) -> None:
        """Raises ApiError where a line could not be written: until a restart, so that somebody looks at what was lost."""
        if self.broken:
            raise ApiError(
                503,
                "a line of the audit log was lost: tell those who run this server, to start it again.",
                code="audit",
            )

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_torn(path: Path) -> bool:
    """Whether a file ends amid a line, which a process, or a disk, that ended while it was written has left."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def film_fields(sha256: str, shape: Sequence[int], data: bytes) -> dict[str, Any]:
    """What both logs may know of a film: hash of its pixels [Y, X], and how large it and its file `data` are."""
    return {"film": sha256, "film_shape": list(shape), "film_bytes": len(data)}


@dataclasses.dataclass
class Recorder:
    """ASGI middleware around all that answers: gives each request an id, writes both logs, and turns a crash into a 500 that tells nothing.

    `scope["state"]["record"]` is what a route adds to the audit log's line, and `["began"]` the loop's time when the request came. `seen` gets each request's route, status and seconds.
    """

    app: ASGIApp
    audit: Audit
    seen: Callable[[str, int, float], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, start = uuid.uuid4().hex, time.perf_counter()
        record: dict[str, Any] = {}
        began = asyncio.get_running_loop().time()
        scope["state"] = {
            **scope.get("state", {}),
            "request": request,
            "record": record,
            "who": None,
            "trusted": True,
            "began": began,
        }
        status = sent = 0

        async def count(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *fixed_headers(request)]}
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, count)
        except HTTPException as error:
            if not status:
                await error_response(error)(scope, receive, count)
        except Exception as error:
            say(f"error: request {request}: {told(error)}")
            if not status:
                await error_response(ApiError(500, f"the server failed (request {request})."))(scope, receive, count)
        finally:
            self._write(scope, record, status or GONE, sent, time.perf_counter() - start)

    def _write(self, scope: Scope, record: dict[str, Any], status: int, sent: int, seconds: float) -> None:
        state, route = scope["state"], getattr(scope.get("route"), "path", None)
        status = record.pop("status", status)
        # Refused before it was routed: told if it is one of ours, and not if it is whatever the client made up.
        route = route or (scope["path"] if scope["path"] in ROUTES else "-")
        self.seen(route, status, seconds)
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "-"
        who = state["who"] or "-"
        print(f"{now()} {state['request']} {who} {method} {route} {status} {sent} B {seconds:.3f} s", flush=True)
        if route in ROUTES:
            fields = {"request": state["request"], "token": state["who"], "route": route, "status": status, **record}
            self.audit.write(**fields, sent=sent, seconds=round(seconds, 4))


def fixed_headers(request: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-request-id", request.encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]


def told(error: BaseException) -> str:
    """Kind and place of an exception; not its message, nor any value, which may hold what a client sent."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return f"{type(error).__name__} at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
