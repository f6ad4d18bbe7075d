"""Finding-level scores: what was said, against what is there.

A finding is a tuple (finding, side, size, place), for example ("pleural_effusion", "left", "small", None). The
functions take lists of such tuples and know no corpus: the truth may come from annotations, the prediction from any
parser.

Presence is judged per study and finding class: a class is a true positive when both lists name it, whatever the side.
Side is then judged over the true positives whose truth has a side: right only when the predicted sides are exactly the
true ones, so that an unsided mention is wrong, and so is "bilateral" for "left".
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import label_metrics, statistics
from evaluation.metric import Metric, mean

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


def count(
    truth: Sequence[Sequence[Finding]], predicted: Sequence[Sequence[Finding]], classes: Iterable[str] = ()
) -> Counts:
    """Counts per study from two lists of finding lists, in the same order, over the classes named in them and `classes`.

    Raises ValueError on different lengths.
    """
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} studies with truth but {len(predicted)} with predictions")
    true_sides = [sides(row) for row in truth]
    said_sides = [sides(row) for row in predicted]
    named = tuple(sorted({name for row in (*true_sides, *said_sides) for name in row} | set(classes)))
    shape = (len(truth), len(named))
    is_true, is_said = np.zeros(shape, bool), np.zeros(shape, bool)
    side_right, side_total = np.zeros(len(truth), np.int64), np.zeros(len(truth), np.int64)
    for i, (true, said) in enumerate(zip(true_sides, said_sides, strict=True)):
        is_true[i] = [name in true for name in named]
        is_said[i] = [name in said for name in named]
        sided = [name for name in true if true[name] and name in said]
        side_total[i] = len(sided)
        side_right[i] = sum(true[name] == said[name] for name in sided)
    return Counts(
        classes=named,
        tp=(is_true & is_said).astype(np.int64),
        fp=(~is_true & is_said).astype(np.int64),
        fn=(is_true & ~is_said).astype(np.int64),
        side_right=side_right,
        side_total=side_total,
    )


def metrics(
    truth: Sequence[Sequence[Finding]],
    predicted: Sequence[Sequence[Finding]],
    *,
    min_support: int = MIN_SUPPORT,
    classes: Iterable[str] = (),
) -> list[Metric]:
    """finding_macro_f1, the mean F1 over the classes with at least `min_support` positives in the truth, and laterality, side_right over
    side_total over all classes. Both are NaN where nothing was judged.

    classes: counted beside those named here, so that several systems have the same columns.
    """
    counts = count(truth, predicted, classes)
    width, rows = len(counts.classes), counts.rows()
    macro = np.flatnonzero((counts.tp + counts.fn).sum(axis=0) >= max(min_support, 1))

    def macro_f1(totals: np.ndarray) -> np.ndarray:
        tp, fp, fn = (totals[:, i * width : (i + 1) * width][:, macro] for i in range(3))
        f1 = statistics.ratio(2 * tp, 2 * tp + fp + fn)
        # A draw without a single case of a class says nothing about that class: it is left out of the draw's mean.
        return statistics.ratio(np.nansum(f1, axis=1), np.isfinite(f1).sum(axis=1))

    per_finding = label_metrics.per_finding(rows, counts.classes)
    for i, scores in enumerate(per_finding.values()):
        scores["in_macro"] = i in macro
    how = f"truth:annotations|classes:{len(macro)}|min-support:{min_support}|match:class-per-study"
    side = "laterality|truth:annotations|over:true-positives-with-a-side|match:exact-sides|no-side:wrong"
    return [
        Metric("finding_macro_f1", f"finding-macro-f1|{how}", rows, macro_f1, len(rows), per_finding=per_finding),
        Metric("laterality", side, rows[:, -2:], mean, int(counts.side_total.sum())),
    ]


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


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the space after it; joined they give it back."""
    return re.findall(r".+?(?:[.!?]+(?=\s|$)\s*|$)", text, flags=re.DOTALL)


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
    for sentence in sentences(text):
        named = sides(parse(sentence))
        out.append((sentence, [(kinds[name], label(name, named[name])) for name in sorted(named) if name in kinds]))
    return out
