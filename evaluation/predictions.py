"""Reading a predictions file: one JSON object per line with the strings id, query, reference and prediction.

A row that cannot be used is counted and listed by line number, never guessed at. Two rows of one id are an error: a
score over them would count a study twice.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rad_jax.chat.access import PRIVATE, strictest
from rad_jax.errors import UserError

FIELDS = ("id", "query", "reference", "prediction")
_LISTED = 10


@dataclass(frozen=True)
class Row:
    """One generated report beside its reference; `line` counts from 1. `access` says who may have it, empty where the file does not."""

    id: str
    query: str
    reference: str
    prediction: str
    line: int
    access: str = ""


@dataclass(frozen=True)
class Predictions:
    """The usable rows in file order, and (line number, reason) of the others."""

    rows: list[Row]
    malformed: list[tuple[int, str]]


def access_of(rows: Sequence[Row], *stated: str | None) -> str:
    """Who may have a file of predictions, one of `access.LEVELS`: the strictest of what its rows and `stated` say; private where nobody says."""
    own = {row.access for row in rows if row.access}
    known = [level for level in stated if level]
    if not known and not all(row.access for row in rows):
        return PRIVATE
    return strictest([*own, *known])


def malformed_sentence(malformed: list[tuple[int, str]], read: int) -> str:
    """One sentence that says which of the `read` rows were left out and why."""
    first = ", ".join(f"line {line}: {reason}" for line, reason in malformed[:_LISTED])
    more = len(malformed) - _LISTED
    return f"{len(malformed)} of {read} rows left out as malformed ({first}{f', and {more} more' if more > 0 else ''})"


def read_predictions(path: Path) -> Predictions:
    """Reads a JSONL file. Raises UserError for a file that is missing, has no usable row, or names an id twice."""
    if not path.is_file():
        raise UserError(f"no predictions file at {path}: write one with python -m launch.generate --out={path}")
    rows: list[Row] = []
    malformed: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _parse(line, number)
            if isinstance(row, str):
                malformed.append((number, row))
                continue
            if row.id in seen:
                raise UserError(f"{path}: lines {seen[row.id]} and {number} have the same id: keep one row per study")
            seen[row.id] = number
            rows.append(row)
    if not rows:
        why = malformed_sentence(malformed, len(malformed)) if malformed else "the file is empty"
        raise UserError(f"{path} holds no usable row: {why}")
    return Predictions(rows, malformed)


def _parse(line: bytes, number: int) -> Row | str:
    """A row, or why it is none. The reason never quotes the line: it may hold a patient's report."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (json.JSONDecodeError, RecursionError):
        return "not JSON"
    if not isinstance(value, dict):
        return "not a JSON object"
    for field in FIELDS:
        if field not in value:
            return f"no field '{field}'"
        if not isinstance(value[field], str):
            return f"field '{field}' is not a string"
        if not value[field].isascii() and any("\ud800" <= c <= "\udfff" for c in value[field]):
            return f"field '{field}' holds half a character (lone surrogate)"
    if not value["id"]:
        return "empty id"
    return Row(
        value["id"],
        value["query"],
        value["reference"],
        value["prediction"],
        number,
        str(value.get("access", "")),
    )
