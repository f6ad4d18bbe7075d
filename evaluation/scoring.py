"""From metrics to what is printed: intervals, and paired comparisons of systems, from one set of draws for all of them."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evaluation import directions, statistics
from evaluation.metric import Metric, paired

Json = dict[str, Any]
IntervalKind = Literal["percentile", "bca"]


@dataclass(frozen=True)
class Setting:
    """How intervals are made: `clusters` names the unit of every report."""

    clusters: Sequence[Hashable]
    unit: str
    draws: int
    seed: int
    kind: IntervalKind = "percentile"

    def signature(self) -> str:
        """For the end of a metric's signature."""
        return f"unit:{self.unit}|ci:{self.kind}-{self.draws}-seed{self.seed}"


def entries(metrics: Sequence[Metric], setting: Setting, median: bool = False) -> list[Json]:
    """Every metric of one system with value, interval, bootstrap median and half width, as plain JSON.

    median: the value is the bootstrap's median (BLEU excepted), as LLaVA-Rad prints it.
    """
    samples = _samples(metrics, setting)
    return [_entry(metric, totals, setting, median) for metric, totals in zip(metrics, samples, strict=True)]


def _samples(metrics: Sequence[Metric], setting: Setting) -> list[np.ndarray]:
    """Resampled totals of every metric, [draws, k] each, all from the same draws."""
    rows = np.concatenate([m.rows for m in metrics], axis=1) if metrics else np.zeros((len(setting.clusters), 0))
    totals = statistics.resample(rows, setting.clusters, draws=setting.draws, seed=setting.seed)
    return np.split(totals, np.cumsum([m.rows.shape[1] for m in metrics])[:-1], axis=1) if metrics else []


def _entry(metric: Metric, totals: np.ndarray, setting: Setting, median: bool) -> Json:
    samples = metric.value(totals)
    total = metric.total()
    interval = _interval(metric, samples, total, setting)
    middle = number(np.median(samples)) if np.isfinite(samples).all() else None
    value, signature = total, metric.signature
    if median and not metric.name.startswith("bleu"):
        value = metric.point if metric.point is not None else (middle if middle is not None else total)
        signature += f"|value:median-{setting.draws}"
    entry: Json = {
        "name": metric.name,
        "signature": f"{signature}|{setting.signature()}",
        "value": number(value),
        "ci": interval,
        "bootstrap_median": middle,
        "half_width": statistics.half_width(interval),
        "n": metric.n,
        "n_failed": metric.n_failed,
        "scale": metric.scale,
    }
    if metric.per_finding:
        entry["per_finding"] = _with_intervals(metric.per_finding, totals, metric.rows.sum(axis=0, keepdims=True))
    return entry


def _interval(metric: Metric, samples: np.ndarray, total: float, setting: Setting) -> statistics.Interval | None:
    if not np.isfinite(total):
        return None
    if setting.kind == "percentile":
        return statistics.percentile_interval(samples)
    left_out = statistics.leave_one_out(metric.rows, setting.clusters, metric.value)
    return statistics.bca_interval(samples, total, left_out)


def _with_intervals(per_finding: Json, totals: np.ndarray, total: np.ndarray) -> Json:
    """Adds to every class the interval of its F1, and what was omitted of the reference's cases and invented among the candidate's.

    totals: resampled, starting with tp, fp and fn of the classes; total: the same of all reports, [1, k].
    """
    count = len(per_finding)

    def shares(sums: np.ndarray) -> dict[str, np.ndarray]:
        tp, fp, fn = (sums[:, i * count : (i + 1) * count] for i in range(3))
        parts = {"f1": (2 * tp, 2 * tp + fp + fn), "omitted": (fn, tp + fn), "invented": (fp, tp + fp)}
        return {name: statistics.ratio(*part) for name, part in parts.items()}

    drawn, seen = shares(totals), shares(total)
    counts = {"omitted": total[0, 2 * count : 3 * count], "invented": total[0, count : 2 * count]}
    out = {}
    for i, (name, scores) in enumerate(per_finding.items()):
        out[name] = scores | {"f1_ci": statistics.percentile_interval(drawn["f1"][:, i])}
        for kind, found in counts.items():
            interval = statistics.percentile_interval(drawn[kind][:, i])
            out[name][kind] = {"count": int(found[i]), "share": number(seen[kind][0, i]), "ci": interval}
    return out


def compare(
    name: tuple[str, str], first: Sequence[Metric], second: Sequence[Metric], setting: Setting, trials: int
) -> list[Json]:
    """Second system minus first, metric by metric: difference, interval, p of the paired randomisation test, and effect sizes.

    name: both systems' names. p_holm is left to `adjust`, which knows the family. Reports that lack a score of either system count for
    neither: n is what is left, n_dropped how many those are, and diff the difference over the n.
    """
    pairs = [paired(a, b) for a, b in zip(first, second, strict=True)]
    first, second = [a for a, _, _ in pairs], [b for _, b, _ in pairs]
    drawn = zip(_samples(first, setting), _samples(second, setting), strict=True)
    a_rows, b_rows = (np.concatenate([m.rows for m in metrics], axis=1) for metrics in (first, second))
    swapped = statistics.randomise(a_rows, b_rows, setting.clusters, trials=trials, seed=setting.seed)
    out, start = [], 0
    for (a, b, dropped), (a_totals, b_totals) in zip(pairs, drawn, strict=True):
        stop = start + a.rows.shape[1]
        differences = b.value(b_totals) - a.value(a_totals)
        seen = b.total() - a.total()
        interval = statistics.percentile_interval(differences)
        test = statistics.significance(
            b.value(swapped.second[:, start:stop]) - a.value(swapped.first[:, start:stop]), seen, swapped
        )
        better, worse = _wins(a, b)
        out.append(
            {
                "metric": a.name,
                "a": name[0],
                "b": name[1],
                "diff": number(seen),
                "ci": interval,
                "half_width": statistics.half_width(interval),
                "p": test.p,
                "p_min": test.p_min,
                "exact": test.exact,
                "effect": _effect(a, b, setting.clusters),
                "n_better": better,
                "n_worse": worse,
                "n": b.n,
                "n_dropped": dropped,
                "scale": b.scale,
                "signature": f"{b.signature}|{setting.signature()}|test:randomisation-{len(swapped.first)}",
            }
        )
        start = stop
    return out


def adjust(comparisons: list[Json]) -> None:
    """Adds p_holm over all comparisons given: they are one family."""
    for row, p in zip(comparisons, statistics.holm([row["p"] for row in comparisons]), strict=True):
        row["p_holm"] = p
        row["family"] = len(comparisons)


def _wins(a: Metric, b: Metric) -> tuple[int, int]:
    """How many reports the second system scores better and worse on its own: of an error count less is better."""
    with np.errstate(invalid="ignore"):
        change = (b.each() - a.each()) * (directions.direction(b.name) or 1)
    return int((change > 1e-12).sum()), int((change < -1e-12).sum())


def _effect(a: Metric, b: Metric, clusters: Sequence[Hashable]) -> float | None:
    """Cohen's d of paired samples over units: mean difference by its standard deviation; None when it has none."""
    units = [statistics.sum_by_cluster(m.rows, clusters) for m in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        change = b.value(units[1]) - a.value(units[0])
    change = change[np.isfinite(change)]
    spread = change.std(ddof=1) if len(change) > 1 else 0.0
    return number(change.mean() / spread) if spread > 0 else None


_GATE = re.compile(r"(\w+)\s*([<>])\s*(-?\d+(?:\.\d+)?)\s*(pp)?(?:\s+at\s+(\d+(?:\.\d+)?)\s*%)?")


@dataclass(frozen=True)
class Gate:
    """A condition on a difference under which a comparison fails: "chexbert_macro_14 < -0.5pp at 95%".

    With a level it fails only when the whole interval of that level lies beyond the bound. pp: hundredths of the metric's scale.
    """

    metric: str
    below: bool
    bound: float
    pp: bool
    level: float | None

    def __str__(self) -> str:
        level = "" if self.level is None else f" at {100 * self.level:g}%"
        return f"{self.metric} {'<' if self.below else '>'} {self.bound:g}{'pp' if self.pp else ''}{level}"

    def fails(self, first: Metric, second: Metric, setting: Setting) -> bool:
        """Whether second minus first meets the condition."""
        first, second, _ = paired(first, second)
        bound = self.bound * second.scale / 100.0 if self.pp else self.bound
        if self.level is None:
            seen = second.total() - first.total()
            return seen < bound if self.below else seen > bound
        a, b = (_samples([metric], setting)[0] for metric in (first, second))
        interval = statistics.percentile_interval(second.value(b) - first.value(a), self.level)
        if interval is None:
            return False
        return interval[1] < bound if self.below else interval[0] > bound


def parse_gate(text: str) -> Gate:
    """Reads a condition; raises ValueError when it is none."""
    match = _GATE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no condition: write one like 'rouge_l < -0.5pp at 95%'")
    level = float(match[5]) / 100.0 if match[5] else None
    if level is not None and not 0.0 < level < 1.0:
        raise ValueError(f"{text!r}: a level lies between 0 and 100%")
    return Gate(match[1], match[2] == "<", float(match[3]), match[4] is not None, level)


def number(value: float | np.floating[Any]) -> float | None:
    """A plain float for JSON, None for what is not finite."""
    return float(value) if np.isfinite(value) else None
