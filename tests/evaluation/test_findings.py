"""Counts worked out by hand on six studies."""

from collections.abc import Callable

import numpy as np
import pytest

from evaluation import findings, scoring
from evaluation.findings import Finding
from evaluation.metric import Metric


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


def score(truth: list[list[Finding]], predicted: list[list[Finding]], min_support: int = 1) -> tuple[Metric, Metric]:
    macro, laterality = findings.metrics(truth, predicted, min_support=min_support)
    return macro, laterality


def test_counts_and_ratios() -> None:
    macro, laterality = score(TRUTH, PREDICTED, min_support=2)
    effusion, heart, nodule = (macro.per_finding[name] for name in ("effusion", "heart", "nodule"))
    assert [effusion[k] for k in ("precision", "recall", "support", "predicted")] == [3 / 4, 1.0, 3, 4]
    assert effusion["f1"] == pytest.approx(6 / 7)
    assert [heart[k] for k in ("precision", "recall", "f1", "support")] == [0.5, 0.5, 0.5, 2]
    assert (nodule["f1"], nodule["support"]) == (1.0, 1)
    assert [name for name, scores in macro.per_finding.items() if scores["in_macro"]] == ["effusion", "heart"]
    assert macro.total() == pytest.approx((6 / 7 + 0.5) / 2)
    assert "classes:2|min-support:2" in macro.signature
    assert laterality.rows.sum(axis=0).tolist() == [1, 4] and laterality.n == 4
    assert laterality.total() == 0.25


def test_only_true_positives_with_a_side_count_for_laterality() -> None:
    _, missed = score([of(("effusion", "left"))], [of()])
    assert np.isnan(missed.total())
    _, unsided = score([of(("heart", None))], [of(("heart", "left"))])
    assert unsided.n == 0


def test_bilateral_needs_both_sides() -> None:
    both = of(("effusion", "left"), ("effusion", "right"))
    assert score([both], [both])[1].total() == 1.0
    assert score([of(("effusion", "left"))], [both])[1].total() == 0.0


def test_no_class_with_enough_support_gives_no_macro() -> None:
    macro, _ = score(TRUTH, PREDICTED, min_support=15)
    assert np.isnan(macro.total()) and "classes:0" in macro.signature


def test_saying_nothing_scores_zero_not_undefined() -> None:
    macro, _ = score(TRUTH, [of()] * 6)
    assert macro.total() == 0.0
    assert macro.per_finding["effusion"]["precision"] is None
    assert macro.per_finding["effusion"]["recall"] == 0.0


def test_a_finding_said_twice_counts_once() -> None:
    macro, _ = score([of(("heart", None))], [of(("heart", None), ("heart", None))])
    assert macro.per_finding["heart"]["predicted"] == 1


def test_classes_of_another_system_have_columns_and_change_nothing() -> None:
    alone = findings.metrics(TRUTH, PREDICTED, min_support=2)[0]
    beside = findings.metrics(TRUTH, PREDICTED, min_support=2, classes=["aneurysm", "heart"])[0]
    assert beside.rows.shape[1] == alone.rows.shape[1] + 3
    assert beside.total() == alone.total()


def test_interval_brackets_the_value_and_patients_widen_it() -> None:
    macro, _ = score(TRUTH * 20, PREDICTED * 20, min_support=2)
    alone = scoring.entries([macro], scoring.Setting(range(120), "report", 2000, 0))[0]
    # The same 120 studies as 12 patients with ten equal studies each: far less is known.
    patients = [i % 6 + 6 * (i >= 60) for i in range(120)]
    grouped = scoring.entries([macro], scoring.Setting(patients, "patient", 2000, 0))[0]
    assert alone["ci"][0] < alone["value"] < alone["ci"][1]
    assert grouped["half_width"] > 1.5 * alone["half_width"]
    heart = alone["per_finding"]["heart"]
    assert heart["f1_ci"][0] < heart["f1"] < heart["f1_ci"][1]


def test_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="6 studies with truth but 5"):
        findings.metrics(TRUTH, PREDICTED[:5])


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
