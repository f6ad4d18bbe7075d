"""Who may use the server: addresses, bearer tokens kept as hashes, and the guard before every route."""

import dataclasses
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from rad_jax.errors import UserError
from rad_jax.serving.audit import is_torn
from rad_jax.serving.errors import ApiError, error_response

# Without a token they tell nothing but that the server is there, whether it is ready, and how to ask it.
OPEN = {"/", "/healthz", "/readyz", "/openapi.json"}


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_bind(host: str, tokens: Mapping[str, str] | None) -> None:
    """Refuses to be reached from elsewhere by anybody.

    Raises:
        UserError: the address is not this machine's own, and there are no tokens.
    """
    if not is_loopback(host) and not tokens:
        raise UserError(
            f"--host={host} can be reached from other machines: make a token first (--tokens=FILE --add_token=NAME), and give --tokens."
        )


def read_tokens(path: Path) -> dict[str, str]:
    """Names by the SHA-256 of their tokens, of lines "NAME HASH".

    Raises:
        UserError: there is no such file, no token in it, or a line of another kind.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): make a token with --add_token=NAME.") from error
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not (match := re.fullmatch(r"([\w.-]{1,64}) ([0-9a-f]{64})", line.strip())):
            raise UserError(f"{path}: line {number} is not a name and the SHA-256 of a token.")
        found[match[2]] = match[1]
    if not found:
        raise UserError(f"{path} holds no token: make one with --add_token=NAME.")
    return found


def add_token(path: Path, name: str) -> str:
    """Makes a token, adds its hash to the file, and returns it: it can be shown this once only.

    It has 256 random bits, so that a plain hash cannot be searched.

    Raises:
        UserError: the name cannot be used, or is there already.
    """
    if not re.fullmatch(r"[\w.-]{1,64}", name):
        raise UserError("the name of a token has 1 to 64 letters, digits, dots, dashes and underscores.")
    if path.exists() and path.stat().st_size and name in read_tokens(path).values():
        raise UserError(f"{path} has a token named {name} already: delete its line first.")
    token = f"rad_{secrets.token_urlsafe(32)}"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
        file.write("\n" * is_torn(path) + f"{name} {digest(token)}\n")
    return token


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def name_of(token: str, tokens: Mapping[str, str]) -> str | None:
    """Whose token it is; takes as long for every one."""
    given, found = digest(token), None
    for known, name in tokens.items():
        if hmac.compare_digest(given, known):
            found = name
    return found


@dataclasses.dataclass
class Guard:
    """ASGI middleware: tells who asks, before any of the body is read; `scope["state"]["trusted"]` is whether it may know all.

    Without tokens the server is for this machine alone, and only names of this machine may stand in Host: a page from elsewhere, open in
    a browser here, must not reach it by making its own name point here. Nor may such a page post to it (Origin).
    """

    app: ASGIApp
    tokens: Mapping[str, str] | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            return await error_response(refusal)(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.tokens is None:
            host, origin = headers.get(b"host", ""), headers.get(b"origin")
            if not is_loopback(_split(f"//{host}").hostname or ""):
                return ApiError(403, "this server is for this machine alone: ask it by 127.0.0.1 or localhost.")
            if origin is not None and _split(origin).netloc != host:
                return ApiError(403, "another site's page may not use this server.")
            return None
        kind, _, token = headers.get(b"authorization", "").partition(" ")
        name = name_of(token.strip(), self.tokens) if kind.lower() == "bearer" else None
        if name is None and scope["path"] not in OPEN:
            return ApiError(401, "a valid token is needed: Authorization: Bearer TOKEN.", code="invalid_api_key")
        scope["state"].update(who=name, trusted=name is not None)
        return None


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
