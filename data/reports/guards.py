"""What a rewritten report must not have changed: numbers, findings and their denials, sides.

The guards read words (`terms`), so they miss what the lexicon does not name and now and then refuse a faithful text; what is refused is kept
with the reason. Whether a finding is certain or possible is not guarded.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass, field

from data.reports import terms

# Reasons, the same for every report, so that they can be counted.
NEW_NUMBER = "a number is new"
LOST_MEASURE = "a measurement is lost"
INVENTED = "a finding is invented"
LOST = "a finding is lost"
DENIED = "a finding is denied"
AFFIRMED = "a denial is turned round"
NEW_DENIAL = "a denial is invented"
LOST_DENIAL = "a denial is lost"
SIDE = "a side is changed"
LOST_SIDE = "a side is lost"
NOT_ENGLISH = "not English"

_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
_MEASURE = re.compile(r"(\d+(?:[.,]\d+)?) ?-?(?:mm|cm)\b")
_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|\n+")
_FOREIGN = re.compile(
    r"\b(?:sin|derram\w*|neumo\w*|izquierd\w*|derech\w*|esquerd\w*|direit\w*|sem|pulmonares|se observ\w*)\b"
)
_PRIOR = re.compile(terms.PRIOR)


@dataclass
class Said:
    """What a text says of one finding: the sides of its affirmed mentions, and how it is mentioned."""

    affirmed: bool = False
    denied: bool = False
    gone: bool = False
    sides: set[str] = field(default_factory=set)
    near: set[str] = field(default_factory=set)  # sides named anywhere in its sentences


def fault(source: str, output: str, language: str = "en") -> tuple[str, str] | None:
    """The first thing in which an English `output` is unfaithful to a `source` in `language`.

    Args:
        source, output: findings and impression as running text.
        language: one of `terms.LANGUAGES`.

    Returns:
        Reason (one of the constants above) and what it is about, or None.
    """
    plain_source, plain = plain_text(source), plain_text(output)
    if language != "en" and (found := _FOREIGN.search(plain)):
        return NOT_ENGLISH, found[0]
    if numbers := _numbers(plain_source, plain, language):
        return numbers
    before, after = findings(source, language), findings(output, "en")
    for name in before.keys() | after.keys():
        if reason := _unfaithful(before.get(name, Said()), after.get(name, Said())):
            return reason, name
    return None


def _numbers(source: str, output: str, language: str) -> tuple[str, str] | None:
    known = {_value(number) for number in _NUMBER.findall(source)}
    for number in _NUMBER.findall(output):
        if _value(number) not in known:
            return NEW_NUMBER, number
    kept = {_value(number) for number in _NUMBER.findall(output)}
    compared = re.compile(f"{terms.PRIOR}|{_gone(language).pattern}|\\bfrom\\b")
    for sentence in _SENTENCE.split(source):
        if not compared.search(sentence):
            for number in _MEASURE.findall(sentence):
                if _value(number) not in kept:
                    return LOST_MEASURE, number
    return None


def _unfaithful(before: Said, after: Said) -> str | None:
    """What became of one finding, where that is wrong."""
    mentioned = before.affirmed or before.denied or before.gone
    if not mentioned:
        return INVENTED if after.affirmed else NEW_DENIAL if after.denied else None
    if before.gone:
        return None
    if after.affirmed and not before.affirmed:
        return AFFIRMED
    if before.affirmed and not after.affirmed:
        return DENIED if after.denied else LOST
    if before.denied and not (after.denied or after.affirmed):
        return LOST_DENIAL
    if after.denied and not before.denied:
        return NEW_DENIAL
    if after.sides - (before.sides or before.near):
        return SIDE
    return LOST_SIDE if before.sides and not after.near else None


def findings(text: str, language: str = "en") -> dict[str, Said]:
    """Finding -> what a text says of it; findings that it does not mention are left out."""
    out: dict[str, Said] = {}
    for sentence in _SENTENCE.split(plain_text(text)):
        for name, own in _of_sentence(sentence, language):
            said = out.setdefault(name, Said())
            said.affirmed |= own.affirmed
            said.denied |= own.denied
            said.gone |= own.gone
            said.sides |= own.sides
            said.near |= own.near
    return out


@functools.lru_cache(maxsize=50_000)
def _of_sentence(sentence: str, language: str) -> tuple[tuple[str, Said], ...]:
    """(finding, what is said of it) of every mention. Cached: reports repeat each other's sentences."""
    named = [(m.start(), m.end(), str(m.lastgroup)) for m in _names(language).finditer(sentence)]
    if not named:
        return ()
    near, gone, out = _sides(sentence, language), _gone(language).search(sentence) is not None, []
    for place, (start, end, name) in enumerate(named):
        if _denied(sentence[:start], sentence[end:], language):
            out.append((name, Said(denied=True)))
        elif gone:
            out.append((name, Said(gone=True)))
        else:
            previous = named[place - 1][1] if place else 0
            following = named[place + 1][0] if place + 1 < len(named) else len(sentence)
            own = _own_sides(sentence[previous:start], sentence[end:following], language)
            out.append((name, Said(affirmed=True, sides=own, near=near)))
    return tuple(out)


def residue(text: str) -> list[str]:
    """Words of an English text that speak of an earlier image, in order; "stable" and "new" may be innocent."""
    return [found[0] for found in _PRIOR.finditer(plain_text(text))]


def plain_text(text: str) -> str:
    """Lower case, without accents."""
    parts = unicodedata.normalize("NFD", text.lower())
    return "".join(c for c in parts if not unicodedata.combining(c))


def _value(number: str) -> float:
    return float(number.replace(",", "."))


def _denied(before: str, after: str, language: str) -> bool:
    """Whether a denial before a finding reaches it, or one after it is about it."""
    number, last = list(terms.LANGUAGES).index(language), None
    for last in re.finditer(terms.DENIED_BEFORE[number], before):  # noqa: B007
        pass
    if last is not None and not re.search(terms.ENDS[number], before[last.end() :]):
        return True
    return re.search(terms.DENIED_AFTER[number], after) is not None


def _own_sides(before: str, after: str, language: str) -> set[str]:
    """The sides of a finding between its neighbours: English names them before it, Spanish and Portuguese after; elsewhere only where none is there."""
    close, far = (before, after) if language == "en" else (after, before)
    for text, from_end in ((close, language == "en"), (far, language != "en")):
        found = list(_side(language).finditer(text))
        if found:
            return _sides(found[-1 if from_end else 0][0], language)
    return set()


def _sides(text: str, language: str) -> set[str]:
    number = list(terms.LANGUAGES).index(language)
    found = {name for name, words in terms.SIDES.items() if re.search(rf"\b(?:{words[number]})", text)}
    return {"left", "right"} if "both" in found else found


@functools.cache
def _side(language: str) -> re.Pattern[str]:
    """A side, or two that are joined, as "right greater than left"."""
    number = list(terms.LANGUAGES).index(language)
    one = "(?:" + "|".join(words[number] for words in terms.SIDES.values()) + ")"
    return re.compile(rf"\b{one}(?:[ -](?:and|or|y|o|e|ou|(?:\w+ )?than|(?:\w+ )?que)[ -](?:\w+ )?{one})?")


@functools.cache
def _names(language: str) -> re.Pattern[str]:
    """Every finding, as a group of its name."""
    number = list(terms.LANGUAGES).index(language)
    return re.compile(
        r"\b(?:" + "|".join(f"(?P<{name}>{words[number]})" for name, words in terms.FINDINGS.items()) + ")"
    )


@functools.cache
def _gone(language: str) -> re.Pattern[str]:
    return re.compile(terms.GONE[list(terms.LANGUAGES).index(language)])
