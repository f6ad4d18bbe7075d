"""AUROC against scikit-learn, and zero-shot classification on vectors whose answer is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import zero_shot
from evaluation.labels import CLASSES
from rad_jax.errors import UserError


@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_scikit_learns(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 6, 40).astype(float)  # many ties
    positive = rng.random(40) < 0.4
    weights = rng.integers(0, 4, (5, 40))
    assert zero_shot.auroc(values, positive)[0] == pytest.approx(metrics.roc_auc_score(positive, values))
    expected = [metrics.roc_auc_score(positive, values, sample_weight=row) for row in weights]
    np.testing.assert_allclose(zero_shot.auroc(values, positive, weights), expected, atol=1e-12)


def test_one_side_alone_has_no_auroc() -> None:
    assert np.isnan(zero_shot.auroc(np.arange(3.0), np.ones(3, bool))[0])


def test_scores_of_known_vectors() -> None:
    images = np.eye(3)[[0, 1, 2]]
    assert zero_shot.scores(images, np.eye(3)[[0, 1]], np.eye(3)[[2]]).tolist() == [0.5, 0.5, -1.0]


def test_classes_intervals_and_patients() -> None:
    rng = np.random.default_rng(0)
    labels = np.full((300, len(CLASSES)), -2)
    edema, effusion = CLASSES.index("Edema"), CLASSES.index("Pleural Effusion")
    labels[:, edema] = rng.integers(0, 2, 300)
    labels[:, effusion] = rng.choice([1, -1, -2], 300)
    values = {"Edema": labels[:, edema] + rng.normal(size=300), "Pleural Effusion": rng.normal(size=300), "Fracture": rng.normal(size=300)}  # fmt: skip
    result = zero_shot.evaluate(values, labels, [f"p{i // 3}" for i in range(300)], draws=400, how="prompts:01234567")
    found: Any = result["classes"]
    low, high = found["Edema"]["ci"]
    assert low < found["Edema"]["auroc"] < high and low > 0.65
    low, high = found["Pleural Effusion"]["ci"]
    assert low < 0.5 < high  # knows nothing
    assert found["Pleural Effusion"]["uncertain"] == (labels[:, effusion] == -1).sum()
    rules = "score:cosines-affirming-less-denying|uncertain:left-out|not-stated:negative|ties:half|prompts:01234567"
    signature = f"{rules}|n:300|unit:patient|ci:percentile-400-seed0"
    assert found["Fracture"] == {
        "auroc": None, "ci": None, "positive": 0, "uncertain": 0, "n": 300, "signature": f"zero-shot-auroc|class:Fracture|{signature}",
    }  # fmt: skip
    assert result["signature"] == f"zero-shot-auroc|mean-of:2-of-3-classes|{signature}"
    assert result["mean_auroc"] == pytest.approx((found["Edema"]["auroc"] + found["Pleural Effusion"]["auroc"]) / 2)
    assert result["ci"][0] < result["mean_auroc"] < result["ci"][1]
    # One patient who is three times there is less than three patients: the interval is wider.
    same = {"Edema": np.repeat(values["Edema"][::3], 3)}
    thrice = np.repeat(labels[::3], 3, axis=0)
    by_patient = zero_shot.evaluate(same, thrice, [i // 3 for i in range(300)], draws=400)["classes"]["Edema"]["ci"]
    by_image = zero_shot.evaluate(same, thrice, range(300), draws=400)["classes"]["Edema"]["ci"]
    assert by_patient[1] - by_patient[0] > 1.4 * (by_image[1] - by_image[0])


def test_prompts(tmp_path: Path) -> None:
    default = zero_shot.read_prompts(None)
    assert list(default) == list(CLASSES)
    assert default["Pleural Effusion"] == (
        ["Pleural effusion.", "There is a pleural effusion."],
        ["No pleural effusion.", "There is no pleural effusion."],
    )
    assert zero_shot.digest(default) != zero_shot.digest(default | {"Edema": (["wet"], ["dry"])})
    assert (
        zero_shot.digest(default) == zero_shot.digest(zero_shot.default_prompts())
        and len(zero_shot.digest(default)) == 8
    )
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"Edema": {"positive": ["wet"], "negative": ["dry"]}}))
    assert zero_shot.read_prompts(path) == {"Edema": (["wet"], ["dry"])}
    for content in ("{", "[]", "{}", '{"Edema": {"positive": [], "negative": ["x"]}}', '{"Wet": {"positive": ["x"], "negative": ["y"]}}'):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match="prompts are JSON"):
            zero_shot.read_prompts(path)
