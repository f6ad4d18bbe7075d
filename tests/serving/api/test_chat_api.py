"""OpenAI's own client against the server."""

import base64
import json
from typing import Any

import httpx2 as httpx
import pytest
from pydantic import ValidationError

from rad_jax.serving import films
from rad_jax.serving.chat_api import ChatRequest
from rad_jax.serving.errors import ApiError, described

openai = pytest.importorskip("openai")

MODEL = "scripted"


def asked(text="What is there?", *urls):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_text_and_one_image(plain, made):
    film = made.grey(200)
    messages = asked("What is there?", data_url(made.png(film)))
    answer = plain.client().chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == made.said(film)
    assert answer.choices[0].finish_reason == "stop" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage.prompt_tokens > 4 and usage.completion_tokens > 10
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    plain_text = plain.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], user="me", n=1, seed=3, temperature=0
    )
    assert plain_text.choices[0].message.content == made.said(None)


def test_a_dicom_as_the_image(plain, made):
    answer = plain.client().chat.completions.create(
        model=MODEL, messages=asked("?", data_url(made.dicom(), "application/dicom"))
    )
    assert answer.choices[0].message.content.startswith("the lungs")


def test_streaming(plain, made):
    film = made.grey(130)
    messages = asked("?", data_url(made.png(film)))
    with plain.client().chat.completions.create(
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == made.said(film)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len(chunks) > 10 and chunks[-1].usage.completion_tokens > 10 and not chunks[-1].choices
    assert len({c.id for c in chunks}) == 1


def test_the_stream_on_the_wire(plain):
    body = {"model": MODEL, "messages": asked(), "stream": True}
    answer = httpx.post(f"{plain.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_length_and_stop(plain):
    client = plain.client().chat.completions
    cut = client.create(model=MODEL, messages=asked(), max_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2
    assert client.create(model=MODEL, messages=asked(), max_completion_tokens=2).usage.completion_tokens == 2
    stopped = client.create(model=MODEL, messages=asked(), stop=["film"])
    assert stopped.choices[0].message.content == "no" and stopped.choices[0].finish_reason == "stop"


def test_models(plain):
    assert [model.id for model in plain.client().models.list()] == [MODEL]
    assert plain.client().models.retrieve(MODEL).owned_by == "rad_jax"
    with pytest.raises(openai.NotFoundError):
        plain.client().models.retrieve("gpt")


PIXEL = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "gpt"}, 404, "no such model"),
        ({"messages": []}, 400, "one message"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, 400, "one message"),
        ({"messages": asked("?") * 2}, 400, "one message"),
        ({"messages": asked("?", PIXEL, PIXEL)}, 400, "2 images"),
        ({"messages": asked(" ")}, 400, "no text"),
        ({"messages": asked("x" * 4001)}, 400, "4000 characters"),
        ({"messages": asked("?", "https://example.org/film.png")}, 400, "data: URL"),
        ({"messages": asked("?", "file:///etc/passwd")}, 400, "data: URL"),
        ({"messages": asked("?", "/etc/passwd")}, 400, "data: URL"),
        ({"messages": asked("?", "data:image/png,abc")}, 400, "data: URL"),
        ({"messages": asked("?", "data:image/png;base64,!!!")}, 400, "base64"),
        ({"messages": asked("?", PIXEL)}, 400, "damaged"),
        ({"messages": asked("?", "data:image/png;base64,aGVsbG8=")}, 400, "not a PNG, JPEG or DICOM"),
        ({"n": 2}, 400, "n:"),
        ({"max_tokens": 513}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"seed": -1}, 400, "seed"),
        ({"stop": [""]}, 400, "stop"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"extra_body": {"NAME^PATIENT": 1}}, 400, "does not know"),
        ({"extra_body": {"metadata": {"NAME^PATIENT": 1}}}, 400, "metadata: Input should"),
        ({"messages": [{"role": "user", "content": [{"type": "NAME^PATIENT"}]}]}, 400, "messages.0.content"),
    ],
)
def test_refusals_have_openais_shape(plain, change, status, said):
    with pytest.raises(openai.APIStatusError) as caught:
        plain.client().chat.completions.create(**{"model": MODEL, "messages": asked(), **change})
    assert caught.value.status_code == status
    error = caught.value.response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert said in error["message"] and "PATIENT" not in caught.value.response.text
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "MARKED"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "MARKED": "MARKED"}]}]}, "messages"),
        ({"messages": [{"role": "MARKED", "content": {"MARKED": "MARKED"}, "MARKED": 1}]}, "messages"),
        ({"metadata": {"MARKED": {"MARKED": 1}}}, "metadata"),
        ({"stop": {"MARKED": "MARKED"}, "response_format": {"type": "MARKED"}}, None),
        ({"stream_options": {"include_usage": "MARKED"}, "n": "MARKED", "MARKED": "MARKED"}, None),
    ],
)
def test_no_problem_is_told_in_the_clients_words(change, where):
    """Each of those found is told as if it were the first, so that their order does not matter."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": MODEL, "messages": asked(), **change})
    problems: list[Any] = [{**problem, "loc": ("body", *problem["loc"])} for problem in caught.value.errors()]
    assert "MARKED" in str(problems)
    for problem in problems:
        param, message = described([problem])
        assert "MARKED" not in f"{param} {message}"
        assert where is None or param is None or param.split(".")[0] == where


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"temperature": NaN}', "application/json"),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "\\ud800"}]}', "application/json"),
        (b"model=scripted", "application/x-www-form-urlencoded"),
        (b"", "application/json"),
    ],
)
def test_bodies_that_are_no_request(plain, body, kind):
    answer = httpx.post(f"{plain.url}/v1/chat/completions", content=body, headers={"content-type": kind})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_paths_and_methods_have_the_same_shape(plain):
    for answer in (httpx.get(f"{plain.url}/v1/nothing"), httpx.get(f"{plain.url}/v1/findings")):
        assert answer.status_code in (404, 405) and answer.json()["error"]["message"]


def test_base64_is_decoded_in_parts(monkeypatch):
    monkeypatch.setattr(films, "BASE64", 8)
    for size in range(20):
        assert films.from_url(data_url(bytes(range(size)))) == bytes(range(size))
    with pytest.raises(ApiError, match="base64 is damaged"):
        films.from_url("data:image/png;base64,AAAAAAA=AAAA")
