"""Weights in 8 and 4 bits: how far off an entry may be, and that a model of them still answers."""

import itertools

import numpy as np
import pytest
import torch

from rad_jax.prompts import question
from rad_jax.serving.bundle import read
from rad_jax.serving.engine import Request
from rad_jax.serving.filling import fill
from rad_jax.serving.model import Model, Prompt
from rad_jax.serving.text import prompt
from rad_jax.serving.weights import NF4, Dense, Int8, Nf4, Scratch


def drawn(rows, columns):
    return torch.from_numpy(np.random.default_rng(rows).normal(0, 0.02, (rows, columns)).astype(np.float32))


def test_nf4_has_the_values_of_the_paper():
    """Eight positive and seven negative quantiles of a normal distribution and zero, scaled to [-1, 1] (QLoRA, section 3)."""
    from scipy.stats import norm

    outermost = 0.9677083  # 1 - (1/32 + 1/30) / 2: the mean of both halves' outermost quantiles
    above = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([below, [0.0], above])) / above.max()
    np.testing.assert_allclose(NF4, values, atol=1e-6)


def test_int8_is_off_by_half_a_step_at_most():
    weights, scratch = drawn(48, 32), Scratch(torch.float32, "cpu")
    stored = Int8((96, 32), scratch, "cpu")
    stored.put(0, weights[:40])
    stored.put(40, torch.cat([weights[40:], torch.zeros(48, 32)]))
    step = weights.abs().amax(1, keepdim=True) / 127
    assert ((stored.turned.t()[:48] - weights).abs() <= step / 2 + 1e-8).all()
    assert not stored.turned.t()[48:].any()


def test_nf4_is_off_by_half_the_widest_gap_at_most():
    weights, scratch = drawn(4100, 128), Scratch(torch.float32, "cpu")  # more rows than are spread out at once
    stored = Nf4((4100, 128), scratch, "cpu")
    stored.put(0, weights)
    largest = weights.view(4100, 2, 64).abs().amax(2, keepdim=True).expand(-1, -1, 64).reshape(weights.shape)
    gap = max(b - a for a, b in itertools.pairwise(NF4))
    off = (stored.turned.t() - weights).abs()
    assert (off <= largest * gap / 2 + 1e-8).all()
    assert off.square().mean().sqrt() < 0.1 * weights.std()  # 0.091 is what normal weights lose


def test_matrices_share_the_room_they_are_spread_out_in():
    scratch = Scratch(torch.float32, "cpu")
    first, second = Int8((8, 16), scratch, "cpu"), Int8((64, 16), scratch, "cpu")
    dense = Dense((8, 16), torch.float32, "cpu")
    for matrix in (first, dense):
        matrix.put(0, drawn(8, 16))
    second.put(0, drawn(64, 16))
    x = drawn(3, 16)
    torch.testing.assert_close(x @ first.turned, x @ dense.turned, atol=1e-3, rtol=0)
    assert first.turned.data_ptr() == second.turned.data_ptr()


def test_logits_in_8_bits_are_near_those_in_float32(bundle):
    example, folder = bundle()
    found = read(folder)
    image, _ = example.studies[0]
    from rad_jax.serving.loading import open_tokenizer

    ids = prompt(open_tokenizer(found)[0], question(None), True)
    logits = {}
    for kind in (None, "int8"):
        weights = fill(found, torch.float32, "cpu", kind, lambda _: None)
        model = Model(found.decoder, found.tower, weights, (), 1, 256, print)
        logits[kind] = model.prefill([Prompt(ids, image, False)], 0)[0]
    off = (logits["int8"] - logits[None]).square().mean().sqrt()
    assert 0 < off < 0.05 * logits[None].std()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_small_model_still_answers(kind, bundle, engine):
    example, _ = bundle("wide")
    ours = engine("wide", weights=kind)
    assert ours.info.weights == kind
    alone = [list(ours.submit(Request(image, question(None), 12))) for image, _ in example.studies]
    together = [ours.submit(Request(image, question(None), 12)) for image, _ in example.studies]
    assert [[p.token for p in stream] for stream in together] == [[p.token for p in pieces] for pieces in alone]
    assert all(pieces for pieces in alone)
