"""Writes the report of a phantom study: what is present with its side, size and place, and some of what is absent.

Every wording used here is one that `data.phantom.parser` reads. Nothing is compared with earlier films, and the
indication is drawn without looking at the findings.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data.phantom.findings import DEVICES, Finding

INDICATIONS = (
    "Shortness of breath.",
    "Chest pain.",
    "Fever and cough.",
    "Cough for two weeks.",
    "Weakness and dizziness.",
    "Fall from standing height.",
    "Preoperative evaluation.",
    "Follow-up after surgery.",
    "Altered mental status.",
    "Weight loss.",
    "Routine examination.",
    "Hypoxia.",
    "",
    "",
)

_PRESENT = {
    "cardiomegaly": (
        "There is {size} cardiomegaly.",
        "The heart is {sizely} enlarged.",
        "{Size} enlargement of the heart.",
    ),
    "pleural_effusion": (
        "There is a {size} {side} pleural effusion.",
        "{Size} {side} pleural effusion.",
        "A {size} pleural effusion is seen on the {side}.",
    ),
    "pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "{Size} {side} pneumothorax.",
        "A {size} pneumothorax is seen on the {side}.",
    ),
    "consolidation": (
        "There is consolidation in the {side} {place}.",
        "{Side} {place} consolidation.",
        "Airspace opacity in the {side} {place}.",
    ),
    "nodule": (
        "There is a {size} nodule in the {side} {place}.",
        "{Size} {side} {place} nodule.",
        "A {size} nodule is seen in the {side} {place}.",
    ),
    "endotracheal_tube": (
        "An endotracheal tube is in place.",
        "Endotracheal tube above the carina.",
        "The endotracheal tube ends above the carina.",
    ),
    "central_line": (
        "A {side} central line is in place.",
        "{Side} central venous line in the SVC.",
        "A {side} central line ends in the SVC.",
    ),
    "pacemaker": (
        "A {side} pacemaker is in place.",
        "{Side} chest pacemaker.",
        "There is a {side} pacemaker with leads in the heart.",
    ),
}

# What is denied -> how; a statement is used only when all that it denies is absent.
_ABSENT: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("cardiomegaly",), ("The heart is normal in size.", "Heart size is normal.", "Normal heart size.")),
    (("pleural_effusion",), ("No pleural effusion.", "There is no pleural effusion.")),
    (("pneumothorax",), ("No pneumothorax.", "There is no pneumothorax.")),
    (
        ("pleural_effusion", "pneumothorax"),
        ("No pleural effusion or pneumothorax.", "There is no pneumothorax or pleural effusion."),
    ),
    (("consolidation",), ("No consolidation.", "There is no focal consolidation.")),
    (("nodule",), ("No pulmonary nodule.", "There is no nodule.")),
    (("consolidation", "nodule"), ("The lungs are clear.", "Clear lungs.", "No consolidation or nodule.")),
    (DEVICES, ("No lines or tubes.", "No support devices.")),
)
_OTHER = ("The bones are intact.", "No acute bone abnormality.", "The trachea is midline.", "Bones are unremarkable.")
_LONG_ENOUGH = 24  # words; below it further negatives are added
_FINDINGS_FIRST = 0.6  # share of reports that begin with what is present


@dataclasses.dataclass(frozen=True)
class Report:
    """The texts of one study, and the names of the findings that the text denies."""

    indication: str
    findings: str
    impression: str
    denied: tuple[str, ...]


def write(findings: list[Finding], rng: np.random.Generator) -> Report:
    """Writes a report; the wording is drawn from `rng`, the content is `findings`."""
    # Drawn first, and whatever is present, so that it cannot tell anything about the findings.
    indication = str(rng.choice(INDICATIONS))
    present = [_say(found, rng) for found in findings]
    rng.shuffle(present)
    names = {f.finding for f in findings}
    absent, denied = _deny(names, sum(len(s.split()) for s in present), rng)
    sentences = present + absent
    if rng.random() >= _FINDINGS_FIRST:
        rng.shuffle(sentences)
    return Report(indication, " ".join(sentences), _impression(findings), tuple(sorted(denied)))


def _say(found: Finding, rng: np.random.Generator) -> str:
    words = {"side": found.side or "", "size": found.size or "", "place": found.place or ""}
    words["sizely"] = words["size"] + "ly"
    words |= {key.capitalize(): words[key].capitalize() for key in ("side", "size")}
    return str(rng.choice(_PRESENT[found.finding])).format(**words)


def _deny(names: set[str], words: int, rng: np.random.Generator) -> tuple[list[str], set[str]]:
    """Sentences on what is absent, none denied twice, until the report has about `_LONG_ENOUGH` words."""
    sentences: list[str] = []
    denied: set[str] = set()
    for k in rng.permutation(len(_ABSENT)):
        what, how = _ABSENT[k]
        if names & set(what) or denied & set(what):
            continue
        if words >= _LONG_ENOUGH and len(sentences) >= 2:
            break
        sentences.append(str(rng.choice(how)))
        denied |= set(what)
        words += len(sentences[-1].split())
    if rng.random() < 0.5:
        sentences.append(str(rng.choice(_OTHER)))
    return sentences, denied


def _impression(findings: list[Finding]) -> str:
    if not findings:
        return "No acute abnormality."
    named = ([f.size, f.side, f.place, f.finding.replace("_", " ")] for f in findings)
    return " ".join(" ".join(word for word in words if word).capitalize() + "." for words in named)
