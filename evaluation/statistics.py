"""Confidence intervals and tests by resampling patients.

Studies of one patient resemble each other, so an interval that resamples studies is too narrow. Here every study contributes a row of
counts (sufficient statistics), rows are summed per patient, and a draw is one weight vector over the patients times that matrix. Any score
that is a function of summed counts gets its interval from the same draws, and two systems drawn together are paired by construction.
Percentile and BCa bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 14; clusters as the unit:
Field and Welsh, Bootstrapping clustered data (2007); paired randomisation: Noreen, Computer-Intensive Methods (1989); several tests:
Holm, A simple sequentially rejective multiple test procedure (1979).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

DRAWS = 2000
TRIALS = 10_000
SEED = 0
EXACT = 12  # up to so many units every assignment of a randomisation test is tried
_BLOCK_ELEMENTS = 4_000_000  # weights held at once (32 MB), so that memory does not grow with the number of patients
Value = Callable[[np.ndarray], np.ndarray]
Interval = tuple[float, float]


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


def _blocks(count: int, draws: int) -> Iterator[int]:
    block = max(1, _BLOCK_ELEMENTS // count)
    yield from (min(block, draws - start) for start in range(0, draws, block))


def resample(rows: np.ndarray, clusters: Sequence[Hashable], *, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Bootstrap totals, float64 [draws, k], of the counts `rows` [n, k]: clusters are drawn with replacement."""
    sums = sum_by_cluster(rows, clusters)
    if len(sums) == 0:
        return np.zeros((draws, rows.shape[1]))
    return np.concatenate([weights @ sums for weights in _weights(len(sums), draws, seed)])


def resample_median(
    values: np.ndarray, clusters: Sequence[Hashable], *, draws: int = DRAWS, seed: int = SEED
) -> np.ndarray:
    """Bootstrap medians, float64 [draws], of `values` [n]: the same draws of clusters as `resample` makes."""
    numbers: dict[Hashable, int] = {}
    of = np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)
    order = np.argsort(values, kind="stable")
    ordered, of = values[order], of[order]
    out = []
    for weights in _weights(len(numbers), draws, seed, held=len(values)):
        below = np.cumsum(weights[:, of], axis=1)
        total = below[:, -1:]
        # The one or two in the middle: how many values end before them.
        low, high = ((below <= place).sum(axis=1) for place in ((total - 1) // 2, total // 2))
        out.append((ordered[low] + ordered[high]) / 2.0)
    return np.concatenate(out)


def _weights(count: int, draws: int, seed: int, held: int = 0) -> Iterator[np.ndarray]:
    """How often each of `count` clusters is drawn, int64 [size, count], in blocks until there were `draws`; `held`: numbers that the caller
    makes of a draw, when they are more. The draws do not depend on the blocks."""
    generator = np.random.default_rng(seed)
    for size in _blocks(max(count, held), draws):
        drawn = generator.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> Interval | None:
    """The central `level` of the finite samples [draws]; None when none is finite (nothing was ever counted)."""
    tail = (1.0 - level) / 2.0
    return _quantiles(samples, tail, 1.0 - tail)


def bca_interval(
    samples: np.ndarray, value: float, left_out: np.ndarray, level: float = 0.95
) -> tuple[float, float] | None:
    """Bias-corrected and accelerated interval of the finite samples [draws] around the estimate `value`.

    left_out: the score without each unit in turn, [c]. Falls back to the percentile interval where the correction is not defined (all
    samples on one side of the value, or a score that no unit changes).
    """
    finite, left_out = samples[np.isfinite(samples)], left_out[np.isfinite(left_out)]
    below = ((finite < value).sum() + (finite <= value).sum()) / (2 * finite.size) if finite.size else 0.0
    pull = left_out.mean() - left_out if left_out.size else left_out
    spread = (pull**2).sum() ** 1.5
    if not 0.0 < below < 1.0 or spread == 0.0:
        return percentile_interval(samples, level)
    normal = NormalDist()
    bias, acceleration = normal.inv_cdf(float(below)), float((pull**3).sum() / (6.0 * spread))
    ends = []
    for tail in ((1.0 - level) / 2.0, (1.0 + level) / 2.0):
        z = bias + normal.inv_cdf(tail)
        ends.append(normal.cdf(bias + z / (1.0 - acceleration * z)))
    return _quantiles(finite, *ends)


def _quantiles(samples: np.ndarray, low: float, high: float) -> Interval | None:
    finite = samples[np.isfinite(samples)]
    if finite.size == 0:
        return None
    ends = np.quantile(finite, [low, high])
    return float(ends[0]), float(ends[1])


def leave_one_out(rows: np.ndarray, clusters: Sequence[Hashable], value: Value) -> np.ndarray:
    """The score without each cluster in turn, float64 [c]."""
    sums = sum_by_cluster(rows, clusters)
    return value(sums.sum(axis=0) - sums)


def half_width(interval: Interval | None) -> float | None:
    """Half of an interval's width: what follows the plus-minus sign."""
    return None if interval is None else (interval[1] - interval[0]) / 2.0


@dataclass(frozen=True)
class Significance:
    """A two-sided randomisation test: p, the least p that so few units allow, and whether every assignment was tried."""

    p: float
    p_min: float
    exact: bool


@dataclass(frozen=True)
class Swapped:
    """Totals of two systems, [trials, k] each, with their rows swapped in random units; `exact` when all ways were tried."""

    first: np.ndarray
    second: np.ndarray
    units: int
    exact: bool


def randomise(
    first: np.ndarray, second: np.ndarray, clusters: Sequence[Hashable], *, trials: int = TRIALS, seed: int = SEED
) -> Swapped:
    """Swaps the rows [n, k] of two systems in random clusters; up to `EXACT` clusters in every way there is."""
    a, b = sum_by_cluster(first, clusters), sum_by_cluster(second, clusters)
    count, exact = len(a), len(a) <= EXACT
    change = b - a
    generator = np.random.default_rng(seed)
    moved = []
    for size in [2**count] if exact else _blocks(count, trials):
        if exact:
            ways = (np.arange(size)[:, None] >> np.arange(count)) & 1 == 1
        else:
            ways = generator.integers(2, size=(size, count), dtype=bool)
        moved.append(ways.astype(np.float64) @ change)
    gained = np.concatenate(moved)
    return Swapped(a.sum(axis=0) + gained, b.sum(axis=0) - gained, count, exact)


def significance(differences: np.ndarray, seen: float, swapped: Swapped) -> Significance:
    """Two-sided p of the difference `seen` among those of the swapped systems, [trials]: the share at least as large in size.

    With random swaps (c + 1) / (trials + 1), so that p is never 0. A difference that is not defined has p 1; swaps after which it is not
    (a rate of something that one side no longer has) count as at least as large, so that p is too large rather than too small.
    """
    trials = len(differences)
    least = min(1.0, 2.0 / 2**swapped.units) if swapped.exact else 1 / (trials + 1)
    if not np.isfinite(seen):
        return Significance(1.0, least, swapped.exact)
    count = int((~(np.abs(differences) < abs(seen) - 1e-12)).sum())
    return Significance(count / trials if swapped.exact else (count + 1) / (trials + 1), least, swapped.exact)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values of a family of tests, in the order given."""
    order = np.argsort(p, kind="stable")
    stepped = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return [float(value) for value in adjusted]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise numerator / denominator, NaN where the denominator is zero; shapes broadcast."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    out = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out
