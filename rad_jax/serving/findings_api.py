"""/v1/findings, a film and the reason for the exam in, findings out; and /v1/film, the same film for a viewer."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, File, Form, UploadFile
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from rad_jax import prompts
from rad_jax.serving import films, limits
from rad_jax.serving.chat_api import Usage
from rad_jax.serving.engine import Piece, Request
from rad_jax.serving.errors import ApiError, error_body, responses
from rad_jax.serving.films import Film
from rad_jax.serving.service import Answer, Service, event_stream, texts


class Warned(BaseModel):
    code: str
    message: str


class FilmInfo(BaseModel):
    kind: Literal["dicom", "png", "jpeg"]
    view: Literal["frontal", "lateral", "unknown"]
    height: int
    width: int
    seen: Annotated[
        list[float], Field(description="The square [x0, y0, x1, y1] that the model sees, in pixels of the film.")
    ]


class Attention(BaseModel):
    """Where one token looked, over `seen`: rows of patches from the top, each value in 255ths of `peak`, as base64 of bytes."""

    rows: int
    columns: int
    peak: Annotated[float, Field(description="Share of the attention on the strongest patch; all patches add up to 1.")]
    map: str


class Token(BaseModel):
    text: str
    attention: Attention | None


class Findings(BaseModel):
    id: str
    findings: str
    finish_reason: Literal["stop", "length"]
    model: str
    version: str
    bundle: Annotated[str, Field(description="SHA-256 of the bundle's manifest.")]
    film: FilmInfo
    warnings: list[Warned]
    usage: Usage
    tokens: Annotated[list[Token] | None, Field(description="With `attention`: the pieces of the text.")] = None


STREAM = """Server-sent events, when `stream` is true:

    event: start   data: {id, model, version, bundle, film, warnings}
    event: piece   data: {text, attention}          attention is null unless asked for
    event: done    data: {findings, finish_reason, usage, warnings}
    event: error   data: {error}                    in place of done"""


def router(service: Service) -> APIRouter:
    """The routes, over one service."""
    routes, info = APIRouter(tags=["findings"]), service.engine.info

    @routes.post(
        "/v1/findings",
        response_model=Findings,
        responses={
            200: {"content": {"text/event-stream": {"schema": {"type": "string", "description": STREAM}}}},
            **responses(400, 401, 403, 408, 413, 429, 500, 503, 504),
        },
    )
    async def findings(
        http: HttpRequest,
        file: Annotated[UploadFile, File(description="A DICOM, PNG or JPEG of one frontal chest film.")],
        indication: Annotated[str | None, Form(max_length=limits.REASON, description="Reason for the exam.")] = None,
        max_new_tokens: Annotated[int, Form(ge=1, le=limits.NEW_TOKENS)] = limits.DEFAULT_NEW_TOKENS,
        attention: Annotated[bool, Form(description="Also tell where each token looked.")] = False,
        stream: Annotated[bool, Form(description="Answer with server-sent events as the text is written.")] = False,
    ) -> Response:
        """Writes the findings section for one film, greedily. Not for clinical use."""
        service.check()
        film = await service.film(await file.read(), http)
        question = prompts.question(indication)
        answer = await service.ask(Request(film.pixels, question, max_new_tokens, attention=attention), http)
        head = {
            "id": f"findings-{http.state.request}",
            "model": info.name,
            "version": info.version,
            "bundle": info.bundle_sha256,
            "film": described(film, info.image_size),
        }
        if stream:
            return event_stream(answer, lambda a: events(a, head, film), failed, http)
        pieces = await answer.whole(http)
        tokens = {"tokens": [{"text": p.text, "attention": packed(p)} for p in pieces]} if attention else {}
        return JSONResponse({**head, **ending(answer, film, "".join(piece.text for piece in pieces)), **tokens})

    @routes.post(
        "/v1/film",
        response_class=Response,
        responses={
            200: {
                "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
                "headers": {
                    "X-Film-Height": {"description": "Of the film, in pixels.", "schema": {"type": "integer"}},
                    "X-Film-Width": {"description": "Of the film, in pixels.", "schema": {"type": "integer"}},
                    "X-Film-Black": {
                        "description": "Value that its window shows black.",
                        "schema": {"type": "integer"},
                    },
                    "X-Film-White": {
                        "description": "Value that its window shows white.",
                        "schema": {"type": "integer"},
                    },
                },
            },
            **responses(400, 401, 403, 408, 413, 429, 500, 503, 504),
        },
    )
    async def film(
        http: HttpRequest, file: Annotated[UploadFile, File(description="A DICOM, PNG or JPEG of one film.")]
    ) -> Response:
        """The film as a 16-bit grey PNG: modality LUT applied, MONOCHROME1 inverted, no window, at most 2,048 pixels a side."""
        service.check()
        preview = await service.preview(await file.read(), http)
        (height, width), (black, white) = preview.shape, preview.window
        told = {"Height": height, "Width": width, "Black": black, "White": white}
        headers = {f"X-Film-{name}": str(value) for name, value in told.items()}
        return Response(preview.png, media_type="image/png", headers=headers)

    return routes


def described(film: Film, size: int) -> dict[str, Any]:
    height, width = film.pixels.shape
    seen = films.seen((height, width), size)
    return {"kind": film.kind, "view": film.view, "height": height, "width": width, "seen": seen}


def warned(codes: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"code": code, "message": films.MESSAGES[code]} for code in codes]


def ending(answer: Answer, film: Film, text: str) -> dict[str, Any]:
    """What is known of an answer once it has ended."""
    cut = ("cut_off",) if answer.stream.finish_reason == "length" else ()
    return {
        "findings": text.strip(),
        "finish_reason": answer.stream.finish_reason,
        "usage": answer.usage(),
        "warnings": warned((*film.warnings, *cut)),
    }


def packed(piece: Piece) -> dict[str, Any] | None:
    """A map float32 [p, p] as `Attention`."""
    if piece.attention is None:
        return None
    peak = float(piece.attention.max())
    shares = np.rint(piece.attention / max(peak, 1e-9) * 255).astype(np.uint8)
    rows, columns = shares.shape
    return {"rows": rows, "columns": columns, "peak": peak, "map": base64.b64encode(shares.tobytes()).decode()}


async def events(answer: Answer, head: dict[str, Any], film: Film) -> AsyncIterator[str]:
    yield event("start", {**head, "warnings": warned(film.warnings)})
    whole = ""
    async for text, piece in texts(answer):
        whole += text
        yield event("piece", {"text": text, "attention": packed(piece)})
    yield event("done", ending(answer, film, whole))


def event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def failed(error: ApiError) -> str:
    return event("error", error_body(error.status_code, error.detail, error.code))
