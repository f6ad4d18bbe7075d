"""CRIMSON-style judging: abnormal findings weighed by how urgent they are, wrong and invented ones taken off (the definition of its package, 0.2.0).

A model lists the abnormal findings that both reports have, those that the candidate lacks and those that it invents, each with a severity, and
what is wrong about the common ones. The arithmetic is the package's, in (-1, 1]; a report without abnormal findings on either side has 1.
The prompt is our own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.chexprompt import values
from evaluation.judging import PROMPTS, Judge, Pair, Scores, single_question
from rad_jax.chat import schema, templates
from rad_jax.chat.client import Question

NAME, VERSION = "crimson", 1
WEIGHTS = {"urgent": 1.0, "actionable": 0.5, "not_actionable": 0.25, "benign": 0.0}
ATTRIBUTES = {"significant": 0.5, "negligible": 0.0}  # what a wrong side, size or degree of a common finding weighs
LISTS = ("matched", "missed", "invented")


def _findings(**more: Any) -> dict[str, Any]:
    properties = {"finding": {"type": "string"}, "severity": {"type": "string", "enum": list(WEIGHTS)}, **more}
    item = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "items": item}


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "matched": _findings(errors={"type": "array", "items": {"type": "string", "enum": list(ATTRIBUTES)}}),
        "missed": _findings(),
        "invented": _findings(),
    },
    "required": list(LISTS),
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Matched:
    """An abnormal finding of the reference that the candidate names: its severity, and how severe each wrong attribute is."""

    severity: str
    attribute_errors: Sequence[str] = ()


@dataclass(frozen=True)
class Verdict:
    """Severities of `WEIGHTS`; `evidence` is what the model listed, as lines for people."""

    matched: Sequence[Matched]
    missed: Sequence[str]
    invented: Sequence[str]
    evidence: Sequence[dict[str, Any]] = ()


def score(matched: Sequence[Matched], missed: Sequence[str], invented: Sequence[str]) -> float:
    """Of one report, in (-1, 1]; normal findings stay out of all three lists.

    Raises KeyError for a severity that is not defined, where the package would count it as 0.25 and say nothing.
    """
    false = sum(WEIGHTS[name] for name in invented)
    weights = [WEIGHTS[item.severity] for item in matched]
    errors = [sum(ATTRIBUTES[name] for name in item.attribute_errors) for item in matched]
    correct = sum(w * w / (w + error) for w, error in zip(weights, errors, strict=True) if w)
    if correct < false:
        return -(false - correct) / (1 + false - correct)
    reference = sum(weights) + sum(WEIGHTS[name] for name in missed)
    return (correct - false) / reference if reference else 1.0


def parse(reply: str) -> Verdict:
    """The lists of a reply. Raises UnusableError where it is not of the schema."""
    value = schema.read(reply, SCHEMA)
    return Verdict(
        [Matched(item["severity"], item["errors"]) for item in value["matched"]],
        [item["severity"] for item in value["missed"]],
        [item["severity"] for item in value["invented"]],
        evidence=[{"of": name, **item} for name in LISTS for item in value[name]],
    )


def scores(verdict: Verdict) -> Scores:
    """A report's score, and how many findings it is made of."""
    counts = {f"{NAME}_{name}": float(len(getattr(verdict, name))) for name in LISTS}
    return {NAME: score(verdict.matched, verdict.missed, verdict.invented), **counts}


def judge(prompt_file: Path | None = None) -> Judge:
    """The judge, with our prompt or another file's."""
    prompt = templates.load(prompt_file or PROMPTS / "crimson.txt", {"reference", "candidate"})

    def question(pair: Pair, vote: int) -> Question:
        return Question(pair.id, prompt.fill(values(pair)), parse, SCHEMA, vote)

    return Judge(
        NAME,
        f"{NAME}-v{VERSION}|prompt:{prompt.sha256}",
        single_question(question, scores),
        lambda p, v: [question(p, v)],
    )
