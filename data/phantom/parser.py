"""Reads findings out of text: the judge of generated phantom reports. It sees nothing but the text.

Built for the wording of `data.phantom.report`, and forgiving towards imperfect text: half sentences, repetitions,
unknown words and contradictions. A finding that is both stated and denied counts as stated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from data.labels import CHEXPERT, NOT_STATED
from data.phantom.findings import DEVICES, FINDINGS, VOCABULARY, Finding

Key = tuple[str, str | None, str | None, str | None]

_MENTION = re.compile(
    r"(?P<cardiomegaly>cardiomegaly|\benlarg\w+)"
    r"|(?P<pleural_effusion>\beffusions?\b|\bpleural fluid\b)"
    r"|(?P<pneumothorax>\bpneumothora\w+)"
    r"|(?P<consolidation>\bconsolidations?\b|\bairspace (?:opacity|opacities|disease)\b)"
    r"|(?P<nodule>\bnodul\w+)"
    r"|(?P<endotracheal_tube>\bendotracheal(?: tube)?\b|\bet tube\b)"
    r"|(?P<central_line>\bcentral (?:venous )?(?:line|catheter)s?\b)"
    r"|(?P<pacemaker>\bpacemakers?\b)"
)
_NEGATION = re.compile(r"\b(?:no|not|without|neither|nor|absent|absence of|free of)\b")
_REVERSAL = re.compile(r"\b(?:but|however|although|except)\b")
_NORMAL: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"\b(?:heart|cardiac)\b.*\bnormal\b|\bnormal\b.*\b(?:heart|cardiac)\b"), ("cardiomegaly",)),
    (re.compile(r"\blungs?\b.*\bclear\b|\bclear lungs?\b"), ("consolidation", "nodule")),
    (re.compile(r"\bno (?:lines|tubes|support devices|lines or tubes|tubes or lines)\b"), DEVICES),
)
_JOINT = re.compile(r",|\band\b|\bwith\b|\bbut\b|\bor\b|\bplus\b")


def parse(text: str) -> list[Key]:
    """Findings that a report states, as (finding, side, size, place) in the order of `FINDINGS`.

    A side, size or place that the sentence does not name is None. A mention that says less than another of the same
    finding is dropped; mentions that differ (both sides, say) are all returned.
    """
    keys: list[Key] = []
    for name, denied, clause in _mentions(text):
        if denied:
            continue
        sides, sizes, places = VOCABULARY[name]
        for side in _named(clause, sides) or [None]:
            key = (name, side, _first(clause, sizes), _first(clause, places))
            if key not in keys:
                keys.append(key)
    kept = [k for k in keys if not any(k is not other and _says_less(k, other) for other in keys)]
    return sorted(kept, key=lambda k: FINDINGS.index(k[0]))


def locate(text: str, name: str) -> tuple[int, int] | None:
    """Where in the text the words that name a finding stand, first mention that is not a denial; None when there is none."""
    for sentence in re.finditer(r"[^.\n]+", text):
        lower = sentence.group().lower()
        if name in (key[0] for key in parse(lower)):
            for match in _MENTION.finditer(lower):
                if match.lastgroup == name:
                    return sentence.start() + match.start(), sentence.start() + match.end()
    return None


def parse_denied(text: str) -> list[str]:
    """Names of the findings that a report denies and does not state, in the order of `FINDINGS`."""
    denied = {name for name, no, _ in _mentions(text) if no}
    for sentence in _sentences(text):
        for pattern, names in _NORMAL:
            if pattern.search(sentence):
                denied |= set(names)
    return [name for name in FINDINGS if name in denied - {key[0] for key in parse(text)}]


def chexpert_labels(findings: Iterable[Finding | Key | str], denied: Iterable[str] = ()) -> list[int]:
    """The 14 CheXpert classes: 1 present, 0 denied, -2 not stated.

    As in the CheXpert labeler (Irvin et al. 2019), No Finding is 1 when nothing but support devices is present.

    Args:
        findings: what is present, as findings, keys or names.
        denied: names of what the text denies.
    """
    labels = dict.fromkeys(CHEXPERT, NOT_STATED)
    for name in denied:
        # "No endotracheal tube" alone does not say that there is no device: only all of them together do.
        if name not in DEVICES:
            labels |= dict.fromkeys(_CLASSES[name], 0)
    if set(DEVICES) <= set(denied):
        labels["Support Devices"] = 0
    present = {f if isinstance(f, str) else f.finding if isinstance(f, Finding) else f[0] for f in findings}
    for name in present:
        labels |= dict.fromkeys(_CLASSES[name], 1)
    if not present - set(DEVICES):
        labels["No Finding"] = 1
    return [labels[name] for name in CHEXPERT]


_CLASSES: dict[str, tuple[str, ...]] = {
    "cardiomegaly": ("Cardiomegaly",),
    "pleural_effusion": ("Pleural Effusion",),
    "pneumothorax": ("Pneumothorax",),
    "consolidation": ("Consolidation", "Lung Opacity"),
    "nodule": ("Lung Lesion",),
} | dict.fromkeys(DEVICES, ("Support Devices",))


def _sentences(text: str) -> list[str]:
    return [s for s in re.split(r"[.;!?\n]+", text.lower()) if s.strip()]


def _mentions(text: str) -> Iterable[tuple[str, bool, str]]:
    """Every mention of a finding: (name, whether it is denied, the clause with its attributes)."""
    for sentence in _sentences(text):
        found = list(_MENTION.finditer(sentence))
        start = 0
        for k, match in enumerate(found):
            end = _cut(sentence, match.end(), found[k + 1].start()) if k + 1 < len(found) else len(sentence)
            before, after = sentence[: match.start()], sentence[match.end() :]
            scope = before[max((m.end() for m in _REVERSAL.finditer(before)), default=0) :]
            denied = bool(_NEGATION.search(scope) or re.match(r"\s+(?:is|are) (?:not|absent)\b", after))
            yield str(match.lastgroup), denied, sentence[start:end]
            start = end


def _cut(sentence: str, start: int, end: int) -> int:
    """Where, between two mentions, the words stop belonging to the first: at a comma or a joining word."""
    joint = _JOINT.search(sentence, start, end)
    return joint.start() if joint else start


def _named(clause: str, words: tuple[str, ...]) -> list[str | None]:
    if words and re.search(r"\b(?:bilateral\w*|both)\b", clause):
        return list(words)
    return [word for word in words if re.search(rf"\b{word}(?:ly)?\b", clause)]


def _first(clause: str, words: tuple[str, ...]) -> str | None:
    found = [(m.start(), word) for word in words if (m := re.search(rf"\b{word}(?:ly)?\b", clause))]
    return min(found)[1] if found else None


def _says_less(key: Key, other: Key) -> bool:
    """Whether `key` is `other` with something left out."""
    return key != other and all(a is None or a == b for a, b in zip(key, other, strict=True))
