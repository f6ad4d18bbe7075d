"""What is left of the server when the model fails: a request, or all of it, with a reason and a status that says so."""

import asyncio
import math

import httpx2 as httpx
import pytest

from rad_jax.serving.app import Settings, create_app
from rad_jax.serving.engine import FAILURES, Broken, Request

CUDA = "CUDA error: an illegal memory access was encountered"


def broken(*_):
    raise RuntimeError(CUDA)


def two_and_one(engine, model, made):
    """A short text in the first slot, a long one in the second, and one that waits; held before their first step."""
    model.go.clear()
    films = (None, made.grey(250), None)
    with engine._lock:  # all at once: the worker would take in the first alone, and be held with it
        streams = [engine.submit(Request(film, "Hello")) for film in films]
    assert made.until(lambda: engine.stats()["running"] == 2)
    return streams


@pytest.mark.parametrize("cancel", [False, True], ids=["ended", "cancelled"])
@pytest.mark.parametrize("message", ["no room", CUDA])
def test_an_error_between_steps_leaves_nobody_waiting(scripted, made, message, cancel):
    """Where a row has left and another is moved to its place."""
    engine, model = scripted()
    streams = two_and_one(engine, model, made)
    move = model.move

    def fail(*_):
        model.move = move
        raise RuntimeError(message)

    model.move = fail
    if cancel:
        streams[0].cancel()
    model.go.set()
    for stream in streams[:1] if not cancel else []:
        with pytest.raises(Broken, match="RuntimeError"):
            list(stream)
    with pytest.raises(Broken, match="RuntimeError"):
        list(streams[1])
    if message == CUDA:
        with pytest.raises(Broken, match="the device failed"):
            list(streams[2])
        assert engine.failed == "the device failed (RuntimeError)"
        with pytest.raises(Broken, match="the device failed"):
            engine.submit(Request(None, "Hello"))
    else:
        assert "".join(piece.text for piece in streams[2]).strip() == "no film." and engine.failed is None
        assert "".join(piece.text for piece in engine.submit(Request(None, "Hello"))).strip() == "no film."


def test_failures_in_a_row_end_the_engine_and_others_do_not(scripted):
    engine, model = scripted()
    for times in (FAILURES - 1, FAILURES):
        model.broken = True
        for _ in range(times):
            assert engine.failed is None
            with pytest.raises(Broken):
                list(engine.submit(Request(None, "Hello")))
        model.broken = False
        if times < FAILURES:
            assert list(engine.submit(Request(None, "Hello")))
    assert engine.failed == f"the engine failed {FAILURES} times in a row (RuntimeError)"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_overflow_end_their_row_alone(scripted, made, bad):
    engine, model = scripted()
    step, spoilt = model.step, list[float]()

    def spoil(rows):
        logits, maps = step(rows)
        logits[:, -1] = -math.inf  # as an id that is suppressed
        if not spoilt:
            logits[0, 3] = bad
            spoilt.append(bad)
        return logits, maps

    model.step = spoil
    short, long, _ = two_and_one(engine, model, made)
    model.go.set()
    with pytest.raises(Broken, match="overflowed in float32"):
        list(short)
    assert "".join(piece.text for piece in long).strip() == made.said(made.grey(250))
    assert engine.failed is None


def test_readiness_says_why_the_engine_has_failed(scripted):
    engine, model = scripted()
    app = create_app(engine, Settings())
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            before = await client.get("/readyz")
            model.step = broken
            failed = await client.post("/v1/chat/completions", json=body)
            return before, failed, await client.get("/readyz"), await client.post("/v1/chat/completions", json=body)

    before, failed, *after = asyncio.run(ask())
    assert (before.status_code, failed.status_code) == (200, 500)
    for answer in after:
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine"
        assert answer.json()["error"]["message"].startswith("the device failed (RuntimeError)")
    app.state.service.close()
