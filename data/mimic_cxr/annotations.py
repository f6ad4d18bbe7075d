"""The LLaVA-Rad MIMIC-CXR annotations (PhysioNet, 1.0.0): which texts each film has, and what LLaVA-Rad's loaders keep of them.

A file is one JSON array with bare NaN tokens, one entry per film and method: id, image (mimic/pXX/pXXXXXXXX/sXXXXXXXX/DICOM.jpg),
generate_method (rule-based or gpt4), reason, impression, view, chexpert_labels, conversations; a text that is missing is null or NaN.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path, PurePosixPath
from typing import Any

from data import records
from data.labels import CHEXPERT, NOT_STATED
from data.selections import Selection
from rad_jax.errors import UserError

FILES = {
    split: f"chat_{name}_MIMIC_CXR_all_gpt4extract_rulebased_v1.json"
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test"))
}
METHODS = ("rule-based", "gpt4")  # the order of a film's texts
FRONTAL = ("AP", "PA")


def _published(text: Any) -> bool:
    """Whether a text is one of the annotations' own, and not added when packing."""
    return text["method"] in METHODS


def _has_findings(record: Any, text: Any) -> bool:
    return _published(text) and text["findings"] is not None  # an empty string is findings, to the original


# The five loaders of LLaVA-Rad by their names. The original's test set keeps to the rule-based texts.
LOADERS = {
    "default": Selection(lambda record, text: _published(text), "stored"),
    "mimic_train_findings": Selection(lambda record, text: _has_findings(record, text) and record["view"] in FRONTAL),
    "mimic_test_findings": Selection(
        lambda record, text: (
            _has_findings(record, text) and record["view"] in FRONTAL and text["method"] == "rule-based"
        )
    ),
    "mimic_cxr_all_frontal_findings": Selection(
        lambda record, text: _has_findings(record, text) and record["view"] in FRONTAL, "stored"
    ),
    "mimic_cxr_all_views_findings": Selection(_has_findings, "view"),
}

# Pairs of AP and PA films, as the annotations' page on PhysioNet counts them.
PUBLISHED = {
    "mimic_train_findings": {"train": 400_042, "validation": 3_238},
    "mimic_train_findings.rule-based": {"train": 162_969, "validation": 1_286},
    "mimic_train_findings.gpt4": {"train": 237_073, "validation": 1_952},
    "mimic_test_findings": {"test": 2_461},
}


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file.

    Raises:
        UserError: there is no such file, or it is no JSON array of such entries.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))  # Python's reader takes NaN
    except OSError as error:
        raise UserError(f"{path}: no such file: it is part of the LLaVA-Rad MIMIC-CXR annotations.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file, or one that ends early: download it again.") from error
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "conversations" in e for e in entries):
        raise UserError(f"{path}: not a list of annotations with conversations: is it another file?")
    return entries


def films(entries: list[dict[str, Any]], folder: Path) -> list[records.Film]:
    """One film for all entries of an image, in order of first appearance, its texts in the order of `METHODS`.

    Args:
        entries: as `read` gives them.
        folder: the `files` folder of MIMIC-CXR-JPG.

    Raises:
        UserError: an entry is not as its publisher describes it.
    """
    found: dict[str, records.Film] = {}
    for number, entry in enumerate(entries):
        try:
            image, words = str(entry["image"]), _text(entry)
            if image not in found:
                found[image] = _film(entry, folder)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"entry {number} of the annotations is not as published ({type(error).__name__})."
            ) from error
        film = found[image]
        texts = sorted([*film.texts, words], key=lambda text: METHODS.index(str(text["method"])))
        found[image] = dataclasses.replace(film, texts=texts)
    return list(found.values())


def _text(entry: dict[str, Any]) -> dict[str, str | None]:
    human, answer = entry["conversations"]
    if entry["generate_method"] not in METHODS:
        raise ValueError("unknown method")
    return records.text(
        _string(answer["value"]),
        impression=_string(entry.get("impression")),
        indication=_string(entry.get("reason")),
        method=entry["generate_method"],
        prompt=str(human["value"]).removeprefix("<image>\n"),
    )


def _film(entry: dict[str, Any], folder: Path) -> records.Film:
    path = PurePosixPath(entry["image"].removeprefix("mimic/"))
    _, patient, study, _ = path.parts
    labels = entry.get("chexpert_labels") or {}
    view = _string(entry.get("view")) or ""
    return records.Film(
        path=folder / path,
        id=path.stem,
        patient=patient.removeprefix("p"),
        study=study.removeprefix("s"),
        view=view,
        frontal=view in FRONTAL,
        texts=[],
        labels=[_label(labels.get(name)) for name in CHEXPERT],
        source="MIMIC-CXR-JPG, LLaVA-Rad annotations",
    )


def _string(value: Any) -> str | None:
    """Null and NaN are no text."""
    return value if isinstance(value, str) else None


def _label(value: Any) -> int:
    return int(value) if value in (1, 0, -1) else NOT_STATED
