"""/v1/chat/completions and /v1/models, as OpenAI's clients speak them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from rad_jax.serving import films, limits
from rad_jax.serving.engine import Request
from rad_jax.serving.errors import ApiError, error_body, responses
from rad_jax.serving.service import Answer, Service, event_stream, texts

DONE = "data: [DONE]\n\n"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ImageUrl(Strict):
    url: Annotated[str, Field(description="data:image/png;base64,... (PNG, JPEG or DICOM)")]
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["user", "system", "developer", "assistant", "tool"]
    content: str | list[Part]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    """What can change the answer is done or refused, never passed over; `user`, `metadata` and `store` change nothing."""

    model: str
    messages: Annotated[
        list[Message],
        Field(
            description="One message of the user: text, and one image at most.",
            json_schema_extra={"minItems": 1, "maxItems": 1},  # `content` says more than pydantic would
        ),
    ]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=limits.NEW_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=limits.NEW_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = 0
    stop: (
        Annotated[str, Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=4)]
        | None
    ) = None
    n: Literal[1] | None = 1
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    logprobs: Literal[False] | None = False
    response_format: TextFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = False


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class Choice(BaseModel):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


def router(service: Service) -> APIRouter:
    """The routes, over one service."""
    routes, info = APIRouter(tags=["OpenAI"]), service.engine.info
    card = {"id": info.name, "object": "model", "created": int(time.time()), "owned_by": "rad_jax"}

    @routes.get("/v1/models", response_model=Models, responses=responses(401, 403))
    async def models() -> Any:
        return {"object": "list", "data": [card]}

    @routes.get("/v1/models/{model}", response_model=ModelCard, responses=responses(401, 403, 404))
    async def model(model: str) -> Any:
        check_model(model, info.name)
        return card

    @routes.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
            **responses(400, 401, 403, 404, 408, 413, 429, 500, 503, 504),
        },
    )
    async def complete(body: ChatRequest, http: HttpRequest) -> Response:
        """Answers one message. With `stream`, server-sent events that end in `data: [DONE]`."""
        check_model(body.model, info.name)
        service.check()
        question, url = content(body.messages)
        image = None
        if url is not None:
            image = (await service.film(await asyncio.to_thread(films.from_url, url), http)).pixels
        answer = await service.ask(to_request(body, question, image), http)
        head = {
            "id": f"chatcmpl-{http.state.request}",
            "created": int(time.time()),
            "model": info.name,
            "system_fingerprint": info.bundle_sha256[:16],
        }
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return event_stream(answer, lambda a: chunks(a, head, with_usage), failed, http)
        text = "".join(piece.text for piece in await answer.whole(http)).strip()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": answer.stream.finish_reason,
        }
        return JSONResponse({"object": "chat.completion", **head, "choices": [choice], "usage": answer.usage()})

    return routes


def check_model(asked: str, name: str) -> None:
    if asked != name:
        raise ApiError(404, f"there is no such model here, only {name!r}.", code="model_not_found", param="model")


def content(messages: list[Message]) -> tuple[str, str | None]:
    """The text of the one message, its parts on lines of their own, and the URL of its image.

    Raises:
        ApiError: another number of messages or images, another role, no text, or too much.
    """

    def refuse(message: str) -> ApiError:
        return ApiError(400, message, code="invalid_value", param="messages")

    if len(messages) != 1 or messages[0].role != "user":
        raise refuse(
            "messages must be one message of the user: the model was trained on single questions, under a fixed system prompt."
        )
    parts = messages[0].content
    if isinstance(parts, str):
        parts = [TextPart(type="text", text=parts)]
    urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    question = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    if len(urls) > 1:
        raise refuse(f"messages hold {len(urls)} images: the model sees one film at a time.")
    if not question.strip():
        raise refuse("messages hold no text: ask something of the film.")
    if len(question) > limits.QUESTION:
        raise refuse(f"messages hold more than {limits.QUESTION} characters of text.")
    return question, urls[0] if urls else None


def to_request(body: ChatRequest, question: str, image: Any) -> Request:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Request(
        film=image,
        question=question,
        max_new_tokens=body.max_completion_tokens or body.max_tokens or limits.DEFAULT_NEW_TOKENS,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed or 0,
        stop=tuple(stop),
    )


async def chunks(answer: Answer, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    """Events of a streamed answer, as OpenAI's."""

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        usage = {"usage": None} if with_usage else {}
        return (
            f"data: {json.dumps({'object': 'chat.completion.chunk', **head, 'choices': choices, **usage, **more})}\n\n"
        )

    def choice(delta: dict[str, str], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": reason}]

    yield chunk(choice({"role": "assistant", "content": ""}))
    async for text, _ in texts(answer):
        if text:
            yield chunk(choice({"content": text}))
    yield chunk(choice({}, answer.stream.finish_reason))
    if with_usage:
        yield chunk([], usage=answer.usage())
    yield DONE


def failed(error: ApiError) -> str:
    return f"data: {json.dumps(error_body(error.status_code, error.detail, error.code))}\n\n"
