"""RadFact's arithmetic against what its package gives for the same verdicts and boxes."""

import math

import pytest

from evaluation import grounded
from evaluation.grounded import Phrase


def test_phrases_of_radfact() -> None:
    """RadFact, tests/metric (MIT)."""
    five = [Phrase(True), Phrase(True, True), Phrase(True, False), Phrase(False), Phrase(False, True)]
    assert grounded.radfact(five) == {"logical": 3 / 5, "grounding": 1 / 2, "spatial": 1 / 3}
    assert grounded.radfact([Phrase(False)]) == {"logical": 0.0, "grounding": None, "spatial": None}
    assert grounded.radfact([]) == {"logical": None, "grounding": None, "spatial": None}


def test_boxes_of_radfact() -> None:
    """RadFact, tests/metric (MIT): two digits, on masks of 224 pixels."""
    said = [(0.3, 0.3, 0.5, 0.5), (0.4, 0.4, 0.6, 0.6)]
    true = [(0.2, 0.2, 0.4, 0.4), (0.1, 0.1, 0.4, 0.4)]
    found = grounded.box_overlap(said, true)
    assert found == pytest.approx({"iou": 0.06, "precision": 0.14, "recall": 0.11}, abs=0.005)
    assert not grounded.boxes_entailed(said, true) and grounded.boxes_entailed(said, said)
    nothing = grounded.box_overlap([(0.3, 0.3, 0.3, 0.5)], true)
    assert math.isnan(nothing["precision"]) and (nothing["recall"], nothing["iou"]) == (0.0, 0.0)
