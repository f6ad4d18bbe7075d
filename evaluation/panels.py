"""What averages hide: findings left out and made up, sides and denials turned round, words about earlier images, repetition.

Read by the weight-free labeler, so they cost nothing and need no model. Each is a rate with its own denominator; all but distinctness are
`Metric`s, so they get intervals, tests and subgroups like every other score. Lower is better, except for `length_ratio`, where 1 is.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation import lexicon, rule_labeler
from evaluation.labels import CLASSES, NEGATIVE, POSITIVE
from evaluation.metric import Metric, mean, mean_rows

NAMES = ("omission_rate", "invention_rate", "negation_flip_rate", "laterality_swap_rate", "prior_reference_rate",
         "repetition_rate", "length_ratio")  # fmt: skip
_FINDINGS = [i for i, name in enumerate(CLASSES) if name != lexicon.NO_FINDING]

# Words that only make sense beside an earlier image. "Stable" and "new" also have uses that do not ("stable position").
_PRIOR = re.compile(
    r"\b(?:unchanged|stable|again|interval(?:ly)?|compar(?:ed|ison)|prior|previous(?:ly)?|since|new(?:ly)?|worsen\w*|improv\w+|resol(?:ved|ving)"
    r"|increas(?:ed|ing)|decreas(?:ed|ing)|progress(?:ed|ing|ion)|persist\w*|no longer|redemonstrat\w+|similar to|has (?:developed|cleared))\b"
)
_SIDE = re.compile(r"\b(left|right|bilateral(?:ly)?|both)\b")
_BOTH = frozenset({"left", "right"})


def metrics(predictions: Sequence[str], references: Sequence[str], said: np.ndarray, true: np.ndarray) -> list[Metric]:
    """The rates over n pairs; `said` and `true` are the rule labeler's codes [n, 14] of predictions and references."""
    true_positive, said_positive = (table[:, _FINDINGS] == POSITIVE for table in (true, said))
    known = [np.isin(table[:, _FINDINGS], (POSITIVE, NEGATIVE)) for table in (true, said)]
    both = known[0] & known[1]
    flipped = both & (true_positive != said_positive)
    swaps = np.array([_swaps(p, r) for p, r in zip(predictions, references, strict=True)], np.float64).reshape(-1, 2)
    words = np.array([[len(p.split()), len(r.split())] for p, r in zip(predictions, references, strict=True)], float)
    how = f"labeler:rules-v{rule_labeler.VERSION}|labels:13"
    n = len(predictions)
    return [
        Metric("omission_rate", f"omissions|of:true-positives|{how}", _share(true_positive & ~said_positive, true_positive), mean, n),
        Metric("invention_rate", f"inventions|of:said-positives|{how}", _share(said_positive & ~true_positive, said_positive), mean, n),
        Metric("negation_flip_rate", f"negation-flips|of:certain-in-both|{how}", _share(flipped, both), mean, n),
        Metric("laterality_swap_rate", f"laterality-swaps|of:positive-with-a-side-in-both|{how}", swaps, mean, n),
        Metric("prior_reference_rate", "prior-references|of:reports", mean_rows(_any(_PRIOR, predictions)), mean, n),
        Metric("repetition_rate", "repeated-sentences|of:sentences", _repetition(predictions), mean, n),
        Metric("length_ratio", "words|of:reference-words", words, mean, n),
    ]  # fmt: skip


def distinctness(texts: Sequence[str]) -> dict[str, Any]:
    """How many different reports a system wrote: a share near 0 is a system that says the same of every image."""
    plain = Counter(" ".join(text.lower().split()) for text in texts)
    return {
        "distinct_share": len(plain) / len(texts) if texts else None,
        "most_frequent_share": max(plain.values()) / len(texts) if texts else None,
        "distinct_sentences": len({sentence for text in plain for sentence in rule_labeler.sentences(text)}),
    }


def sides(text: str) -> dict[str, frozenset[str]]:
    """Class -> the sides that its positive mentions name, in the words before them or, where none is, after them up to a comma. Classes
    without a side are left out."""
    out: dict[str, frozenset[str]] = {}
    for name, before, after in rule_labeler.positive_mentions(text):
        found = _SIDE.findall(before) or _SIDE.findall(after.partition(",")[0])
        named = frozenset(side for word in found for side in ((word,) if word in _BOTH else _BOTH))
        if named:
            out[name] = out.get(name, frozenset()) | named
    return out


def _swaps(prediction: str, reference: str) -> tuple[int, int]:
    """Findings whose side is the other one in the prediction, and findings with a side in both."""
    said, true = sides(prediction), sides(reference)
    shared = [name for name in said if name in true]
    return sum(not said[name] & true[name] for name in shared), len(shared)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Rows [n, 2] of how many of a report's classes are in `part` and in `whole`."""
    return np.stack([part.sum(axis=1), whole.sum(axis=1)], axis=1).astype(np.float64)


def _any(pattern: re.Pattern[str], texts: Sequence[str]) -> np.ndarray:
    return np.array([pattern.search(text.lower()) is not None for text in texts], np.float64)


def _repetition(texts: Sequence[str]) -> np.ndarray:
    """Rows [n, 2]: sentences that stood in the report before, and all sentences."""
    parts = [rule_labeler.sentences(text) for text in texts]
    return np.array([[len(p) - len({*p}), len(p)] for p in parts], np.float64).reshape(-1, 2)
