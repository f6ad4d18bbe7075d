"""ROUGE-1, -2 and -L as rouge-score computes them (Lin 2004), and the ROUGE-L of the COCO caption scorer.

rouge-score: lower case, [a-z0-9] tokens, F1, with or without Porter's stemmer. COCO: tokens between blanks, case kept, F with beta 1.2,
which favours recall. The LLaVA-Rad evaluation prints the median of 500 bootstrap means of the first; `bootstrap_of_means` gives it.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence

import numpy as np

from evaluation.metric import Metric, mean, mean_rows

KINDS = ("rouge1", "rouge2", "rougeL")
COCO_BETA = 1.2


def installed() -> bool:
    """Whether rouge-score is there (pip install rad_jax[eval])."""
    return importlib.util.find_spec("rouge_score") is not None


def scores(predictions: Sequence[str], references: Sequence[str], stemmer: bool) -> np.ndarray:
    """Precision, recall and F1 of ROUGE-1, ROUGE-2 and ROUGE-L per report, float64 [n, 3 kinds, 3] in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(KINDS), use_stemmer=stemmer)
    found = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return np.array([[tuple(score[kind]) for kind in KINDS] for score in found], np.float64).reshape(-1, 3, 3)


def metrics(predictions: Sequence[str], references: Sequence[str], stemmer: bool) -> list[Metric]:
    """rouge_1, rouge_2 and rouge_l as means over the reports."""
    version = importlib.metadata.version("rouge-score")
    how = f"stem:{'porter' if stemmer else 'no'}|f:1|agg:mean|scale:0-1|rouge-score:{version}"
    columns = scores(predictions, references, stemmer)[:, :, 2].T
    return [
        Metric(f"rouge_{kind[5:].lower()}", f"{kind}|{how}", mean_rows(column), mean, len(column))
        for kind, column in zip(KINDS, columns, strict=True)
    ]


def bootstrap_of_means(values: np.ndarray, draws: int = 500, seed: int = 3, level: float = 0.95) -> np.ndarray:
    """Low, middle and high [3] of the bootstrap means of `values` [n], as rouge-score's BootstrapAggregator draws them with numpy's global
    generator seeded just before."""
    generator = np.random.RandomState(seed)  # the legacy generator is the convention
    means = [values[generator.choice(np.arange(len(values)), size=len(values))].mean() for _ in range(draws)]
    tail = 50.0 * (1.0 - level)
    return np.percentile(means, [tail, 50.0, 100.0 - tail])


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        corner = 0
        for j, other in enumerate(second, start=1):
            corner, row[j] = row[j], corner + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def coco_rouge_l(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L of one pair of token lists with beta 1.2; 0 when nothing is common."""
    common = longest_common(prediction, reference)
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return (1 + COCO_BETA**2) * precision * recall / (recall + COCO_BETA**2 * precision)


def coco_metric(
    predictions: Sequence[str], references: Sequence[str], tokens: Callable[[str], list[str]], how: str
) -> Metric:
    """rouge_l as the COCO scorer has it; `how` says which tokens, for the signature."""
    values = [coco_rouge_l(tokens(p), tokens(r)) for p, r in zip(predictions, references, strict=True)]
    signature = f"rougeL|{how}|f:{COCO_BETA}|agg:mean|scale:0-1|coco"
    return Metric("rouge_l", signature, mean_rows(np.array(values, np.float64)), mean, len(values))
