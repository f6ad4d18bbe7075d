"""Arms of a sweep beside each other: means over seeds with intervals, and who is better where that can be said."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import report, scoring, statistics
from evaluation.predictions import read_predictions
from rad_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Score:
    """One arm in one metric: the mean over its seeds, the ends of its interval, and each seed's own value.

    verdict: "better" or "worse" than the first arm where the two intervals do not touch, else "".
    """

    arm: str
    metric: str
    value: float
    low: float
    high: float
    seeds: list[float]
    verdict: str = ""


def compare(predictions: Mapping[str, Sequence[Path]], metrics: Sequence[str], options: report.Options) -> list[Score]:
    """Scores of every arm in every metric that could be computed, arms in the given order.

    An interval (95 %) holds both what other patients would have changed and what other seeds would have: a draw takes patients and seeds
    with replacement, the same patients for all arms.

    Args:
        predictions: arm -> a file for each seed.
        metrics: names, as launch.evaluate prints them.
        options: what the corpus knows.

    Raises:
        UserError: files that share no study, or none of the metrics was computed.
    """
    inputs = [
        report.Input(f"{arm}/{seed}", read_predictions(path), path)
        for arm, paths in predictions.items()
        for seed, path in enumerate(paths)
    ]
    _, (part, *_), _ = report.score(inputs, options)
    found = []
    for name in metrics:
        systems = {system: next((m for m in own if m.name == name), None) for system, own in part.systems.items()}
        if all(metric is not None and np.isfinite(metric.total()) for metric in systems.values()):
            found += _scores(name, predictions, systems, part.setting)
    if not found:
        raise UserError(f"none of {', '.join(metrics)} could be computed for these predictions.")
    return found


def _scores(
    name: str, predictions: Mapping[str, Sequence[Path]], systems: Mapping[str, Any], setting: scoring.Setting
) -> list[Score]:
    """One metric of all arms."""
    widths = [metric.rows.shape[1] for metric in systems.values()]
    rows = np.concatenate([metric.rows for metric in systems.values()], axis=1)
    totals = statistics.resample(rows, setting.clusters, draws=setting.draws, seed=setting.seed)
    parts = np.split(totals, np.cumsum(widths)[:-1], axis=1)
    drawn = {system: metric.value(part) for (system, metric), part in zip(systems.items(), parts, strict=True)}
    out: list[Score] = []
    for arm, paths in predictions.items():
        named = [f"{arm}/{seed}" for seed in range(len(paths))]
        samples = np.stack([drawn[system] for system in named])  # [seeds, draws]
        chosen = np.random.default_rng(setting.seed).integers(len(named), size=samples.shape)
        interval = statistics.percentile_interval(np.take_along_axis(samples, chosen, axis=0).mean(axis=0))
        values = [systems[system].total() for system in named]
        assert interval is not None
        out.append(Score(arm, name, float(np.mean(values)), *interval, values))
        out[-1] = dataclasses.replace(out[-1], verdict=verdict(out[0], out[-1]))
    return out


def verdict(first: Score, other: Score) -> str:
    """What can be said of an arm beside the first one."""
    if other.low > first.high:
        return "better"
    return "worse" if other.high < first.low else ""


def table(scores: Sequence[Score]) -> str:
    """Markdown: an arm per line, a metric per column."""
    metrics, arms = list(dict.fromkeys(s.metric for s in scores)), list(dict.fromkeys(s.arm for s in scores))
    cells = {(s.arm, s.metric): f"{s.value:.3f} [{s.low:.3f}, {s.high:.3f}] {s.verdict}".strip() for s in scores}
    lines = [f"| arm | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    return "\n".join([*lines, *(f"| {arm} | {' | '.join(cells[arm, m] for m in metrics)} |" for arm in arms)]) + "\n"


def draw(scores: Sequence[Score], file: Path) -> None:
    """A panel per metric: arms from top to bottom with their intervals, and a dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics, arms = list(dict.fromkeys(s.metric for s in scores)), list(dict.fromkeys(s.arm for s in scores))
    size = (4 + 2.6 * len(metrics), 1.2 + 0.42 * len(arms))
    figure, panels = plt.subplots(1, len(metrics), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for name, axes in zip(metrics, panels[0], strict=True):
        own = [s for s in scores if s.metric == name]
        places = range(len(own))
        ends = [[s.value - s.low for s in own], [s.high - s.value for s in own]]
        axes.errorbar([s.value for s in own], places, xerr=ends, fmt="o", capsize=3)
        for place, score in zip(places, own, strict=True):
            axes.plot(score.seeds, [place] * len(score.seeds), ".", color="grey", alpha=0.7)
        axes.axvspan(own[0].low, own[0].high, alpha=0.12)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    panels[0, 0].set_yticks(range(len(arms)), arms)
    panels[0, 0].invert_yaxis()
    figure.savefig(file, dpi=120)
    plt.close(figure)
