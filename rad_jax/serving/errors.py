"""Errors of the server, in the shape of OpenAI's: {"error": {"message", "type", "param", "code"}}.

No message repeats what the client sent.
"""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from rad_jax.errors import UserError


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refusal. It is Starlette's exception, so that FastAPI lets it through where it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        headers = {"Retry-After": str(retry_after)} if retry_after else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not waited for
        super().__init__(status, message, headers or None)
        self.code, self.param = code, param


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: HTTPException) -> JSONResponse:
    code, param = getattr(error, "code", None), getattr(error, "param", None)
    return JSONResponse(error_body(error.status_code, error.detail, code, param), error.status_code, error.headers)


def install(app: FastAPI) -> None:
    """Gives every refusal of the app that shape."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(error)

    async def unusable(_: Request, error: Exception) -> JSONResponse:
        return error_response(ApiError(400, str(error), code="invalid_value"))

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        where, message = described(error.errors())
        forget(error)
        return error_response(ApiError(400, message, code="invalid_value", param=where))

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(UserError, unusable)
    app.add_exception_handler(RequestValidationError, invalid)


def forget(error: BaseException | None) -> None:
    """Cuts exceptions from the frames that raised them, which hold them in turn, and with them a body of up to 50 MB."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def described(problems: Iterable[dict[str, Any]]) -> tuple[str | None, str]:
    """Where the first problem that pydantic found lies, and what it is; the value itself, and names the client made up, are left out."""
    first = next(iter(problems))
    if first["type"] == "extra_forbidden":
        return None, "the request has a parameter that this server does not know: leave it out (see /openapi.json)."
    places = [str(part) for part in first["loc"][1:]]
    if places[:1] == ["metadata"]:
        places = places[:1]  # what follows is a key of the client's
    where = ".".join(places) or None
    if first["type"] == "json_invalid":
        return None, "the request is no valid JSON."
    if first["type"] == "union_tag_invalid":  # whose message quotes the tag
        return where, f"{where or 'the request'}: its type is none of those that this server knows (see /openapi.json)."
    return where, f"{where or 'the request'}: {first['msg']}."


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's documentation."""
    return {status: {"model": Error} for status in statuses}
