"""Any folder of radiographs with a CSV as a TFDS builder: how one brings own data.

The CSV has the columns `image` (path, relative to the CSV) and `findings`, and optionally `indication`, `impression`,
`patient`, `study`, `view`, `split` (train, validation, test), `sex` (M, F, male, female), `age` (years, or as DICOM has it), `id` and `source`.
Other columns are ignored. Where a row says no sex or age, that of a DICOM film's header is taken.
"""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

from data import records, splits, tables
from rad_jax.errors import UserError

REQUIRED = ("image", "findings")

Row = dict[str, str]


def find_csv(source: Path) -> Path:
    """The CSV that `source` is or holds.

    Raises:
        UserError: there is none, or several and none of them is `reports.csv`.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder: --source is a folder with images and a CSV, or the CSV.")
    found = sorted(p for p in source.iterdir() if p.suffix.lower() == ".csv")
    preferred = [p for p in found if p.name == "reports.csv"] or found
    if len(preferred) == 1:
        return preferred[0]
    if not found:
        raise UserError(f"{source}: no CSV in this folder: add one with the columns {' and '.join(REQUIRED)}.")
    names = ", ".join(p.name for p in found)
    raise UserError(f"{source}: several CSVs ({names}): name one of them reports.csv, or give it as --source.")


def read_rows(path: Path) -> list[Row]:
    """The rows of the CSV, every value stripped, with `id`, `patient`, `study` filled in and ids unique.

    Raises:
        UserError: the file is no CSV in UTF-8, or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [c.strip() for c in reader.fieldnames or ()]
            reader.fieldnames = columns
            missing = [c for c in REQUIRED if c not in columns]
            if missing:
                raise UserError(
                    f"{path}: missing column {' and '.join(map(repr, missing))}; found {', '.join(columns) or 'none'}: "
                    "rename or add it."
                )
            rows = [{k: (v or "").strip() for k, v in row.items() if isinstance(k, str)} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV in UTF-8 ({error}): save it as one.") from error
    used: set[str] = set()
    for row in rows:
        name = row.get("id") or Path(row["image"]).stem or "row"
        row["study"] = row.get("study") or name
        row["patient"] = row.get("patient") or row["study"]
        # One film may carry several reports; its rows are told apart by a number.
        row["id"] = next(i for n in itertools.count(1) if (i := name if n == 1 else f"{name}~{n}") not in used)
        used.add(row["id"])
    return rows


def assign_splits(rows: list[Row], path: Path) -> dict[str, list[Row]]:
    """Split -> rows: by the column `split` if there is one, else by patient (`splits.by_patient`).

    Raises:
        UserError: an unknown split, or a patient in two splits.
    """
    if any("split" in row for row in rows):
        of: dict[str, str] = {}
        names = {"val": "validation", "valid": "validation", "dev": "validation"} | {s: s for s in records.SPLITS}
        for row in rows:
            split = names.get(row.get("split", "").lower())
            if split is None:
                known = ", ".join(records.SPLITS)
                raise UserError(f"{path}: row {row['id']}: unknown split {row.get('split', '')!r}: use {known}.")
            if of.setdefault(row["patient"], split) != split:
                raise UserError(f"{path}: row {row['id']}: its patient is in two splits: keep each patient in one.")
    else:
        of = splits.by_patient(row["patient"] for row in rows)
    return {split: [row for row in rows if of[row["patient"]] == split] for split in records.SPLITS}


def film(row: Row, folder: Path) -> records.Film:
    """The film of a row, whose view counts as frontal unless it says lateral."""
    lateral = "lateral" in row.get("view", "").lower()
    words = records.text(
        row["findings"], impression=row.get("impression") or None, indication=row.get("indication") or None
    )
    return records.Film(
        path=folder / row["image"],
        id=row["id"],
        patient=row["patient"],
        study=row["study"],
        view="LATERAL" if lateral else row.get("view", ""),
        frontal=not lateral,
        texts=[words],
        sex=tables.sex(row.get("sex", "")),
        age=tables.years(row.get("age", "")),
        source=row.get("source", ""),
    )


class Folder(records.SourceBuilder):
    """Radiographs and reports from a folder with a CSV."""

    name = "folder"

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [find_csv(source)]

    def jobs(self) -> dict[str, list[records.Film]]:
        path = find_csv(self.source)
        usable = []
        for row in read_rows(path):
            reason = "" if row["findings"] else "empty findings"
            there = row["image"] and (path.parent / row["image"]).is_file()
            if self.films_needed and not reason and not there:
                reason = "missing image"
            if reason:
                self.skipped.append(records.Skip(row["id"], row["image"], reason))
            else:
                usable.append(row)
        return {split: [film(row, path.parent) for row in rows] for split, rows in assign_splits(usable, path).items()}
