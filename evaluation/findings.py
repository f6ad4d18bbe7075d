"""Finding-level scores: what was said, against what is there.

A finding is a tuple (finding, side, size, place), for example ("pleural_effusion", "left", "small", None). The
functions take lists of such tuples and know no corpus: the truth may come from annotations, the prediction from any
parser.

Presence is judged per study and finding class: a class is a true positive when both lists name it, whatever the side.
Side is then judged over the true positives whose truth has a side: right only when the predicted sides are exactly the
true ones, so that an unsided mention is wrong, and so is "bilateral" for "left".
"""

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import statistics

Finding = tuple[str, str | None, str | None, str | None]
MIN_SUPPORT = 15


def sides(findings: Sequence[Finding]) -> dict[str, frozenset[str]]:
    """Finding class -> the sides named for it (empty when none is)."""
    out: dict[str, frozenset[str]] = {}
    for finding, side, _, _ in findings:
        out[finding] = out.get(finding, frozenset()) | ({side} if side else frozenset())
    return out


@dataclass(frozen=True)
class Counts:
    """What scores and intervals are computed from, one row per study.

    tp, fp, fn: int64 [n, c] for the c classes; side_right, side_total: int64 [n], true positives whose truth has a
    side.
    """

    classes: tuple[str, ...]
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    side_right: np.ndarray
    side_total: np.ndarray

    def rows(self) -> np.ndarray:
        """All counts side by side, [n, 3 c + 2], in the order tp, fp, fn, side_right, side_total."""
        return np.concatenate(
            [self.tp, self.fp, self.fn, self.side_right[:, None], self.side_total[:, None]], axis=1
        ).astype(np.float64)


def count(truth: Sequence[Sequence[Finding]], predicted: Sequence[Sequence[Finding]]) -> Counts:
    """Counts per study from two lists of finding lists, in the same order; raises ValueError on different lengths."""
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} studies with truth but {len(predicted)} with predictions")
    true_sides = [sides(row) for row in truth]
    said_sides = [sides(row) for row in predicted]
    classes = tuple(sorted({name for row in (*true_sides, *said_sides) for name in row}))
    shape = (len(truth), len(classes))
    is_true, is_said = np.zeros(shape, bool), np.zeros(shape, bool)
    side_right, side_total = np.zeros(len(truth), np.int64), np.zeros(len(truth), np.int64)
    for i, (true, said) in enumerate(zip(true_sides, said_sides, strict=True)):
        is_true[i] = [name in true for name in classes]
        is_said[i] = [name in said for name in classes]
        sided = [name for name in true if true[name] and name in said]
        side_total[i] = len(sided)
        side_right[i] = sum(true[name] == said[name] for name in sided)
    return Counts(
        classes=classes,
        tp=(is_true & is_said).astype(np.int64),
        fp=(~is_true & is_said).astype(np.int64),
        fn=(is_true & ~is_said).astype(np.int64),
        side_right=side_right,
        side_total=side_total,
    )


@dataclass(frozen=True)
class FindingScore:
    """One class. A ratio without a single case (nothing predicted, nothing there) is None."""

    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    predicted: int
    f1_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Scores:
    """macro_f1 is the mean F1 over `macro_classes` (support >= min_support), None when there is no such class.

    laterality is side_right / side_total over all classes, None when nothing was judged. Intervals are 95% percentile
    intervals over resampled clusters.
    """

    per_finding: dict[str, FindingScore]
    macro_f1: float | None
    macro_f1_interval: tuple[float, float] | None
    macro_classes: tuple[str, ...]
    min_support: int
    laterality: float | None
    laterality_interval: tuple[float, float] | None
    laterality_right: int
    laterality_total: int
    studies: int
    clusters: int


def score(
    truth: Sequence[Sequence[Finding]],
    predicted: Sequence[Sequence[Finding]],
    *,
    clusters: Sequence[Hashable] | None = None,
    min_support: int = MIN_SUPPORT,
    draws: int = statistics.DRAWS,
    seed: int = statistics.SEED,
) -> Scores:
    """Precision, recall, F1 per class, their macro mean, laterality, and intervals.

    clusters: the patient of each study, the unit that the intervals resample; without it every study is its own unit.
    """
    counts = count(truth, predicted)
    clusters = list(range(len(truth))) if clusters is None else clusters
    samples = statistics.resample(counts.rows(), clusters, draws=draws, seed=seed)
    width = len(counts.classes)
    tp, fp, fn = (samples[:, i * width : (i + 1) * width] for i in range(3))
    f1_samples = statistics.ratio(2 * tp, 2 * tp + fp + fn)
    side_samples = statistics.ratio(samples[:, -2], samples[:, -1])

    tp, fp, fn = counts.tp.sum(0), counts.fp.sum(0), counts.fn.sum(0)
    f1 = statistics.ratio(2 * tp, 2 * tp + fp + fn)
    precision, recall = statistics.ratio(tp, tp + fp), statistics.ratio(tp, tp + fn)
    support = tp + fn
    macro = np.flatnonzero(support >= max(min_support, 1))
    per_finding = {
        name: FindingScore(
            precision=_or_none(precision[i]),
            recall=_or_none(recall[i]),
            f1=_or_none(f1[i]),
            support=int(support[i]),
            predicted=int(tp[i] + fp[i]),
            f1_interval=statistics.percentile_interval(f1_samples[:, i]),
        )
        for i, name in enumerate(counts.classes)
    }
    right, total = int(counts.side_right.sum()), int(counts.side_total.sum())
    return Scores(
        per_finding=per_finding,
        macro_f1=float(f1[macro].mean()) if macro.size else None,
        # A draw without a single case of a class says nothing about that class: it is left out of the draw's mean.
        macro_f1_interval=statistics.percentile_interval(_mean_of_known(f1_samples[:, macro])) if macro.size else None,
        macro_classes=tuple(counts.classes[i] for i in macro),
        min_support=min_support,
        laterality=right / total if total else None,
        laterality_interval=statistics.percentile_interval(side_samples) if total else None,
        laterality_right=right,
        laterality_total=total,
        studies=len(truth),
        clusters=len(set(clusters)),
    )


def _mean_of_known(samples: np.ndarray) -> np.ndarray:
    return statistics.ratio(np.nansum(samples, axis=1), np.isfinite(samples).sum(axis=1))


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def label(finding: str, named: frozenset[str]) -> str:
    """Words for a class and its sides: "left pleural effusion", "bilateral consolidation", "cardiomegaly"."""
    where = "bilateral" if len(named) > 1 else next(iter(named), "")
    return f"{where} {finding.replace('_', ' ')}".strip()


@dataclass(frozen=True)
class Marks:
    """One study's findings in words, by how they fared.

    A class in `wrong_side` is a true positive with another side.
    """

    right: tuple[str, ...]
    wrong_side: tuple[str, ...]
    missed: tuple[str, ...]
    invented: tuple[str, ...]


def mark(truth: Sequence[Finding], predicted: Sequence[Finding]) -> Marks:
    """Sorts one study's findings into right, wrong side, missed and invented, each in alphabetical order."""
    true, said = sides(truth), sides(predicted)
    kinds = _kinds(true, said)
    return Marks(
        right=tuple(label(name, said[name]) for name, kind in kinds.items() if kind == "right"),
        wrong_side=tuple(
            f"{label(name, true[name])}, called {' and '.join(sorted(said[name])) or 'no side'}"
            for name, kind in kinds.items()
            if kind == "wrong_side"
        ),
        missed=tuple(label(name, true[name]) for name, kind in kinds.items() if kind == "missed"),
        invented=tuple(label(name, said[name]) for name, kind in kinds.items() if kind == "invented"),
    )


def _kinds(true: dict[str, frozenset[str]], said: dict[str, frozenset[str]]) -> dict[str, str]:
    def kind(name: str) -> str:
        if name not in said:
            return "missed"
        if name not in true:
            return "invented"
        return "wrong_side" if true[name] and true[name] != said[name] else "right"

    return {name: kind(name) for name in sorted(true.keys() | said.keys())}


def segments(
    text: str,
    parse: Callable[[str], Sequence[Finding]],
    truth: Sequence[Finding],
    predicted: Sequence[Finding],
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Splits a report into sentences and says which findings each one speaks of.

    Returns [(sentence with the space after it, [(kind, label), ...]), ...]; kind is "right", "wrong_side", "missed" or
    "invented". The sentences joined give `text` back. A finding that the parser sees in a sentence but not in the whole
    report gets no mark, so the marks never disagree with the scores.
    """
    true, said = sides(truth), sides(predicted)
    kinds = _kinds(true, said)
    out = []
    for sentence in re.findall(r".+?(?:[.!?]+(?=\s|$)\s*|$)", text, flags=re.DOTALL):
        named = sides(parse(sentence))
        out.append((sentence, [(kinds[name], label(name, named[name])) for name in sorted(named) if name in kinds]))
    return out
