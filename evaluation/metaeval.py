"""How well scores agree with people: rank correlation and distance to the mean of raters, beside a rater who is left out.

Kendall's tau-b, for ties are the rule among error counts (Kendall 1945). A score agrees as well as an expert does when it is as near to
the other raters as each rater is: so every rater is left out in turn, and both the rater and the score are compared with the mean of the
rest. Intervals resample clusters of rated reports; resampled taus are quadratic forms in the weights, so no pair is looked at twice.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation import statistics

Json = dict[str, Any]


def tau(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Kendall's tau-b of x and y [n] under every row of weights [m, n] (once under equal ones when None); NaN where one is constant.

    A report drawn twice is tied with itself and so counts in no pair.
    """
    weights = np.ones((1, len(x))) if weights is None else weights
    dx, dy = (np.sign(v[:, None] - v[None, :]) for v in (x, y))
    concordance, spread_x, spread_y = (((weights @ m) * weights).sum(axis=1) for m in (dx * dy, dx**2, dy**2))
    return statistics.ratio(concordance, np.sqrt(spread_x * spread_y))


def distance(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean absolute difference of x and y [n] under every row of weights [m, n]."""
    weights = np.ones((1, len(x))) if weights is None else weights
    return weights @ np.abs(x - y) / weights.sum(axis=1)


def evaluate(
    scores: dict[str, np.ndarray],
    ratings: np.ndarray,
    clusters: Sequence[Hashable],
    *,
    signs: Mapping[str, int] | None = None,
    draws: int = statistics.DRAWS,
    seed: int = statistics.SEED,
) -> Json:
    """Every score [n] against the ratings [n, r] of r raters, as plain JSON.

    Per score and measure (tau, distance): against the mean of all raters; left_out, the mean over left-out raters of the score against
    the rest; rater, that of the left-out raters themselves; and left_out minus rater, "gap"; each with a 95% interval. The sign of tau is
    that of the score: negative when more is better and raters count errors. `signs` has for a score 1 where it should rise with the ratings and
    -1 where it should fall, and the gap of tau is of the score so turned: a score that goes the wrong way is further from the raters than one
    that is noise. A score that `signs` lacks has no such gap. Raises ValueError without two raters.
    """
    count, raters = ratings.shape
    if raters < 2:
        raise ValueError("agreement with raters needs at least two of them")
    weights = _weights(clusters, draws, seed)
    everyone = ratings.mean(axis=1)
    rest = [np.delete(ratings, r, axis=1).mean(axis=1) for r in range(raters)]
    out: Json = {"n": count, "raters": raters, "clusters": len(set(clusters)), "scores": {}}
    measures = {"tau": tau, "distance": distance}
    people = {
        name: [sum(measure(ratings[:, r], rest[r], w) for r in range(raters)) / raters for w in (None, weights)]
        for name, measure in measures.items()
    }
    for score, values in scores.items():
        out["scores"][score] = {}
        for name, measure in measures.items():
            alone, drawn = (measure(values, everyone, w) for w in (None, weights))
            own = [sum(measure(values, rest[r], w) for r in range(raters)) / raters for w in (None, weights)]
            sign = (signs or {}).get(score, np.nan) if name == "tau" else 1
            gap = [sign * mine - theirs for mine, theirs in zip(own, people[name], strict=True)]
            out["scores"][score][name] = {
                "all": _entry(alone, drawn),
                "left_out": _entry(*own),
                "rater": _entry(*people[name]),
                "gap": _entry(*gap),
            }
    return out


def _weights(clusters: Sequence[Hashable], draws: int, seed: int) -> np.ndarray:
    """How often every report is drawn, [draws, n], clusters whole."""
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in clusters], np.int64)
    return statistics.resample(np.eye(len(numbers)), range(len(numbers)), draws=draws, seed=seed)[:, index]


def _entry(value: Any, samples: Any) -> Json:
    only = float(value[0])
    return {"value": only if np.isfinite(only) else None, "ci": statistics.percentile_interval(samples)}
