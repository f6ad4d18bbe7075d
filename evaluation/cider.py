"""CIDEr-D as the COCO caption scorer computes it (Vedantam et al. 2015): n-grams weighted by how rare they are among the references.

Term frequency times the logarithm of references over references that have the n-gram; cosine of orders 1 to 4 with the prediction's
weights clipped to the reference's, damped by a Gaussian of the difference in length (sigma 6), times 10. The weights come from the
references of the test set, so the same pair scores differently in another set: the signature says how many there were.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from evaluation.metric import Metric, mean, mean_rows

ORDER, SIGMA = 4, 6.0
Vector = dict[tuple[str, ...], float]


def scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of every pair of token lists, float64 [n]."""
    grams = [[_ngrams(text) for text in side] for side in (predictions, references)]
    frequency = Counter(gram for counts in grams[1] for gram in counts)
    documents = np.log(float(max(1, len(references))))
    out = []
    for said, true in zip(*grams, strict=True):
        vectors = [_vectors(counts, frequency, documents) for counts in (said, true)]
        lengths = [sum(number for gram, number in counts.items() if len(gram) == 2) for counts in (said, true)]
        damping = np.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * SIGMA**2))
        out.append(10.0 * damping * np.mean([_cosine(*pair) for pair in zip(*vectors, strict=True)]))
    return np.array(out, np.float64)


def metric(
    predictions: Sequence[str], references: Sequence[str], tokens: Callable[[str], list[str]], how: str
) -> Metric:
    """cider as a mean over the reports; `how` says which tokens, for the signature."""
    values = scores([tokens(text) for text in predictions], [tokens(text) for text in references])
    signature = f"cider-d|{how}|n:{ORDER}|sigma:{SIGMA:g}|idf:{len(references)}-references|agg:mean|scale:0-10"
    return Metric("cider", signature, mean_rows(values), mean, len(values), 10.0)


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1))


def _vectors(counts: Counter[tuple[str, ...]], frequency: Counter[tuple[str, ...]], documents: float) -> list[Vector]:
    """One vector per order."""
    out: list[Vector] = [{} for _ in range(ORDER)]
    for gram, number in counts.items():
        out[len(gram) - 1][gram] = number * (documents - np.log(max(1, frequency[gram])))
    return out


def _cosine(said: Vector, true: Vector) -> float:
    """The prediction's weights clipped to the reference's; 0 where a side has none."""
    norms = [np.sqrt(sum(weight**2 for weight in vector.values())) for vector in (said, true)]
    common = sum(min(weight, true[gram]) * true[gram] for gram, weight in said.items() if gram in true)
    return common / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0
