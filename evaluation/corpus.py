"""What a packed corpus adds to a predictions file: patients, true findings, and the baselines' reports."""

from collections.abc import Collection
from typing import Any

import numpy as np

from evaluation import baselines
from evaluation.report import Study, findings_of_annotations
from rad_jax import images
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError

ANNOTATED = ("phantom",)  # corpora whose annotations list every finding, so that an empty list means a normal study


def records_of(corpus: Corpus, ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """The records with these ids, searched in the splits from test to train until all are found; absent ones are left
    out.

    Raises UserError when none is found: the predictions are of another corpus.
    """
    found: dict[str, dict[str, Any]] = {}
    for split in sorted(corpus.splits, key=("test", "validation", "train").index):
        if len(found) == len(ids):
            break
        source = corpus.source(split)
        for number in range(len(source)):
            record = source[number]
            if record["id"] in ids:
                found[record["id"]] = record
    if not found:
        raise UserError(
            f"{corpus.path}: holds none of the predicted ids, give the corpus that the predictions were made from"
        )
    return found


def studies_of(corpus: Corpus, records: dict[str, dict[str, Any]]) -> dict[str, Study]:
    """id -> patient and, in a corpus that has it, the truth. A record without a patient is its own patient."""
    annotated = corpus.meta["dataset"] in ANNOTATED
    return {
        name: Study(
            patient=record["patient"] or name,
            truth=findings_of_annotations(record["annotations"]) if annotated else None,
        )
        for name, record in records.items()
    }


AGES = (18, 40, 60, 80)  # years at which a group of ages begins


def groups_of(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """id -> view, sex, age (in groups that begin at `AGES`) and whether an indication was given; what a record does not say is empty."""
    return {
        name: {
            "view": str(record.get("view", "")),
            "sex": str(record.get("sex", "")),
            "age": _ages(int(record.get("age", -1))),
            "indication": "given" if str(record.get("indication", "")).strip() else "absent",
        }
        for name, record in records.items()
    }


def _ages(years: int) -> str:
    if years < 0:
        return ""
    low = max((age for age in (0, *AGES) if age <= years), default=0)
    return f"{low:02d}-{next((age for age in AGES if age > low), 999) - 1}" if low < AGES[-1] else f"{low}+"


FREQUENT = "most frequent normal report"
NONE_NORMAL = "most frequent report (none is normal)"  # stands for it where the training split has no normal report


def baseline_reports(corpus: Corpus, records: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """What the baselines of `evaluation.baselines` answer, from the training split: name -> {id: report}.

    Training records without findings or with an undecodable image are left out; a study whose own image cannot be
    decoded gets an empty report. Raises UserError when no training record is left.
    """
    source = corpus.source("train")
    reports, rows = [], []
    for number in range(len(source)):
        record = source[number]
        row = _thumbnail(corpus, record)
        if record["findings"].strip() and row is not None:
            reports.append(record["findings"])
            rows.append(row)
    if not reports:
        raise UserError(f"{corpus.path}: no training record with findings and a readable image to make baselines of")
    common, normal = baselines.most_frequent_report(reports)
    own = {name: _thumbnail(corpus, record) for name, record in records.items()}
    readable = {name: row for name, row in own.items() if row is not None}
    nearest = baselines.nearest_reports(np.stack(rows), reports, np.array(list(readable.values())))
    return {
        FREQUENT if normal else NONE_NORMAL: dict.fromkeys(records, common),
        "random report": dict(zip(records, baselines.random_reports(reports, len(records)), strict=True)),
        "nearest thumbnail": dict.fromkeys(records, "") | dict(zip(readable, nearest, strict=True)),
    }


def _thumbnail(corpus: Corpus, record: dict[str, Any]) -> np.ndarray | None:
    try:
        image = images.decode_png(record["image"])
    except UserError:
        return None
    return baselines.thumbnail(images.centre_crop(image, corpus.image_size))
