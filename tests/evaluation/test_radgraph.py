"""RadGraph F1 on annotations made by hand; the values are those of the radgraph package, 0.1.18."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation import radgraph, report
from launch import evaluate as command
from rad_jax.errors import UserError


def annotation(*entities: tuple[str, str, list[tuple[str, int]]]) -> dict[str, Any]:
    return {
        str(i): {"tokens": tokens, "label": label, "relations": [[kind, str(target)] for kind, target in relations]}
        for i, (tokens, label, relations) in enumerate(entities, start=1)
    }


WHOLE = annotation(
    ("small", "OBS-DP", [("modify", 3)]),
    ("pleural", "ANAT-DP", []),
    ("effusion", "OBS-DP", [("located_at", 2)]),
    ("pneumothorax", "OBS-DA", []),
)
CAPITAL = annotation(
    ("Small", "OBS-DP", [("modify", 3)]), *((e["tokens"], e["label"], e["relations"]) for e in list(WHOLE.values())[1:])
)
AFFIRMED = annotation(
    ("pleural", "ANAT-DP", []), ("effusion", "OBS-DP", [("located_at", 1)]), ("pneumothorax", "OBS-DP", [])
)
TWICE = annotation(("effusion", "OBS-DP", []), ("pneumothorax", "OBS-DA", []), ("pneumothorax", "OBS-DA", []))


@pytest.mark.parametrize(
    ("predicted", "keep_case", "expected"),
    [
        (WHOLE, True, [1, 1, 1]),
        (CAPITAL, True, [0.75, 0.75, 1.0]),
        (CAPITAL, False, [1, 1, 1]),
        (AFFIRMED, True, [0.571429] * 3),
        (TWICE, True, [0.666667, 0.333333, 0.333333]),
        ({}, True, [0, 0, 0]),
    ],
)
def test_forms(predicted: dict[str, Any], keep_case: bool, expected: list[float]) -> None:
    found = [radgraph.f1(predicted, WHOLE, form, keep_case) for form in radgraph.FORMS[:3]]
    assert found == pytest.approx(expected, abs=1e-6)
    # F1 does not care which side is which.
    assert found == [radgraph.f1(WHOLE, predicted, form, keep_case) for form in radgraph.FORMS[:3]]


def test_entities_and_relations() -> None:
    """A perfect copy of a report without relations scores a half; two empty reports score nothing."""
    single = annotation(("pneumothorax", "OBS-DP", []))
    assert radgraph.f1(single, single, "entity_relation", True) == 0.5
    assert radgraph.f1(WHOLE, WHOLE, "entity_relation", True) == 1.0
    # Entities 2 x 2 / 7, relations: one of one against one of two.
    assert radgraph.f1(AFFIRMED, WHOLE, "entity_relation", True) == pytest.approx((4 / 7 + 2 / 3) / 2)
    assert [radgraph.f1({}, {}, form, True) for form in radgraph.FORMS] == [0.0] * 4


def test_in_the_evaluation(tmp_path: Path) -> None:
    rows = [{"id": i, "query": "", "reference": "x y", "prediction": "x"} for i in ("a", "b")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, of_a in (("true", WHOLE), ("said", CAPITAL)):
        content = {"a": {"entities": of_a}, "b": {"entities": WHOLE}, "other": {"entities": {}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    inputs = command.read_inputs([tmp_path / "p.jsonl"], annotation_paths=[tmp_path / "said.json"])
    options = report.Options(
        profiles=["native", "llava-rad"], draws=100, reference_annotations=radgraph.read(tmp_path / "true.json")
    )
    result, _ = report.evaluate(inputs, options)
    found = {(m["profile"], m["name"]): m["value"] for m in result["metrics"] if m["name"].startswith("radgraph")}
    assert found["native", "radgraph_partial"] == 1.0
    assert ("llava-rad", "radgraph_simple") not in found
    assert found["llava-rad", "radgraph_partial"] == 0.875  # the bootstrap median of 0.75 and 1
    assert not any("radgraph_partial" in warning for warning in result["warnings"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no annotations at"),
        ("{", "is not JSON"),
        ("[]", "no file of RadGraph"),
        (
            '{"a": {"entities": {"1": {"tokens": "x", "label": "y", "relations": [["modify", "2"]]}}}}',
            "no file of RadGraph",
        ),
    ],
)
def test_unusable_annotations(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        radgraph.read(tmp_path / "a.json")
