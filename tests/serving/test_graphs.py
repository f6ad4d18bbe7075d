"""CUDA graphs. Without CUDA: their sizes, a step that cannot be captured, and all but the replay itself; with it, their numbers."""

import numpy as np
import pytest
import torch

from rad_jax.prompts import IMAGE_ID, question
from rad_jax.serving import loading
from rad_jax.serving.bundle import read
from rad_jax.serving.engine import Request
from rad_jax.serving.filling import fill
from rad_jax.serving.graphs import Graphs, rounded
from rad_jax.serving.model import Model, Prompt, Row
from rad_jax.serving.text import prompt

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")


@pytest.mark.parametrize(
    ("rows", "longest", "expected"),
    [(1, 1, (1, 256)), (3, 256, (4, 256)), (5, 257, (6, 512)), (6, 1999, (6, 2000))],
)
def test_rounded_sizes_stay_within_the_cache(rows, longest, expected):
    assert rounded(rows, longest, slots=6, max_tokens=2000) == expected


def test_steps_go_on_without_graphs_where_capturing_fails():
    said: list[str] = []

    def step(tokens, lengths, longest):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphs = Graphs(step, 2, 512, "cuda" if torch.cuda.is_available() else "cpu", said.append)
    assert graphs.run([5], [7]) is None and graphs.broken
    assert len(said) == 1 and said[0].startswith("CUDA graphs are not used: capturing a step failed (")


class Replayed(Graphs):
    """Graphs whose replay is the step once more: on a CPU."""

    def _capture(self, rows, longest):
        logits = self._step(self._tokens[:rows], self._lengths[:rows], longest).clone()

        class Graph:
            def replay(_):
                logits.copy_(self._step(self._tokens[:rows], self._lengths[:rows], longest))

        return Graph(), logits


def written(bundle, device, slots, graphs):
    """Logits and attention maps of a prefill and six steps of three rows, the second of which is asked where it looks; and the model."""
    example, folder = bundle()
    found = read(folder)
    weights = fill(found, torch.float32, device, None, lambda _: None)
    model = Model(found.decoder, found.tower, weights, (), slots, 256, print)
    model._graphs = None
    if graphs:
        kind = Graphs if device == "cuda" else Replayed
        model._graphs = kind(lambda t, n, most: model._step(t, n, most, True, True), slots, 256, device, print)
        model.prepare([100, 120])
    tokenizer, _ = loading.open_tokenizer(found)
    asked = [
        Prompt(prompt(tokenizer, question(reason), True), film, i == 1)
        for i, (film, reason) in enumerate(example.studies)
    ]
    logits, maps = model.prefill(asked, 0)
    lengths = [len(one.ids) - 1 + found.tower.patches for one in asked]
    place = asked[1].ids.index(IMAGE_ID)
    told = [(logits.clone(), maps)]
    for step in range(6):
        tokens = logits.argmax(-1).tolist()
        rows = [
            Row(t, n + step, place if i == 1 else None) for i, (t, n) in enumerate(zip(tokens, lengths, strict=True))
        ]
        logits, maps = model.step(rows)
        told.append((logits.clone(), maps))
    return told, model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_step_in_a_graph_is_the_eager_step_with_its_attention(device, bundle):
    eager, _ = written(bundle, device, 5, graphs=False)
    replayed, model = written(bundle, device, 5, graphs=True)
    # All were captured before the first row came: 1, 2, 4 and all 5 rows, of the one rounded length.
    assert set(model._graphs._captured) == {(rows, 256) for rows in (1, 2, 4, 5)} and not model._graphs.broken
    for (logits, maps), (others, other_maps) in zip(eager, replayed, strict=True):
        torch.testing.assert_close(others, logits, atol=2e-4, rtol=1e-4)
        assert [one is None for one in maps] == [one is None for one in other_maps] == [True, False, True]
        np.testing.assert_allclose(other_maps[1], maps[1], atol=1e-5)
        assert maps[1].sum() == pytest.approx(1, abs=1e-5)


def texts(bundle, kind, **arguments):
    example, folder = bundle(kind)
    engine = loading.load(folder, say=lambda _: None, **arguments)
    streams = [engine.submit(Request(film, question(reason), 24)) for film, reason in example.studies]
    found = ["".join(piece.text for piece in stream) for stream in streams]
    engine.close()
    return found


@needs_cuda
def test_texts_of_a_card_in_float16_are_those_of_float32(bundle):
    on_cpu = texts(bundle, "dinov2", device="cpu", dtype="float32")
    assert texts(bundle, "dinov2", device="cuda", dtype="float32") == on_cpu
    assert texts(bundle, "dinov2", device="cuda", dtype="float16") == on_cpu


@needs_cuda
@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_smaller_weights_run_on_a_card(weights, bundle):
    assert all(texts(bundle, "wide", device="cuda", weights=weights))
