"""The arithmetic of judges against what the packages give for the same counts."""

import math

import pytest

from evaluation import judged
from evaluation.judged import Matched, Phrase


@pytest.mark.parametrize(
    ("matched", "missed", "invented", "expected"),
    [
        ([Matched("urgent")], [], [], 1.0),  # crimson-score 0.2.0
        ([], [], [], 1.0),
        ([Matched("urgent")], ["actionable"], [], 0.6667),
        ([Matched("urgent", ["significant"])], [], [], 0.6667),
        ([Matched("actionable", ["significant"])], [], [], 0.5),
        ([], [], ["actionable"], -0.3333),
        ([], [], ["urgent"], -0.5),
        ([Matched("actionable")], [], ["urgent"], -0.3333),
        ([], ["urgent", "actionable"], [], 0.0),
        ([Matched("benign")], [], [], 1.0),
    ],
)
def test_crimson(matched: list[Matched], missed: list[str], invented: list[str], expected: float) -> None:
    assert judged.crimson(matched, missed, invented) == pytest.approx(expected, abs=5e-5)


def test_crimson_knows_its_severities() -> None:
    with pytest.raises(KeyError):
        judged.crimson([], ["severe"], [])


def test_phrases_of_radfact() -> None:
    """RadFact, tests/metric (MIT)."""
    five = [Phrase(True), Phrase(True, True), Phrase(True, False), Phrase(False), Phrase(False, True)]
    assert judged.radfact(five) == {"logical": 3 / 5, "grounding": 1 / 2, "spatial": 1 / 3}
    assert judged.radfact([Phrase(False)]) == {"logical": 0.0, "grounding": None, "spatial": None}
    assert judged.radfact([]) == {"logical": None, "grounding": None, "spatial": None}
    assert judged.f1(0.75, 0.75) == 0.75
    assert judged.f1(0.5, 2 / 3) == pytest.approx(0.5714, abs=5e-5)
    assert judged.f1(0.0, 0.0) == 0.0


def test_boxes_of_radfact() -> None:
    """RadFact, tests/metric (MIT): two digits, on masks of 224 pixels."""
    said = [(0.3, 0.3, 0.5, 0.5), (0.4, 0.4, 0.6, 0.6)]
    true = [(0.2, 0.2, 0.4, 0.4), (0.1, 0.1, 0.4, 0.4)]
    found = judged.box_overlap(said, true)
    assert found == pytest.approx({"iou": 0.06, "precision": 0.14, "recall": 0.11}, abs=0.005)
    assert not judged.boxes_entailed(said, true) and judged.boxes_entailed(said, said)
    nothing = judged.box_overlap([(0.3, 0.3, 0.3, 0.5)], true)
    assert math.isnan(nothing["precision"]) and (nothing["recall"], nothing["iou"]) == (0.0, 0.0)
