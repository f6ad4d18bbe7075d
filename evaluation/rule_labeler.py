"""Labels of the 14 CheXpert classes read from report text by rules: mention, negation, uncertainty. Needs no weights.

A report is cut into sentences and clauses; in each clause the lexicon finds mentions of a class; the words before and after decide
whether a mention is denied, doubted or affirmed; a class takes the strongest of its mentions (positive, then uncertain, then negative).
"No Finding" is positive when nothing but support devices is positive or uncertain. Classes and definition are those of the CheXpert
labeler (Irvin et al. 2019), which parses dependencies; this one reads words, and lexicon and rules are its own.

On 1,653 Open-I reports its positives agree with that labeler's to micro F1 0.918; without the 73 reports in which that labeler calls a
plainly normal heart or mediastinum positive, to 0.947 (macro 0.898). Rules made on one half of the reports alone reached 0.909 and 0.938
on the other. `launch.label --against` measures it again.
"""

import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from evaluation import lexicon
from evaluation.labels import BLANK, CLASSES, NEGATIVE, POSITIVE, UNCERTAIN

VERSION = 1  # of lexicon and rules; part of every signature
_STRENGTH = {BLANK: 0, NEGATIVE: 1, UNCERTAIN: 2, POSITIVE: 3}
_OTHER = "other"  # abnormal, of none of the classes


def label(text: str, habits: bool = True) -> np.ndarray:
    """Codes int8 [14] of one report, in the order of `labels.CLASSES`. A report without a word has no label at all.

    habits: keep two habits of the CheXpert labeler that label files made with it have (`lexicon.HABITS`, `lexicon.UPPER_LIMIT`).
    """
    found: dict[str, int] = {}
    for sentence in sentences(text):
        for name, code in _sentence_codes(sentence, habits):
            found[name] = max(found.get(name, BLANK), code, key=_STRENGTH.__getitem__)
    told = {code for name, code in found.items() if name != lexicon.DEVICES}
    if text.strip() and not told & {POSITIVE, UNCERTAIN}:
        found[lexicon.NO_FINDING] = POSITIVE
    return np.array([found.get(name, BLANK) for name in CLASSES], np.int8)


def label_all(texts: Sequence[str], habits: bool = True) -> np.ndarray:
    """Codes int8 [n, 14] of n reports."""
    return np.array([label(text, habits) for text in texts], np.int8).reshape(len(texts), len(CLASSES))


def sentences(text: str) -> list[str]:
    """The sentences of a report in lower case; numbers of a list and empty ones are dropped, decimals stay whole."""
    plain = re.sub(r"(?:^|(?<=\s))\d+[.)]\s", ". ", " ".join(text.lower().split()))
    parts = re.split(r"(?<=[.!?])(?<!\bdr\.)(?<!\bvs\.)(?:\s+|(?=[a-z]))", plain)
    return [part for part in parts if part.strip(" .")]


def _any(patterns: Iterable[str], start: str = "") -> re.Pattern[str]:
    return re.compile(f"{start}(?:{'|'.join(patterns)})")


_WORD_START = "(?<![a-z0-9-])"
_BREAK = _any(lexicon.CLAUSE_BREAKS)
_END_OF_NEGATION = re.compile(lexicon.ENDS_NEGATION)
_EXCLUDED = {name: _any(words, _WORD_START) for name, words in lexicon.EXCLUDED.items()}
_FIRST_BEFORE, _FIRST_AFTER = _any(lexicon.DOUBTED_FIRST_BEFORE), _any(lexicon.DOUBTED_FIRST_AFTER)
_DENIED_BEFORE, _DENIED_AFTER = _any(lexicon.DENIED_BEFORE), _any(lexicon.DENIED_AFTER)
_DOUBTED_BEFORE, _DOUBTED_AFTER = _any(lexicon.DOUBTED_BEFORE), _any(lexicon.DOUBTED_AFTER)
_NORMAL, _ENLARGED, _STABLE = _any(lexicon.NORMAL), _any(lexicon.ENLARGED), _any(lexicon.STABLE)
_UPPER_LIMIT = re.compile(lexicon.UPPER_LIMIT)
_JOINT = re.compile(r",| and | with ")
_SLASH_BEFORE, _SLASH_AFTER = re.compile(r"[a-z]/$"), re.compile(r"/[a-z]")


@functools.cache
def _mentions(habits: bool) -> list[tuple[str, str, re.Pattern[str]]]:
    """(kind, class, pattern) of everything that is looked for."""
    diseases = {**lexicon.DISEASES, _OTHER: lexicon.OTHER_FINDINGS}
    if habits:
        diseases = {name: (*words, *lexicon.HABITS.get(name, ())) for name, words in diseases.items()}
    tables = {"disease": diseases, "structure": lexicon.STRUCTURES, "hint": lexicon.HINTS}
    return [(kind, name, _any(words, _WORD_START)) for kind, table in tables.items() for name, words in table.items()]


@functools.lru_cache(maxsize=100_000)
def _sentence_codes(sentence: str, habits: bool) -> tuple[tuple[str, int], ...]:
    """(class, code) of every mention in a sentence. Cached: reports repeat each other's sentences."""
    return tuple(
        (name, code) for clause in _BREAK.split(sentence) for name, code, _, _ in _clause_mentions(clause, habits)
    )


def _clause_mentions(clause: str, habits: bool) -> list[tuple[str, int, int, int]]:
    """(class, code, start, end) of every mention in a clause."""
    out = []
    for kind, name, pattern in _mentions(habits):
        searched = _EXCLUDED[name].sub(lambda m: " " * len(m[0]), clause) if name in _EXCLUDED else clause
        for found in pattern.finditer(searched):
            before, after = clause[: found.start()], clause[found.end() :]
            out.append((name, _code(kind, name, found[0], before, after, habits), found.start(), found.end()))
    return out


@functools.lru_cache(maxsize=100_000)
def _sentence_positives(sentence: str) -> tuple[tuple[str, str, str], ...]:
    out = []
    for clause in _BREAK.split(sentence):
        named = [found for found in _clause_mentions(clause, habits=False) if found[0] != _OTHER]
        for name, code, start, end in named:
            if code == POSITIVE:
                before = max((other[3] for other in named if other[3] <= start), default=0)
                after = min((other[2] for other in named if other[2] >= end), default=len(clause))
                own = clause[before:start]
                out.append((name, _JOINT.split(own)[-1] if before else own, clause[end:after]))
    return tuple(out)


def positive_mentions(text: str) -> list[tuple[str, str, str]]:
    """(class, words before, words after) of every positive mention of a class: what stands between it and its neighbours in the clause."""
    return [found for sentence in sentences(text) for found in _sentence_positives(sentence)]


def _code(kind: str, name: str, mention: str, before: str, after: str, habits: bool) -> int:
    """What the words before and after a mention, within its clause, make of it."""
    if _FIRST_BEFORE.search(before) or _FIRST_AFTER.search(after):
        return UNCERTAIN
    if _reaches_end(_DENIED_BEFORE, before) or _DENIED_AFTER.search(after):
        return NEGATIVE
    if kind == "structure":
        return _structure_code(mention, before, after, habits)
    slash = name != lexicon.DEVICES and (_SLASH_BEFORE.search(before) or _SLASH_AFTER.match(after))
    if kind == "hint" or slash or _DOUBTED_BEFORE.search(before) or _DOUBTED_AFTER.search(after):
        return UNCERTAIN
    return POSITIVE


def _structure_code(mention: str, before: str, after: str, habits: bool) -> int:
    """A heart or contour is what is said of it, nearest first: between its commas, then in the whole clause."""
    clause = before + mention + after
    own = before.rpartition(",")[2] + mention + after.partition(",")[0]
    if habits and _UPPER_LIMIT.search(own):
        return POSITIVE
    if _NORMAL.search(own):
        return NEGATIVE
    if _ENLARGED.search(own):
        return POSITIVE
    if _NORMAL.search(clause):
        return NEGATIVE
    return UNCERTAIN if _STABLE.search(clause) else POSITIVE


def _reaches_end(pattern: re.Pattern[str], before: str) -> bool:
    """Whether the last match of `pattern` is not cut off by a word that ends a negation."""
    last = None
    for last in pattern.finditer(before):  # noqa: B007
        pass
    return last is not None and not _END_OF_NEGATION.search(before, last.end())
