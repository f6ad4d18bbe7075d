"""Label F1 against scikit-learn, on a table worked out by hand and on random ones."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_recall_fscore_support

from evaluation import label_metrics, labels, scoring

SHORT = dict(
    zip(["ECM", "CM", "LO", "LL", "ED", "CO", "PN", "AT", "PX", "PE", "PO", "FR", "SD", "NF"], range(14), strict=True)
)


def table(text: str) -> np.ndarray:
    """Rows of "CM1 PE3" in braces: class and code, the others blank."""
    rows = [part.split() for part in text.strip("{}").split("} {")]
    out = np.zeros((len(rows), 14), np.int8)
    for i, row in enumerate(rows):
        for word in row:
            out[i, SHORT[word[:-1]]] = int(word[-1])
    return out


REFERENCE = table("{CM1 PE1 ED2} {AT3 LO1} {NF1} {PN3 CO1 SD1} {PE2 PX2 NF1} {CM3 ED1}")
PREDICTED = table("{CM1 PE3 ED2} {AT1 LO1} {NF1} {CO1 SD1} {PE1} {CM1 ED3}")


# Made up; the numbers are scikit-learn 1.9.1's: micro P, R, F; macro P, R, F; weighted F; samples F; exact match.
@pytest.mark.parametrize(
    ("size", "plus", "micro", "macro", "weighted", "example", "exact"),
    [
        (14, False, [0.625] * 3, [0.321429, 0.321429, 0.309524], 0.625, 0.555556, 0.333333),
        (5, False, [0.4, 0.5, 0.444444], [0.3, 0.4, 0.333333], 0.416667, 0.277778, 0.333333),
        (14, True, [0.9, 0.818182, 0.857143], [0.535714, 0.535714, 0.523810], 0.818182, 0.8, 0.666667),
        (5, True, [0.857143, 1, 0.923077], [0.9, 1, 0.933333], 0.944444, 0.666667, 0.833333),
    ],
)
def test_every_average(size, plus, micro, macro, weighted, example, exact) -> None:
    chosen = label_metrics.SETS[size]
    true, said = (label_metrics.positive(t, plus)[:, chosen] for t in (REFERENCE, PREDICTED))
    total = label_metrics.rows(true, said).sum(axis=0, keepdims=True)
    found = {name: label_metrics.scores(total, name)[0] for name in label_metrics.AVERAGES}
    np.testing.assert_allclose(found["micro"], micro, atol=1e-6)
    np.testing.assert_allclose(found["macro"], macro, atol=1e-6)
    assert found["weighted"][2] == pytest.approx(weighted, abs=1e-6)
    assert found["example"][2] == pytest.approx(example, abs=1e-6)
    assert (true == said).all(axis=1).mean() == pytest.approx(exact, abs=1e-6)
    name = f"micro_{size}{'_plus' if plus else ''}"
    metrics = {m.name: m for m in label_metrics.metrics(REFERENCE, PREDICTED, "x", "how")}
    assert metrics[f"x_{name}"].total() == pytest.approx(micro[2], abs=1e-6)
    assert f"labels:{size}|unc:{'pos' if plus else 'neg'}|avg:micro" in metrics[f"x_{name}"].signature


@pytest.mark.parametrize("average", ["micro", "macro", "weighted", "samples"])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scikit_learn(average: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, said = (rng.random((30, 14)) < np.linspace(0, 0.6, 14) for _ in range(2))
    total = label_metrics.rows(true, said).sum(axis=0, keepdims=True)
    found = label_metrics.scores(total, "example" if average == "samples" else average)[0]
    expected = precision_recall_fscore_support(true, said, average=average, zero_division=0)[:3]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_resample_of_rows_is_a_resample_of_reports() -> None:
    rng = np.random.default_rng(0)
    true, said = (rng.integers(0, 4, (40, 14)).astype(np.int8) for _ in range(2))
    metric = next(m for m in label_metrics.metrics(true, said, "x", "how") if m.name == "x_macro_14")
    drawn = rng.integers(0, 40, 40)
    expected = f1_score(true[drawn] == 1, said[drawn] == 1, average="macro", zero_division=0)
    assert metric.value(metric.rows[drawn].sum(axis=0, keepdims=True))[0] == pytest.approx(expected, rel=1e-12)


def test_per_finding() -> None:
    metric = next(m for m in label_metrics.metrics(REFERENCE, PREDICTED, "x", "how") if m.per_finding)
    effusion, fracture = metric.per_finding["Pleural Effusion"], metric.per_finding["Fracture"]
    assert effusion == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1, "predicted": 1}
    assert fracture["f1"] is None and fracture["support"] == 0
    entry = scoring.entries([metric], scoring.Setting(range(6), "report", 100, 0))[0]
    assert entry["per_finding"]["Lung Opacity"]["f1_ci"] == (1.0, 1.0)
    assert entry["per_finding"]["Fracture"]["f1_ci"] is None
    missed = entry["per_finding"]["Pleural Effusion"]
    assert (missed["omitted"]["count"], missed["omitted"]["share"], missed["omitted"]["ci"]) == (1, 1.0, (1.0, 1.0))
    assert (missed["invented"]["count"], missed["invented"]["share"]) == (1, 1.0)
    assert entry["per_finding"]["Fracture"]["omitted"] == {"count": 0, "share": None, "ci": None}
    opacity = entry["per_finding"]["Lung Opacity"]
    assert opacity["omitted"]["count"] == opacity["invented"]["count"] == 0 and opacity["omitted"]["share"] == 0.0


def test_five_are_the_five() -> None:
    assert [labels.CLASSES[i] for i in label_metrics.SETS[5]] == list(labels.FIVE)


def test_tables_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        label_metrics.metrics(REFERENCE, PREDICTED[:5], "x", "how")
