"""Confidence intervals by resampling patients.

Studies of one patient resemble each other, so an interval that resamples studies is too narrow. Here every study
contributes a row of counts (sufficient statistics), rows are summed per patient, and a bootstrap draw is one
multinomial weight vector over the patients times that matrix. Any score that is a function of summed counts gets its
interval from the same draws. Percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993),
chapter 13; clusters as the unit: Field and Welsh, Bootstrapping clustered data (2007).
"""

from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 2000
SEED = 0
_BLOCK_ELEMENTS = 4_000_000  # weights held at once (32 MB), so that memory does not grow with the number of patients


def sum_by_cluster(rows: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Sums the rows [n, k] that share a cluster name; returns float64 [c, k], clusters in order of first appearance.

    Raises ValueError when there is not exactly one cluster name per row.
    """
    if len(clusters) != len(rows):
        raise ValueError(f"{len(rows)} rows but {len(clusters)} cluster names")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)
    sums = np.zeros((len(numbers), rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums


def resample(rows: np.ndarray, clusters: Sequence[Hashable], *, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Bootstrap totals, float64 [draws, k], of the counts `rows` [n, k]: clusters are drawn with replacement."""
    sums = sum_by_cluster(rows, clusters)
    count = len(sums)
    if count == 0:
        return np.zeros((draws, rows.shape[1]))
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // count)
    share = np.full(count, 1.0 / count)
    totals = [
        generator.multinomial(count, share, size=min(block, draws - start)) @ sums for start in range(0, draws, block)
    ]
    return np.concatenate(totals)


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The central `level` of the finite samples [draws]; None when none is finite (nothing was ever counted)."""
    finite = samples[np.isfinite(samples)]
    if finite.size == 0:
        return None
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return float(low), float(high)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise numerator / denominator, NaN where the denominator is zero; shapes broadcast."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    out = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out
