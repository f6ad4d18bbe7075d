"""Word-overlap scores of reports, each with the signature that makes it comparable.

BLEU: Papineni et al. 2002, computed by sacrebleu (13a tokens, case kept, exponential smoothing, corpus level, scale 0
to 100; Post 2018). ROUGE-L: Lin 2004, computed by rouge-score (lower-cased [a-z0-9] tokens, no stemmer, F1, mean over
reports, scale 0 to 1). Neither says whether a report is right; they are here because the field prints them.
"""

import importlib.metadata
import importlib.util
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import statistics

MAX_ORDER = 4


@dataclass(frozen=True)
class Score:
    """A number, its 95% interval, how many reports it is over, and how it was made."""

    value: float
    interval: tuple[float, float] | None
    n: int
    signature: str


def missing_packages() -> list[str]:
    """The distributions that this module needs and cannot find."""
    needed = {"sacrebleu": "sacrebleu", "rouge-score": "rouge_score"}
    return [name for name, module in needed.items() if importlib.util.find_spec(module) is None]


def bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Per report, int64 [n, 10]: matching n-grams of order 1 to 4, predicted n-grams of order 1 to 4, both lengths."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize="13a", max_ngram_order=MAX_ORDER)
    rows = [metric.corpus_score([p], [[r]]) for p, r in zip(predictions, references, strict=True)]
    return np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows], dtype=np.int64).reshape(
        len(predictions), 2 * MAX_ORDER + 2
    )


def bleu_from_counts(totals: np.ndarray, order: int) -> np.ndarray:
    """BLEU of order `order` (0 to 100), [m], from summed counts [m, 10] as `bleu_counts` lays them out.

    Orders without a match are smoothed as sacrebleu's "exp" does: the k-th such order counts 1 / 2^k matches.
    """
    matches, possible = totals[:, :order].astype(float), totals[:, MAX_ORDER : MAX_ORDER + order].astype(float)
    empty = (matches == 0) & (possible > 0)
    matches = np.where(empty, 0.5 ** np.cumsum(empty, axis=1), matches)
    precision = statistics.ratio(matches, possible)
    length, reference = totals[:, -2].astype(float), totals[:, -1].astype(float)
    brevity = np.exp(np.minimum(0.0, 1.0 - statistics.ratio(reference, length)))
    scores = 100.0 * brevity * np.exp(np.log(precision).mean(axis=1))
    # sacrebleu gives 0 when nothing matched at all, or when no report is long enough for the highest order.
    nothing = (totals[:, :order].sum(axis=1) == 0) | (possible == 0).any(axis=1)
    return np.where(nothing, 0.0, scores)


def bleu(
    predictions: Sequence[str], references: Sequence[str], order: int, clusters: Sequence[Hashable] | None = None
) -> Score:
    """Corpus BLEU-`order` of sacrebleu with an interval over resampled clusters (reports, when none are given).

    Raises ValueError when there is no report.
    """
    from sacrebleu.metrics import BLEU

    if not predictions:
        raise ValueError("BLEU of no reports is not defined")
    metric = BLEU(tokenize="13a", max_ngram_order=order, force=True)
    value = metric.corpus_score(list(predictions), [list(references)]).score
    samples = statistics.resample(bleu_counts(predictions, references), clusters or range(len(predictions)))
    signature = f"bleu{order}|{metric.get_signature()}|scale:0-100|{_interval_signature(clusters)}"
    interval = statistics.percentile_interval(bleu_from_counts(samples, order))
    return Score(value=value, interval=interval, n=len(predictions), signature=signature)


def rouge_l_rows(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Precision, recall and F1 of ROUGE-L per report, float64 [n, 3] in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rows = [scorer.score(r, p)["rougeL"] for p, r in zip(predictions, references, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(len(predictions), 3)


def rouge_l(predictions: Sequence[str], references: Sequence[str], clusters: Sequence[Hashable] | None = None) -> Score:
    """Mean ROUGE-L F1 over the reports, with an interval over resampled clusters; ValueError without a report."""
    if not predictions:
        raise ValueError("ROUGE-L of no reports is not defined")
    f1 = rouge_l_rows(predictions, references)[:, 2]
    rows = np.stack([f1, np.ones_like(f1)], axis=1)
    samples = statistics.resample(rows, clusters or range(len(predictions)))
    version = importlib.metadata.version("rouge-score")
    signature = f"rougeL|stem:no|avg:mean-f1|scale:0-1|rouge-score:{version}|{_interval_signature(clusters)}"
    interval = statistics.percentile_interval(samples[:, 0] / samples[:, 1])
    return Score(value=float(f1.mean()), interval=interval, n=len(predictions), signature=signature)


def _interval_signature(clusters: Sequence[Hashable] | None) -> str:
    return interval_signature("report" if clusters is None else "patient")


def interval_signature(unit: str) -> str:
    """How the 95% intervals were made: resampled unit, number of draws, seed."""
    return f"ci:percentile-{statistics.DRAWS}-seed{statistics.SEED}|unit:{unit}"
