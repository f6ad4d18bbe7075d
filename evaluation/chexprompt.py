"""CheXprompt: a language model counts a report's errors, six types in two severities (Zambrano Chaves et al. 2025).

Types: A a finding that is false, B one that is left out, C a wrong location, D a wrong severity, E a comparison that the reference lacks, F one
of the reference that is left out. Prompt and worked examples are our own; a file of the user's may hold others, the official ones for instance.
The parser takes the two lists in every form in which models write them, and none that lacks a type or is cut.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.judging import PROMPTS, Judge, Pair, Scores, single_question
from rad_jax.chat import schema, templates
from rad_jax.chat.client import Question, UnusableError

NAME, VERSION = "chexprompt", 1  # of parser and aggregation
TYPES = "ABCDEF"
LEVELS = ("significant", "insignificant")
NO_LISTS, MISSING, TWICE = "not the two lists", "types are missing in a list", "lists contradict each other"
CUT, NOT_QUOTED, NOT_EVIDENT = "a list is cut", "evidence is not quoted", "evidence and counts differ"
FILTERED, EMPTY = "filtered", "empty answer"

_MARKS = re.compile(r"[*`#_]+")
_AFTER = re.compile(r"^\W*explanation\b", re.IGNORECASE | re.MULTILINE)
_HEADER = re.compile(r"clinically[\s-]+(in|non-?)?significant(?:\s+errors?)?[^\[\](){}:\n]{0,40}:?\s*", re.IGNORECASE)
_PAIR = r"([A-F])[\"')\]]*\s*[,:=]\s*[\"']?(\d{1,4})(?![\d.])"
_ITEM = r"[\[({]?\s*[\"']?" + _PAIR + r"[\"']?\s*[\])}]?"
_LIST = re.compile(rf"[\[({{]?\s*{_ITEM}(?:\s*,\s*{_ITEM})*[\s,]*[\])}}]*")

_COUNT = {"type": "integer", "minimum": 0}
COUNTS = {
    "type": "object",
    "properties": dict.fromkeys(TYPES, _COUNT),
    "required": [*TYPES],
    "additionalProperties": False,
}
_TEXTS = ("candidate_span", "reference_span", "note")
_ERROR = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": [*TYPES]},
        "level": {"type": "string", "enum": [*LEVELS]},
        **{name: {"type": "string"} for name in _TEXTS},
    },
    "required": ["type", "level", *_TEXTS],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"evidence": {"type": "array", "items": _ERROR}, **dict.fromkeys(LEVELS, COUNTS)},
    "required": ["evidence", *LEVELS],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Counts:
    """Errors by type A to F, and where they are, from a judge that points at them."""

    significant: tuple[int, ...]
    insignificant: tuple[int, ...]
    evidence: tuple[dict[str, str], ...] = ()


def parse(reply: str) -> Counts:
    """The counts of a reply: two lists under their headers, in any brackets, or a JSON object with both levels.

    Raises:
        UnusableError: not both lists, a list without all six types, or two lists of one level that differ.
    """
    text = _MARKS.sub("", reply).strip()
    if not text:
        raise UnusableError(EMPTY)
    if re.search(r"\bprompt was filtered\b", text, re.IGNORECASE):
        raise UnusableError(FILTERED)
    found = _of_json(reply) or _of_lists(_AFTER.split(text)[0])
    if missing := [level for level in LEVELS if level not in found]:
        raise UnusableError(NO_LISTS, f"it lacks the list of clinically {' and '.join(missing)} errors")
    for level, counts in found.items():
        if lacking := [kind for kind in TYPES if kind not in counts]:
            raise UnusableError(MISSING, f"the list of clinically {level} errors lacks {', '.join(lacking)}")
    return Counts(*_ordered(found))


def _ordered(found: Mapping[str, Mapping[str, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The counts of both levels, from A to F."""
    significant, insignificant = (tuple(found[level][kind] for kind in TYPES) for level in LEVELS)
    return significant, insignificant


def _of_lists(text: str) -> dict[str, dict[str, int]]:
    """Level -> type -> count, as far as there are lists right after a header."""
    found: dict[str, dict[str, int]] = {}
    for header in _HEADER.finditer(text):
        listed = _LIST.match(text, header.end())
        if not listed:
            continue
        if len(re.findall(r"[\[({]", listed[0])) > len(re.findall(r"[\])}]", listed[0])):
            raise UnusableError(CUT)
        items = re.findall(_PAIR, listed[0])
        counts = {kind: int(number) for kind, number in items}
        level = LEVELS[bool(header[1])]
        if len(counts) < len(items) or found.setdefault(level, counts) != counts:
            raise UnusableError(TWICE)
    return found


def _of_json(text: str) -> dict[str, dict[str, int]]:
    """The same of a JSON object in the text; empty where there is none of this form."""
    start, end = text.find("{"), text.rfind("}")
    try:
        value = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    found: dict[str, dict[str, int]] = {}
    for name, counts in value.items():
        level = re.fullmatch(r"(?:clinically[\s_-]*)?(in)?significant(?:[\s_-]*errors?)?", str(name), re.IGNORECASE)
        if level and isinstance(counts, dict):
            found[LEVELS[bool(level[1])]] = {k: v for k, v in counts.items() if type(v) is int and v >= 0}
    return found


def scores(counts: Counts) -> Scores:
    """A report's scores: counts of both levels and in all, whether it is free of errors, and the counts of every type."""
    sums = {level: sum(getattr(counts, level)) for level in LEVELS}
    total = sum(sums.values())
    out: dict[str, float] = {f"{NAME}_total": total, **{f"{NAME}_{level}": n for level, n in sums.items()}}
    out |= {f"{NAME}_error_free": float(total == 0), f"{NAME}_significant_free": float(sums["significant"] == 0)}
    for level in LEVELS:
        out |= {f"{NAME}_{level}_{kind}": n for kind, n in zip(TYPES, getattr(counts, level), strict=True)}
    return {name: float(value) for name, value in out.items()}


def parse_with_evidence(reply: str, pair: Pair) -> Counts:
    """The counts of a JSON reply that names every error with the words it is about.

    Raises:
        UnusableError: not of `SCHEMA`, words that stand in neither report, or errors named that are not as many as counted.
    """
    value = schema.read(reply, SCHEMA)
    plain = [" ".join(text.lower().split()) for text in (pair.candidate, pair.reference)]
    named: Counter[tuple[str, str]] = Counter()
    for error in value["evidence"]:
        named[error["level"], error["type"]] += 1
        spans = [" ".join(error[name].lower().split()) for name in ("candidate_span", "reference_span")]
        if not any(spans) or any(span not in text for span, text in zip(spans, plain, strict=True)):
            raise UnusableError(NOT_QUOTED, "a span in evidence is not copied from its report word for word")
    counts = {(level, kind): value[level][kind] for level in LEVELS for kind in TYPES}
    if wrong := [f"{level} {kind}" for (level, kind), n in counts.items() if named[level, kind] != n]:
        raise UnusableError(NOT_EVIDENT, f"evidence and counts differ for {', '.join(wrong)}")
    return Counts(*_ordered(value), tuple(value["evidence"]))


def judge_with_evidence(prompt_file: Path | None = None) -> Judge:
    """The judge that must point at every error it counts, in JSON."""
    prompt = templates.load(prompt_file or PROMPTS / "chexprompt_json.txt", {"reference", "candidate"})

    def question(pair: Pair, vote: int) -> Question:
        return Question(
            pair.id, prompt.fill(values(pair)), lambda text: parse_with_evidence(text, pair), SCHEMA, sample=vote
        )

    signature = f"{NAME}-json-v{VERSION}|prompt:{prompt.sha256}"
    return Judge(NAME, signature, single_question(question, scores), lambda p, v: [question(p, v)])


def judge(prompt_file: Path | None = None) -> Judge:
    """The judge, with our prompt or another file's. Raises UserError for a file that is no prompt with reference and candidate."""
    prompt = templates.load(prompt_file or PROMPTS / "chexprompt.txt", {"reference", "candidate"})

    def question(pair: Pair, vote: int) -> Question:
        return Question(pair.id, prompt.fill(values(pair)), parse, sample=vote)

    return Judge(
        NAME,
        f"{NAME}-v{VERSION}|prompt:{prompt.sha256}",
        single_question(question, scores),
        lambda p, v: [question(p, v)],
    )


def values(pair: Pair) -> Mapping[str, Any]:
    """What a prompt is filled with."""
    return {"reference": pair.reference, "candidate": pair.candidate}
