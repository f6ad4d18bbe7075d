"""Raters and scores of known agreement."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from evaluation import directions, metaeval, profiles
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
    signs = {"truth": 1, "equal": 1, "turned": -1, "noise": 1}
    result = metaeval.evaluate(scores, ratings, range(200), signs=signs, draws=500)
    gap = {name: found["tau"]["gap"] for name, found in result["scores"].items()}
    assert gap["truth"]["ci"][0] > 0 and gap["turned"]["ci"][0] > 0
    assert gap["equal"]["ci"][0] < 0 < gap["equal"]["ci"][1]
    assert gap["noise"]["ci"][1] < 0
    wrong = metaeval.evaluate(
        {"turned": -truth, "noise": scores["noise"]}, ratings, range(200), signs={"turned": 1}, draws=500
    )["scores"]
    assert wrong["turned"]["tau"]["gap"]["value"] < gap["noise"]["value"] - 0.5  # worse than noise
    assert wrong["noise"]["tau"]["gap"] == {"value": None, "ci": None}
    assert wrong["noise"]["distance"]["gap"]["value"] is not None
    assert result["scores"]["turned"]["tau"]["all"]["value"] == -result["scores"]["truth"]["tau"]["all"]["value"]
    # |truth - rater| has mean sqrt(2 / pi) of one sd; the mean of three others moves it little. 200 reports: a few percent.
    assert result["scores"]["truth"]["distance"]["all"]["value"] == pytest.approx(np.sqrt(2 / np.pi) / 2, rel=0.1)
    assert result["scores"]["truth"]["distance"]["gap"]["ci"][1] < 0
    with pytest.raises(ValueError, match="at least two"):
        metaeval.evaluate(scores, ratings[:, :1], range(200))


def test_equal_reports_are_one_piece_of_evidence() -> None:
    """Twenty reports, each five times: as clusters the intervals are those of the twenty, as reports of their own those of a hundred."""
    rng = np.random.default_rng(2)
    truth = rng.poisson(4, 20).astype(float)
    ratings, score = truth[:, None] + rng.normal(0, 1, (20, 3)), {"x": truth + rng.normal(0, 2, 20)}
    origin = np.repeat(np.arange(20), 5)
    many = {"x": score["x"][origin]}
    up = {"x": 1}
    alone = metaeval.evaluate(score, ratings, range(20), signs=up)["scores"]["x"]
    clustered = metaeval.evaluate(many, ratings[origin], origin.tolist(), signs=up)
    single = metaeval.evaluate(many, ratings[origin], range(100), signs=up)
    assert (clustered["clusters"], single["clusters"]) == (20, 100)
    for measure in ("tau", "distance"):
        for against in ("all", "left_out", "rater", "gap"):
            found = [result[measure][against] for result in (alone, clustered["scores"]["x"], single["scores"]["x"])]
            assert found[1]["ci"] == pytest.approx(found[0]["ci"])
            widths = [entry["ci"][1] - entry["ci"][0] for entry in found]
            # Five times the units: the square root of five, 2.2, to what 2,000 draws of so few leave open.
            assert 1.7 < widths[1] / widths[2] < 2.8
    values = [result["distance"]["all"]["value"] for result in (alone, clustered["scores"]["x"], single["scores"]["x"])]
    assert values == pytest.approx([values[0]] * 3)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "launch.metaeval", *map(str, arguments)]
    return subprocess.run(line, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)


def expected_of(score: np.ndarray, ratings: np.ndarray, sign: int) -> dict[str, dict[str, float]]:
    """Tau and distance of scores [n] and ratings [n, r] from scipy and loops; sign: -1 for a score that falls where ratings rise."""
    raters = range(ratings.shape[1])
    rest = [np.mean([ratings[:, other] for other in raters if other != r], axis=0) for r in raters]

    def both(measure: Callable[[np.ndarray, np.ndarray], float], sign: int) -> dict[str, float]:
        mine = float(np.mean([measure(score, rest[r]) for r in raters]))
        theirs = float(np.mean([measure(ratings[:, r], rest[r]) for r in raters]))
        everyone = float(measure(score, ratings.mean(axis=1)))
        return {"all": everyone, "left_out": mine, "rater": theirs, "gap": sign * mine - theirs}

    far: Callable[[np.ndarray, np.ndarray], float] = lambda x, y: float(np.mean(np.abs(x - y)))  # noqa: E731
    return {"tau": both(lambda x, y: float(kendalltau(x, y).statistic), sign), "distance": both(far, 1)}


def values_of(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {m: {name: entry["value"] for name, entry in found[m].items()} for m in ("tau", "distance")}


def test_command_on_rexval(tmp_path: Path) -> None:
    """The columns of ReXVal's 6_valid_raters_per_rater_error_categories.csv, made-up counts: a line per rater, kind of error and severity; four
    candidates of each study, which are one cluster."""
    rng = np.random.default_rng(3)
    candidates = ("radgraph", "bertscore", "s_emb", "bleu")
    hard = rng.poisson(0.3, (8, 4, 1, 6, 2))
    errors = hard + (rng.random((8, 4, 6, 6, 2)) < 0.15)  # study, candidate, rater, category, severity
    lines = ["study_number,candidate_type,error_category,clinically_significant,rater_index,num_errors"]
    for study, candidate, rater, category, severity in np.ndindex(errors.shape):
        number = errors[study, candidate, rater, category, severity]
        lines.append(f"{study},{candidates[candidate]},{category + 1},{severity == 0},{rater},{number}")
    (tmp_path / "rexval.csv").write_text("\n".join(lines) + "\n")
    totals = errors.sum(axis=(3, 4)).reshape(32, 6).astype(float)
    near = np.rint(totals.mean(axis=1)) + rng.integers(-1, 2, 32)
    scores = {"errors_found": near, "similarity": -near / 10}
    rows = [
        {"id": str(i // 4), "system": candidates[i % 4], "scores": {name: score[i] for name, score in scores.items()}}
        for i in range(32)
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--id=study_number", "--rater=rater_index", "--value=num_errors", "--higher_is_better=similarity")
    files = (tmp_path / "scores.jsonl", tmp_path / "rexval.csv")
    done = run(*files, *columns, "--system=candidate_type", f"--out={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["raters"], result["left_out"], list(result["metrics"])) == (6, 0, ["errors_found", "similarity"])
    assert "No gap in tau for errors_found: name them in" in done.stdout
    assert result["metrics"]["errors_found"]["tau"]["gap"] == {"value": None, "ci": None}
    for name, score in scores.items():
        found, expected = result["metrics"][name], expected_of(score, totals, -1)
        assert (found["n"], found["clusters"]) == (32, 8)
        for measure, value in values_of(found).items():
            unknown = {"gap"} if (name, measure) == ("errors_found", "tau") else set()
            assert {k: v for k, v in value.items() if k not in unknown} == pytest.approx(
                {k: v for k, v in expected[measure].items() if k not in unknown}
            )
        low, high = found["tau"]["all"]["ci"]
        assert low <= expected["tau"]["all"] <= high
        assert f"{expected['tau']['all']:.3f} [{low:.3f}, {high:.3f}]" in done.stdout
    assert (
        result["metrics"]["similarity"]["tau"]["all"]["value"]
        == -result["metrics"]["errors_found"]["tau"]["all"]["value"]
    )
    unnamed = run(*files, *columns)
    assert unnamed.returncode != 0 and "give --system" in unnamed.stderr and "Traceback" not in unnamed.stderr


def test_command_on_radpref(tmp_path: Path) -> None:
    """RadPref has two candidates, C1 and C2, of every case and three radiologists who rate each from 1 to 5; it keeps a JSON file for each
    rater, here as the lines that these hold. One rating is absent."""
    rng = np.random.default_rng(4)
    quality = rng.integers(1, 6, (12, 2, 1))
    ratings = np.clip(quality + rng.integers(-1, 2, (12, 2, 3)), 1, 5).astype(float)
    users = [
        {
            "annotations": {
                f"case{i}": {f"C{c + 1}": {"rating": int(ratings[i, c, user])} for c in range(2)} for i in range(12)
            }
        }
        for user in range(3)
    ]
    del users[2]["annotations"]["case7"]["C2"]
    lines = ["case_id,candidate,rater,rating"]
    for user, file in enumerate(users, start=1):
        for case, rated in file["annotations"].items():
            lines += [f"{case},{candidate},user_{user},{given['rating']}" for candidate, given in rated.items()]
    (tmp_path / "radpref.csv").write_text("\n".join(lines) + "\n")
    score = quality[:, :, 0] + rng.normal(0, 0.5, (12, 2))
    rows = [
        {"id": f"case{i}", "system": f"C{c + 1}", "scores": {"crimson": score[i, c]}}
        for i in range(12)
        for c in range(2)
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = (
        "--id=case_id",
        "--system=candidate",
        "--value=rating",
        "--ratings=quality",
        f"--out={tmp_path / 'out.json'}",
    )
    done = run(tmp_path / "scores.jsonl", tmp_path / "radpref.csv", *columns)
    assert done.returncode == 0, done.stderr
    assert "1 reports left out: not rated by all 3 raters." in done.stdout
    kept = np.ones((12, 2), bool)
    kept[7, 1] = False
    found = json.loads((tmp_path / "out.json").read_text())["metrics"]["crimson"]
    assert (found["n"], found["clusters"]) == (23, 12)
    expected = expected_of(score[kept], ratings[kept], 1)
    for measure, value in values_of(found).items():
        assert value == pytest.approx(expected[measure])
    assert found["tau"]["all"]["value"] > 0.5  # more is better with raters of quality


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


def test_profiles_of_a_metric_stay_apart(tmp_path: Path) -> None:
    """BLEU-4 of two profiles, one that agrees with the raters and one that goes the other way: two rows, each with its signature."""
    values = {"llava-rad": lambda i: -float(i), "native": float}
    rows = [
        {
            "id": i,
            "system": "s",
            "profile": profile,
            "scores": {"bleu_4": of(i), "x": 1.0 * i} if profile == "native" else {"bleu_4": of(i)},
        }
        for profile, of in values.items()
        for i in range(6)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"profile": p, "name": "bleu_4", "system": "s", "signature": f"bleu|of:{p}"} for p in values]
    (tmp_path / "results.json").write_text(json.dumps({"metrics": metrics}))
    ratings = {(str(i), ""): {"a": float(i), "b": float(i)} for i in range(6)}
    read = command.read_scores(tmp_path / "s.jsonl")
    result = command.compare(read, ratings, {key: key[0] for key in ratings}, 100)["metrics"]
    assert list(result) == ["llava-rad/bleu_4", "native/bleu_4", "native/x"]
    shown = {
        name: (found["signature"], found["better"], found["tau"]["gap"]["value"]) for name, found in result.items()
    }
    assert shown == {
        "llava-rad/bleu_4": (
            "bleu|of:llava-rad",
            "higher",
            0.0,
        ),  # errors rise where it falls, as the raters' agreement of 1
        "native/bleu_4": ("bleu|of:native", "higher", -2.0),  # the wrong way: not parity
        "native/x": (None, None, None),
    }
    named = command.compare(read, ratings, {key: key[0] for key in ratings}, 100, False, {"x": -1})["metrics"]
    assert named["native/x"]["tau"]["gap"]["value"] == -2.0 and named["native/bleu_4"]["tau"]["gap"]["value"] == 0.0
    (tmp_path / "s.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="line 2: a report has bleu_4 twice"):
        command.read_scores(tmp_path / "s.jsonl")


def test_every_score_has_a_direction() -> None:
    """Of all that the profiles and judges print; only how long a report is, is best in between."""
    rows: dict[str, int | None] = {
        "bleu_1": 1,
        "bleu_4_hf": 1,
        "rouge_l": 1,
        "chexbert_micro_14_plus": 1,
        "rules_macro_5": 1,
        "radgraph_partial": 1,
    }
    rows |= {
        "radcliq_v0": -1,
        "semb_score": 1,
        "chexprompt_total": -1,
        "chexprompt_significant_B": -1,
        "chexprompt_error_free": 1,
    }
    rows |= {
        "green": 1,
        "green_matched": 1,
        "green_significant": -1,
        "crimson": 1,
        "crimson_missed": -1,
        "crimson_invented": -1,
    }
    rows |= {
        "laterality": 1,
        "laterality_swap_rate": -1,
        "omission_rate": -1,
        "length_ratio": None,
        "finding_macro_f1": 1,
    }
    assert {name: directions.direction(name) for name in rows} == rows
    absent = {name for profile in profiles.PROFILES.values() for name in profile.absent} - {"chexprompt", "radfact"}
    assert None not in {directions.direction(name) for name in absent}


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
