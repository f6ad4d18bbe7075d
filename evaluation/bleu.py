"""BLEU in the conventions that papers print, from n-gram counts kept per report.

Papineni et al. 2002. The conventions differ in tokens, case, smoothing, scale, and in whether reports are pooled: the same four pairs give
a BLEU-4 of 0.29 to 0.38. Each has its own name and signature here. Tokens "13a" are those of mteval-v13a as sacrebleu has them (Post 2018).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import statistics
from evaluation.metric import Metric, mean, mean_rows

ORDER = 4
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_13A = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokens_13a(text: str) -> list[str]:
    """mteval-v13a: punctuation stands alone, but a full stop or comma inside a number."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name, character in _ENTITIES.items():
        text = text.replace(name, character)
    text = f" {text} "
    for pattern, to in _13A:
        text = pattern.sub(to, text)
    return text.split()


def tokens_intl(text: str) -> list[str]:
    """mteval-v14 "international": any punctuation stands alone unless digits are on both sides of it, any symbol always."""
    kinds = [unicodedata.category(character) for character in text]
    out = list(text)
    for i, kind in enumerate(kinds):
        before = kinds[i - 1] if i else "N"
        after = kinds[i + 1] if i + 1 < len(kinds) else "N"
        alone = kind[0] == "P" and (before[0] != "N" or after[0] != "N")
        if alone or kind[0] == "S":
            out[i] = f" {text[i]} "
    return "".join(out).split()


def tokens_clean(text: str) -> list[str]:
    """Lower case, runs of letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def tokens_radcliq(text: str) -> list[str]:
    """Lower case, full stops split off, blanks: how RadCliQ prepares texts."""
    return text.lower().replace(".", " .").split()


@dataclass(frozen=True)
class Convention:
    """smooth: "exp" (the k-th order without a match counts 1 / 2^k), "none", "floor" (counts `floor`), "coco" (1e-15 and 1e-9 added)."""

    tokens: Callable[[str], list[str]]
    signature: str
    smooth: str = "exp"
    floor: float = 0.0
    scale: float = 100.0
    sentence: bool = False  # mean of the reports' scores; else the reports' counts are pooled


CONVENTIONS = {
    "sacrebleu": Convention(tokens_13a, "tok:13a|case:mixed|smooth:exp"),
    "sacrebleu-lower": Convention(lambda text: tokens_13a(text.lower()), "tok:13a|case:lc|smooth:exp"),
    "sacrebleu-intl": Convention(tokens_intl, "tok:intl|case:mixed|smooth:exp"),
    "hf": Convention(tokens_13a, "tok:13a|case:mixed|smooth:none", "none", scale=1.0),
    "coco": Convention(str.split, "tok:blank|case:mixed|smooth:coco", "coco", scale=1.0),
    "coco-clean": Convention(tokens_clean, "tok:alnum|case:lc|smooth:coco", "coco", scale=1.0),
    "radcliq": Convention(tokens_radcliq, "tok:radcliq|case:lc|smooth:floor-0.1", "floor", 0.1, 1.0, sentence=True),
}


def counts(prediction: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """[10]: matching n-grams of orders 1 to 4, predicted n-grams of orders 1 to 4, predicted length, closest reference length."""
    matches = []
    for order in range(1, ORDER + 1):
        said = _ngrams(prediction, order)
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= _ngrams(reference, order)
        matches.append(sum(min(number, most[gram]) for gram, number in said.items()))
    length = len(prediction)
    closest = min((abs(len(r) - length), len(r)) for r in references)[1]
    return [*matches, *(max(0, length - order) for order in range(ORDER)), length, closest]


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def count_rows(predictions: Sequence[str], references: Sequence[str], convention: Convention) -> np.ndarray:
    """`counts` of every pair, float64 [n, 10]."""
    tokens = convention.tokens
    rows = [counts(tokens(p), [tokens(r)]) for p, r in zip(predictions, references, strict=True)]
    return np.array(rows, np.float64).reshape(len(predictions), 2 * ORDER + 2)


def from_counts(totals: np.ndarray, order: int, convention: Convention) -> np.ndarray:
    """BLEU of order `order`, [m], in the convention's scale, from summed counts [m, 10]."""
    matches, possible = totals[:, :order].astype(float), totals[:, ORDER : ORDER + order].astype(float)
    length, reference = totals[:, -2].astype(float), totals[:, -1].astype(float)
    if convention.smooth == "coco":  # its brevity penalty is also smoothed, and nothing is ever exactly zero
        precision = (matches + 1e-15) / (possible + 1e-9)
        ratio = (length + 1e-15) / (reference + 1e-9)
        brevity = np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))
        return convention.scale * brevity * np.exp(np.log(precision).mean(axis=1))
    empty = (matches == 0) & (possible > 0)
    if convention.smooth == "exp":
        matches = np.where(empty, 0.5 ** np.cumsum(empty, axis=1), matches)
    elif convention.smooth == "floor":
        matches = np.where(empty, convention.floor, matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.log(statistics.ratio(matches, possible)).mean(axis=1)
        brevity = np.minimum(0.0, 1.0 - statistics.ratio(reference, length))
        scores = convention.scale * np.exp(precision + brevity)
    # As sacrebleu: 0 when nothing matched at all, or when no report is long enough for the highest order.
    nothing = (totals[:, :order].sum(axis=1) == 0) | (possible == 0).any(axis=1)
    return np.where(nothing, 0.0, scores)


def metric(
    predictions: Sequence[str], references: Sequence[str], order: int, convention: str, rows: np.ndarray | None = None
) -> Metric:
    """BLEU-`order` as a `Metric`; `rows` when `count_rows` was computed before."""
    how = CONVENTIONS[convention]
    if rows is None:
        rows = count_rows(predictions, references, how)
    pooled = "mean" if how.sentence else "corpus"
    signature = f"bleu|order:{order}|{how.signature}|agg:{pooled}|scale:0-{how.scale:g}"
    name = f"bleu_{order}"
    if how.sentence:
        scores = from_counts(rows, order, how)
        return Metric(name, signature, mean_rows(scores), mean, len(rows), how.scale)
    return Metric(name, signature, rows, lambda totals: from_counts(totals, order, how), len(rows), how.scale)
