"""Raters and scores of known agreement."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from evaluation import metaeval
from launch import metaeval as command
from rad_jax.errors import UserError


def test_tau_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 60).astype(float), rng.integers(0, 4, 60).astype(float)  # many ties
    assert metaeval.tau(x, y)[0] == pytest.approx(kendalltau(x, y).statistic, abs=1e-12)
    drawn = rng.integers(0, 60, 60)
    weights = np.bincount(drawn, minlength=60)[None].astype(float)
    assert metaeval.tau(x, y, weights)[0] == pytest.approx(kendalltau(x[drawn], y[drawn]).statistic, abs=1e-12)
    assert np.isnan(metaeval.tau(x, np.ones(60))[0])


def test_distance_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.0, 4.0, 1.0])
    assert metaeval.distance(x, y)[0] == pytest.approx(5 / 3)
    assert metaeval.distance(x, y, np.array([[0.0, 2.0, 1.0]]))[0] == pytest.approx(7 / 3)


def test_known_agreement() -> None:
    """Raters see the truth with noise: the truth agrees better than a rater does, a rater's equal as well, noise not at all."""
    rng = np.random.default_rng(1)
    truth = rng.poisson(4, 200).astype(float)
    ratings = truth[:, None] + rng.normal(0, 1, (200, 4))
    scores = {
        "truth": truth,
        "equal": truth + rng.normal(0, 1, 200),
        "turned": -truth,
        "noise": rng.normal(size=200),
    }
    result = metaeval.evaluate(scores, ratings, range(200), draws=500)
    gap = {name: found["tau"]["gap"] for name, found in result["scores"].items()}
    assert gap["truth"]["ci"][0] > 0 and gap["turned"]["ci"][0] > 0
    assert gap["equal"]["ci"][0] < 0 < gap["equal"]["ci"][1]
    assert gap["noise"]["ci"][1] < 0
    assert result["scores"]["turned"]["tau"]["all"]["value"] == -result["scores"]["truth"]["tau"]["all"]["value"]
    # |truth - rater| has mean sqrt(2 / pi) of one sd; the mean of three others moves it little. 200 reports: a few percent.
    assert result["scores"]["truth"]["distance"]["all"]["value"] == pytest.approx(np.sqrt(2 / np.pi) / 2, rel=0.1)
    assert result["scores"]["truth"]["distance"]["gap"]["ci"][1] < 0
    wide = metaeval.evaluate({"x": scores["equal"]}, ratings, [i // 20 for i in range(200)], draws=500)
    assert wide["clusters"] == 10
    with pytest.raises(ValueError, match="at least two"):
        metaeval.evaluate(scores, ratings[:, :1], range(200))


COLUMNS: dict[str, str | None] = {"id": "id", "system": None, "rater": "rater", "value": "value", "cluster": None}


def test_files_in_both_layouts(tmp_path: Path) -> None:
    rows = [{"id": i, "system": "s", "profile": "p", "scores": {"m": float(i), "absent": None}} for i in range(6)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["id,rater,value", *(f"{i},{r},{i // 2}" for i in range(6) for r in ("a", "b")), "9,a,1"]
    lines += [f"{i},a,{i // 2}" for i in range(6)]  # a second kind of error of rater a
    (tmp_path / "r.csv").write_text("\n".join(lines) + "\n")
    ratings, clusters = command.read_ratings(tmp_path / "r.csv", COLUMNS)
    assert ratings["4", ""] == {"a": 4.0, "b": 2.0}
    result = command.compare(command.read_scores(tmp_path / "s.jsonl"), ratings, clusters, 100)
    assert result["left_out"] == 1 and list(result["metrics"]) == ["m"]
    found = result["metrics"]["m"]
    # Of 15 pairs the ratings tie three: 12 / sqrt(15 x 12).
    assert found["n"] == 6 and found["tau"]["all"]["value"] == pytest.approx(12 / np.sqrt(180))
    assert command.table(result)[1][0] == "m"
    named = COLUMNS | {"system": "rater"}
    with pytest.raises(UserError, match="no rated report has a score"):
        command.compare(
            command.read_scores(tmp_path / "s.jsonl"), *command.read_ratings(tmp_path / "r.csv", named), 100
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,rater\n1,a\n", "no column 'value'"),
        ("id,rater,value\n1,a,x\n", "line 2: value is not a number"),
        (None, "no ratings"),
    ],
)
def test_unusable_ratings(tmp_path: Path, text: str | None, message: str) -> None:
    if text:
        (tmp_path / "r.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        command.read_ratings(tmp_path / "r.csv", COLUMNS)


def test_unusable_scores(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no scores at"):
        command.read_scores(tmp_path / "s.jsonl")
    (tmp_path / "s.jsonl").write_text('{"id": 1, "scores": {"m": 1}}\n[]\n')
    with pytest.raises(UserError, match="line 2: no object"):
        command.read_scores(tmp_path / "s.jsonl")
