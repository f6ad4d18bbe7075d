"""F1 over the 14 CheXpert classes, from two label tables, in every average that papers print.

A label is positive or not: code 1, and under `plus` the uncertain code 3 too (the "+" of the LLaVA-Rad tables; what f1chexbert and RadEval
do without saying). Averages as scikit-learn has them, with zero_division=0: a class that neither side names has F1 0 in the macro mean, and
a report that neither side says anything of has F1 0 in the example mean. "5" are `labels.FIVE`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation import statistics
from evaluation.labels import CLASSES, POSITIVE, UNCERTAIN, columns
from evaluation.metric import Metric

AVERAGES = ("micro", "macro", "weighted", "example")
SETS: dict[int, list[int]] = {14: columns(CLASSES), 5: columns()}


def positive(table: np.ndarray, plus: bool) -> np.ndarray:
    """Bool [n, 14] of a table of codes: positive, or with `plus` positive or uncertain."""
    return (table == POSITIVE) | ((table == UNCERTAIN) if plus else False)


def rows(reference: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Sums per report, float64 [n, 3 c + 4], of two bool tables [n, c]: tp, fp and fn of every class, then precision, recall and F1 of
    the report's own labels, then one."""
    if reference.shape != predicted.shape:
        raise ValueError(f"label tables of different shapes, {reference.shape} and {predicted.shape}")
    tp, fp, fn = reference & predicted, ~reference & predicted, reference & ~predicted
    t, p, n = (part.sum(axis=1) for part in (tp, fp, fn))
    own = [_ratio0(t, t + p), _ratio0(t, t + n), _ratio0(2 * t, 2 * t + p + n)]
    return np.concatenate([tp, fp, fn, np.stack([*own, np.ones(len(tp))], axis=1)], axis=1).astype(np.float64)


def scores(totals: np.ndarray, average: str) -> np.ndarray:
    """Precision, recall and F1, [m, 3], in one average, from summed `rows` [m, 3 c + 4]."""
    if average == "example":
        return statistics.ratio(totals[:, -4:-1], totals[:, -1:])
    count = (totals.shape[1] - 4) // 3
    tp, fp, fn = (totals[:, i * count : (i + 1) * count] for i in range(3))
    if average == "micro":
        tp, fp, fn = (part.sum(axis=1, keepdims=True) for part in (tp, fp, fn))
    each = np.stack([_ratio0(tp, tp + fp), _ratio0(tp, tp + fn), _ratio0(2 * tp, 2 * tp + fp + fn)], axis=-1)
    if average == "weighted":
        support = (tp + fn)[..., None]
        return statistics.ratio((each * support).sum(axis=1), support.sum(axis=1))
    return each.mean(axis=1)


def metrics(reference: np.ndarray, predicted: np.ndarray, labeler: str, how: str) -> list[Metric]:
    """Every F1 of two tables of codes [n, 14]: LABELER_AVERAGE_14, LABELER_AVERAGE_5, and the same with "_plus".

    how: which labeler in which version, for the signature.
    """
    out = []
    for plus in (False, True):
        true, said = positive(reference, plus), positive(predicted, plus)
        unc = "pos" if plus else "neg"
        for size, chosen in SETS.items():
            sums = rows(true[:, chosen], said[:, chosen])
            for average in AVERAGES:
                out.append(
                    Metric(
                        name=f"{labeler}_{average}_{size}{'_plus' if plus else ''}",
                        signature=f"{labeler}|labels:{size}|unc:{unc}|avg:{average}|zero:0|scale:0-1|{how}",
                        rows=sums,
                        value=_f1_of(average),
                        n=len(sums),
                        per_finding=per_finding(sums, [CLASSES[i] for i in chosen]) if average == "macro" else {},
                    )
                )
    return out


def per_finding(sums: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1, support and predictions of every class as plain JSON; a ratio without a case is None."""
    total, count = sums.sum(axis=0), len(names)
    out = {}
    for i, name in enumerate(names):
        tp, fp, fn = (float(total[i + part * count]) for part in range(3))
        ratios = {"precision": (tp, tp + fp), "recall": (tp, tp + fn), "f1": (2 * tp, 2 * tp + fp + fn)}
        out[name] = {key: over / under if under else None for key, (over, under) in ratios.items()}
        out[name] |= {"support": int(tp + fn), "predicted": int(tp + fp)}
    return out


def _f1_of(average: str) -> Any:
    return lambda totals: scores(totals, average)[:, 2]


def _ratio0(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Elementwise over / under, 0 where under is 0."""
    return np.nan_to_num(statistics.ratio(over, under), nan=0.0)
