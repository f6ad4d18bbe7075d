"""The engine: what it writes is what transformers and JAX write, in any company; and how requests come and go."""

import functools
import threading

import numpy as np
import pytest
import torch

from rad_jax.errors import UserError
from rad_jax.prompts import question
from rad_jax.serving import loading, reference
from rad_jax.serving.engine import Full, Request

KINDS = ("dinov2", "vit", "clip", "siglip")


def written(stream):
    pieces = list(stream)
    return [piece.token for piece in pieces], "".join(piece.text for piece in pieces)


def asked(example, **changes):
    return [Request(image, question(indication), **changes) for image, indication in example.studies]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_transformers_alone_and_in_company(kind, bundle, engine):
    example, folder = bundle(kind)
    theirs, ours = reference.load(folder), engine(kind)
    lengths = (5, 40, 23)

    def expected(study, length):
        image, indication = study
        ids = theirs.greedy(theirs.prompt(image, indication), image, length)
        return ids, theirs.text(ids)

    alone = [written(ours.submit(request)) for request in asked(example, max_new_tokens=40)]
    assert alone == [expected(study, 40) for study in example.studies]
    together = [ours.submit(r) for n in lengths for r in asked(example, max_new_tokens=n)]
    found = [written(stream) for stream in together]
    assert found == [expected(study, n) for n in lengths for study in example.studies]
    for stream, (ids, _), length in zip(together, found, [n for n in lengths for _ in example.studies], strict=True):
        ended = ids[-1] in ours._eos
        assert stream.finish_reason == ("stop" if ended else "length") and (ended or len(ids) == length)
    assert ours.stats()["tokens_total"] == sum(len(ids) for ids, _ in alone + found)


def test_films_that_are_decoded_get_cores_of_their_own(bundle, monkeypatch):
    """The threads of a step are those that PyTorch has, without one for each film; one stays."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    ours = loading.load(bundle()[1], device="cpu", say=lambda _: None)
    torch.set_num_threads(before)
    used: list[int] = []
    step = ours._model.step

    def counted(rows):
        used.append(torch.get_num_threads())
        return step(rows)

    monkeypatch.setattr(ours._model, "step", counted)
    for others in (0, 1, 5, 0):
        ours.others = functools.partial(int, others)
        written(ours.submit(Request(None, "heart?", 2)))
    ours.close()
    assert used == [3, 2, 1, 3] and torch.get_num_threads() == before


def test_prompts_have_the_tokens_that_transformers_gives_them(bundle, engine):
    example, folder = bundle()
    theirs, ours = reference.load(folder), engine()
    for image, indication in example.studies:
        stream = ours.submit(Request(image, question(indication), max_new_tokens=1))
        assert stream.prompt_tokens == len(theirs.prompt(image, indication))


def test_a_full_queue_says_so_and_a_cancelled_request_makes_room(bundle, engine):
    example, _ = bundle()
    ours = engine(slots=1, queue=1)
    go, step = threading.Event(), ours._model.step
    ours._model.step = lambda rows: (go.wait(60), step(rows))[1]
    request = asked(example, max_new_tokens=10_000)[0]
    first = ours.submit(request)
    next(iter(first))  # it is in the slot, before its second token
    second = ours.submit(request)
    with pytest.raises(Full) as full:
        ours.submit(request)
    assert full.value.retry_after >= 1
    second.cancel()
    first.cancel()
    go.set()
    assert list(second) == [] and second.finish_reason == "cancelled"
    assert len(list(first)) <= 1 and first.finish_reason == "cancelled"  # the step that was under way
    assert written(ours.submit(asked(example, max_new_tokens=3)[0]))[0]


def test_a_row_that_is_full_ends(bundle, engine):
    example, _ = bundle("vit")
    ours = engine("vit")
    streams = [ours.submit(request) for request in asked(example, max_new_tokens=10_000)]
    for stream in streams:
        tokens, _ = written(stream)
        assert stream.finish_reason == "stop" or stream.prompt_tokens + len(tokens) - 1 == ours.info.max_tokens


def test_many_threads_get_their_own_texts(bundle, engine):
    example, _ = bundle()
    ours = engine(slots=3)
    requests = [r for n in (3, 9, 17, 30) for r in asked(example, max_new_tokens=n)]
    expected = [written(ours.submit(request)) for request in requests]
    found = [None] * len(requests)

    def ask(i):
        found[i] = written(ours.submit(requests[i]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"film": np.zeros((4, 4, 3), np.uint8)}, "grey image"),
        ({"film": np.zeros((9000, 3), np.uint8)}, "long side"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"question": "heart " * 400}, "ask a shorter question"),
    ],
)
def test_what_can_never_be_served_is_refused(changes, message, engine):
    with pytest.raises(UserError, match=message):
        engine().submit(Request(**{"film": None, "question": "heart?", **changes}))
