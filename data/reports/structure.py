"""Reports rewritten by a language model: sorted into sections, without references to earlier images, in English.

A model's text is taken only where the guards find it faithful (`guards`). Texts are known by a hash of the report they were made of, not by its
id, so that one file serves every corpus that holds the report, and a report that was changed since finds nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.reports import from_labels, guards, sections, terms
from rad_jax.chat import schema, templates
from rad_jax.chat.client import Question, UnusableError
from rad_jax.errors import UserError

METHOD = "llm"
SECTIONS = ("examination", "indication", "findings", "impression")
PROMPTS = Path(__file__).parent / "prompts"
_SECTION = {"type": ["string", "null"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name.upper(): _SECTION for name in SECTIONS},
    "required": [name.upper() for name in SECTIONS],
    "additionalProperties": False,
}
NOTHING_LEFT = "nothing is left"
# Sections that say nothing of the image: guards do not look for their words in findings and impression.
_ASIDE = {
    "preamble",
    "examination",
    "indication",
    "history",
    "technique",
    "comparison",
    "notification",
    "date",
    "recommendations",
}


@dataclass(frozen=True)
class Document:
    """A report as the model is given it, the part of it that says what is seen, and its findings by rules, empty where these find none."""

    text: str
    body: str
    findings: str = ""

    @property
    def key(self) -> str:
        """SHA-256 of the text."""
        return key_of(self.text)


def key_of(text: str) -> str:
    """SHA-256 of a report, whatever its white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def of_report(report: str) -> Document:
    """A whole report, as its file has it."""
    found = sections.split_sections(report, sections.ALL_FIXES)
    body = "\n".join(section.text for section in found if section.name not in _ASIDE).strip()
    findings = {section.name: section.text for section in found}.get("findings", "")
    return Document(report.strip(), body or report, " ".join(findings.split()))


def of_texts(texts: Sequence[Mapping[str, str | None]]) -> Document | None:
    """What a film's texts hold, under headings: of the first that a person wrote. None where there is none."""
    own = next((text for text in texts if text["method"] not in (from_labels.METHOD, METHOD)), None)
    if own is None or not (own["findings"] or own["impression"]):
        return None
    names = ("indication", "findings", "impression")
    body = "\n".join(own[name] or "" for name in names[1:]).strip()
    text = "\n".join(f"{name.upper()}: {own[name]}" for name in names if own[name])
    return Document(text, body, own["findings"] or "")


def prompt_of(language: str, given: Path | None = None) -> templates.Template:
    """The prompt for reports in a language: our own, or the file that is given. Raises UserError for a file that is no such prompt."""
    translated = language != "en"
    name = "translate.txt" if translated else "structure.txt"
    return templates.load(given or PROMPTS / name, {"report", "language"} if translated else {"report"})


def question(document: Document, prompt: templates.Template, language: str) -> Question:
    """The request for a document; its answer's value is `read`'s."""
    messages = prompt.fill({"report": document.text, "language": terms.LANGUAGES[language]})
    return Question(document.key, messages, lambda text: read(text, document, language), SCHEMA)


def read(text: str, document: Document, language: str) -> dict[str, Any]:
    """The sections of a model's answer: name -> text or None, and `residue`, words that still speak of an earlier image.

    Raises:
        UnusableError: not the JSON asked for, or unfaithful to the document.
    """
    found = schema.read(text, SCHEMA)
    out: dict[str, Any] = {name: " ".join((found[name.upper()] or "").split()) or None for name in SECTIONS}
    seen = "\n".join(out[name] for name in ("findings", "impression") if out[name])
    if not seen:
        raise UnusableError(NOTHING_LEFT, "FINDINGS and IMPRESSION are both null, and the report does say what is seen")
    if fault := guards.fault(document.body, seen, language):
        reason, what = fault
        raise UnusableError(reason, f"{reason} in FINDINGS or IMPRESSION: {what}")
    return out | {"residue": guards.residue(seen)}


def row(key: str, value: Mapping[str, Any], level: str) -> dict[str, Any]:
    """One line of the file of structured reports."""
    return {"key": key, "method": METHOD, "access": level, **value}


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Key -> line of a file of structured reports.

    Raises:
        UserError: no such file, or a line that is none of `row`'s.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no structured reports here: launch.structure writes them.") from error
    out: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            usable = isinstance(value["key"], str) and all(isinstance(value[name], str | None) for name in SECTIONS)
        except (ValueError, TypeError, KeyError):
            usable = False
        if not usable:
            raise UserError(f"{path}, line {number}: no structured report: write the file again with launch.structure.")
        out[value["key"]] = value
    return out
