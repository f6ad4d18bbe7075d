"""What every score here is made of: a row of sums per report, and a function from summed rows to the number.

The split is what makes intervals and tests cheap: a resample of reports is a weighted sum of rows, so no metric is ever computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evaluation import statistics


@dataclass(frozen=True)
class Metric:
    """One score of one system.

    rows: float64 [n, k], one per report; a report that does not count has a row of zeros.
    value: totals [m, k] -> scores [m], NaN where nothing was counted.
    n: how many reports count; n_failed: how many got no score, though they should have.
    scale: 1.0 or 100.0, the greatest score (of an error count: its unit).
    point: what is reported as the value instead of value(sum of rows); None for that.
    per_finding: the classes of a label metric with their own numbers, as plain JSON.
    scored: bool [n], the reports that have a score, where some lack one that others have (a judge's verdict); None for all. A row of zeros
        does not say that: a report without a finding in it has one too.
    """

    name: str
    signature: str
    rows: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    n: int
    scale: float = 1.0
    point: float | None = None
    per_finding: dict[str, Any] = field(default_factory=dict)
    n_failed: int = 0
    scored: np.ndarray | None = None

    def total(self) -> float:
        """The score over all reports."""
        return float(self.value(self.rows.sum(axis=0, keepdims=True))[0])

    def each(self) -> np.ndarray:
        """The score of every report alone, float64 [n]."""
        return self.value(self.rows)


def paired(a: Metric, b: Metric) -> tuple[Metric, Metric, int]:
    """Both metrics over the reports that have a score of both systems, the others' rows zero, and how many were left out for that."""
    if a.scored is None and b.scored is None:
        return a, b, 0
    count = len(a.rows)
    in_a, in_b = (np.ones(count, bool) if m.scored is None else m.scored for m in (a, b))
    both = in_a & in_b
    first, second = (replace(m, rows=m.rows * both[:, None], scored=both, n=int(both.sum())) for m in (a, b))
    return first, second, int((in_a | in_b).sum() - both.sum())


def mean(totals: np.ndarray) -> np.ndarray:
    """First column by the second, for rows [n, 2] of a number and what it is out of (one, for a mean); NaN where that is 0."""
    return statistics.ratio(totals[:, 0], totals[:, 1])


def mean_rows(values: np.ndarray) -> np.ndarray:
    """Rows [n, 2] whose `mean` is the mean of `values` [n]."""
    return np.stack([values, np.ones(len(values))], axis=1).astype(np.float64)
