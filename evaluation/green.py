"""GREEN-style judging: matched findings beside clinically significant errors (Ostmeier et al. 2024).

A report's score is matched / (matched + significant errors), 0 without a match. The prompt is our own and asks for JSON; the text form of the
published GREEN models is read too. Where their parser takes a missing block for no error and an unreadable count for 0, ours fails the report.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.chexprompt import COUNTS, LEVELS, TYPES, values
from evaluation.judging import PROMPTS, Judge, Pair, Scores, single_question
from rad_jax.chat import schema, templates
from rad_jax.chat.client import Question, UnusableError

NAME, VERSION = "green", 1
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"matched": {"type": "integer", "minimum": 0}, **dict.fromkeys(LEVELS, COUNTS)},
    "required": ["matched", *LEVELS],
    "additionalProperties": False,
}
NO_BLOCK, NO_COUNT = "a block is missing", "a count is missing"
_ERROR = re.compile(r"^\s*[(\[]?([a-f1-6])[)\]]\s*[^:\n]*:\s*(\d+)\b", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Counts:
    """Matched findings, and errors by type A to F."""

    matched: int
    significant: tuple[int, ...]
    insignificant: tuple[int, ...]


def parse(reply: str) -> Counts:
    """The counts of a reply, JSON or the blocks of a GREEN model. Raises UnusableError where one is missing."""
    if "[clinically significant errors]" in reply.lower():
        return _of_blocks(reply)
    value = schema.read(reply, SCHEMA)
    return Counts(value["matched"], *(tuple(value[level][kind] for kind in TYPES) for level in LEVELS))


def _of_blocks(reply: str) -> Counts:
    """[Clinically Significant Errors], [Clinically Insignificant Errors] and [Matched Findings], types (a) to (f) or (1) to (6)."""
    counted = []
    for level in LEVELS:
        found = {
            "abcdef123456".index(kind.lower()) % 6: int(n)
            for kind, n in _ERROR.findall(_block(reply, f"Clinically {level} Errors"))
        }
        if set(found) != set(range(6)):
            raise UnusableError(NO_COUNT, f"not all six types of {level} errors are counted")
        counted.append(tuple(found[i] for i in range(6)))
    matched = re.match(r"\s*(\d+)\b", _block(reply, "Matched Findings"))
    if not matched:
        raise UnusableError(NO_COUNT, "the matched findings are not counted")
    return Counts(int(matched[1]), counted[0], counted[1])


def _block(reply: str, name: str) -> str:
    found = re.search(rf"\[{name}\]:?(.*?)(?=\n\s*\[[A-Z]|\Z)", reply, re.IGNORECASE | re.DOTALL)
    if not found:
        raise UnusableError(NO_BLOCK, f"the block [{name}] is missing")
    return found[1]


def scores(counts: Counts) -> Scores:
    """A report's score, and what it is made of."""
    errors = sum(counts.significant)
    value = counts.matched / (counts.matched + errors) if counts.matched else 0.0
    return {NAME: value, f"{NAME}_matched": float(counts.matched), f"{NAME}_significant": float(errors)}


def judge(prompt_file: Path | None = None) -> Judge:
    """The judge, with our prompt or another file's."""
    prompt = templates.load(prompt_file or PROMPTS / "green.txt", {"reference", "candidate"})

    def question(pair: Pair, vote: int) -> Question:
        asked = SCHEMA if prompt_file is None else None
        return Question(pair.id, prompt.fill(values(pair)), parse, asked, vote)

    return Judge(
        NAME,
        f"{NAME}-v{VERSION}|prompt:{prompt.sha256}",
        single_question(question, scores),
        lambda p, v: [question(p, v)],
    )
