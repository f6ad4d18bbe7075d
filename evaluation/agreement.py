"""How far two label tables agree: F1 of the positive class, and the list of every disagreement.

One table is taken as the reference. Macro F1 is over the classes that the reference calls positive at least `MIN_SUPPORT` times.
The original CheXpert labeler calls some sentences positive that only say the heart or mediastinum is normal ("heart size and pulmonary
vascularity appear within normal limits"); `calls_normal_abnormal` finds those reports, so that agreement can be given with and without.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import statistics
from evaluation.labels import CLASSES, POSITIVE
from evaluation.rule_labeler import sentences

MIN_SUPPORT = 20

_SPEAKS_OF = {
    "Cardiomegaly": re.compile(r"\b(?:heart|cardiac|cardiomegaly)\b"),
    "Enlarged Cardiomediastinum": re.compile(r"mediast|contour|silhouette"),
}
ORGANS = tuple(_SPEAKS_OF)
_NORMAL = re.compile(r"\b(?:normal|unremarkable)\b")
_MORE_THAN_NORMAL = re.compile(
    r"\b(?:abnormal\w*|enlarge\w*|prominen\w*|widen\w*|large\w*|increased|cardiomegaly|borderline|upper|top|near|tortuo\w*|ectasia"
    r"|irregular\w*|deformit\w*|mass\w*|hernia|clips?|post\w+|not|but|although|except)\b"
)


@dataclass(frozen=True)
class Agreement:
    """F1 [14] of the positive class (NaN where neither table has one) and the counts behind it, int64 [14] each."""

    f1: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray

    @property
    def micro(self) -> float:
        """F1 of the counts summed over the classes."""
        tp, fp, fn = self.tp.sum(), self.fp.sum(), self.fn.sum()
        return float(statistics.ratio(2 * tp, 2 * tp + fp + fn))

    @property
    def macro(self) -> float:
        """Mean F1 over the classes with at least `MIN_SUPPORT` positives in the reference; NaN when there is none."""
        known = self.tp + self.fn >= MIN_SUPPORT
        return float(self.f1[known].mean()) if known.any() else float("nan")


def agreement(reference: np.ndarray, other: np.ndarray) -> Agreement:
    """Compares two tables of codes [n, 14]."""
    true, said = reference == POSITIVE, other == POSITIVE
    tp, fp, fn = ((a & b).sum(axis=0) for a, b in ((true, said), (~true, said), (true, ~said)))
    return Agreement(statistics.ratio(2 * tp, 2 * tp + fp + fn), tp, fp, fn)


def disagreements(reference: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    """(class, report) indices where one table says positive and the other does not, by class and then in file order."""
    column, row = np.nonzero(((reference == POSITIVE) != (other == POSITIVE)).T)
    return list(zip(column.tolist(), row.tolist(), strict=True))


def calls_normal_abnormal(text: str, codes: Sequence[int] | np.ndarray) -> list[str]:
    """The classes, of heart and mediastinum, that `codes` [14] calls positive although every sentence of the report that speaks of the
    organ says normal or unremarkable and nothing else."""
    out = []
    for name, speaks in _SPEAKS_OF.items():
        if codes[CLASSES.index(name)] == POSITIVE:
            own = [sentence for sentence in sentences(text) if speaks.search(sentence)]
            if own and all(_NORMAL.search(s) and not _MORE_THAN_NORMAL.search(s) for s in own):
                out.append(name)
    return out
