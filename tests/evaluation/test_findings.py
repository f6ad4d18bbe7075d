"""Counts worked out by hand on six studies."""

from collections.abc import Callable

import numpy as np
import pytest

from evaluation import findings
from evaluation.findings import Finding


def of(*pairs: tuple[str, str | None]) -> list[Finding]:
    return [(name, side, None, None) for name, side in pairs]


TRUTH = [
    of(("effusion", "left"), ("heart", None)),
    of(("effusion", "right")),
    of(("effusion", "left"), ("effusion", "right")),
    of(),
    of(("heart", None)),
    of(("nodule", "left")),
]
PREDICTED = [
    of(("effusion", "left")),  # right; the heart is missed
    of(("effusion", "left")),  # wrong side
    of(("effusion", "left")),  # one side of two is wrong
    of(("effusion", "right"), ("heart", None)),  # both invented
    of(("heart", None)),  # right, has no side
    of(("nodule", None)),  # no side said is wrong
]


def test_counts_and_ratios() -> None:
    scores = findings.score(TRUTH, PREDICTED, min_support=2)
    effusion, heart, nodule = (scores.per_finding[name] for name in ("effusion", "heart", "nodule"))
    assert (effusion.precision, effusion.recall, effusion.support, effusion.predicted) == (3 / 4, 1.0, 3, 4)
    assert effusion.f1 == pytest.approx(6 / 7)
    assert (heart.precision, heart.recall, heart.f1, heart.support) == (0.5, 0.5, 0.5, 2)
    assert (nodule.f1, nodule.support) == (1.0, 1)
    assert scores.macro_classes == ("effusion", "heart")
    assert scores.macro_f1 == pytest.approx((6 / 7 + 0.5) / 2)
    assert (scores.laterality_right, scores.laterality_total) == (1, 4)
    assert scores.laterality == 0.25


def test_only_true_positives_with_a_side_count_for_laterality() -> None:
    missed = findings.score([of(("effusion", "left"))], [of()])
    assert missed.laterality is None and missed.laterality_interval is None
    unsided = findings.score([of(("heart", None))], [of(("heart", "left"))])
    assert unsided.laterality_total == 0


def test_bilateral_needs_both_sides() -> None:
    both = of(("effusion", "left"), ("effusion", "right"))
    assert findings.score([both], [both]).laterality == 1.0
    assert findings.score([of(("effusion", "left"))], [both]).laterality == 0.0


def test_no_class_with_enough_support_gives_no_macro() -> None:
    scores = findings.score(TRUTH, PREDICTED, min_support=15)
    assert scores.macro_f1 is None and scores.macro_f1_interval is None and scores.macro_classes == ()


def test_saying_nothing_scores_zero_not_undefined() -> None:
    scores = findings.score(TRUTH, [of()] * 6, min_support=1)
    assert scores.macro_f1 == 0.0
    assert scores.per_finding["effusion"].precision is None
    assert scores.per_finding["effusion"].recall == 0.0


def test_a_finding_said_twice_counts_once() -> None:
    scores = findings.score([of(("heart", None))], [of(("heart", None), ("heart", None))], min_support=1)
    assert scores.per_finding["heart"].predicted == 1


def test_interval_brackets_the_value_and_patients_widen_it() -> None:
    truth, predicted = TRUTH * 20, PREDICTED * 20
    alone = findings.score(truth, predicted, min_support=2)
    # The same 120 studies as 12 patients with ten equal studies each: far less is known.
    grouped = findings.score(truth, predicted, min_support=2, clusters=[i % 6 + 6 * (i >= 60) for i in range(120)])
    assert alone.macro_f1_interval is not None and grouped.macro_f1_interval is not None and alone.macro_f1 is not None
    assert alone.macro_f1_interval[0] < alone.macro_f1 < alone.macro_f1_interval[1]
    width, wide = np.diff(alone.macro_f1_interval)[0], np.diff(grouped.macro_f1_interval)[0]
    assert wide > 1.5 * width
    assert grouped.clusters == 12


def test_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="6 studies with truth but 5"):
        findings.score(TRUTH, PREDICTED[:5])


def test_mark_sorts_every_finding_once() -> None:
    marks = findings.mark(
        of(
            ("pleural_effusion", "left"),
            ("nodule", "right"),
            ("cardiomegaly", None),
            ("line", "left"),
            ("line", "right"),
        ),
        of(("pleural_effusion", "left"), ("nodule", "left"), ("pneumothorax", "right"), ("line", None)),
    )
    assert marks.right == ("left pleural effusion",)
    assert marks.wrong_side == ("bilateral line, called no side", "right nodule, called left")
    assert marks.missed == ("cardiomegaly",)
    assert marks.invented == ("right pneumothorax",)


def test_segments_join_to_the_text_and_carry_marks(parse: Callable[[str], list[Finding]]) -> None:
    text = "A left effusion of 3.5 cm.  No pneumothorax. Large heart shadow.\nA left nodule!"
    truth = of(("pleural_effusion", "left"), ("nodule", "right"))
    out = findings.segments(text, parse, truth, parse(text))
    assert "".join(sentence for sentence, _ in out) == text
    assert [marks for _, marks in out] == [
        [("right", "left pleural effusion")],
        [],
        [("invented", "cardiomegaly")],
        [("wrong_side", "left nodule")],
    ]
    assert findings.segments("", parse, truth, []) == []
