"""The 14 CheXpert classes as label tables: codes, order, and the CSV files that hold them.

A table is int8 [n, 14] of class codes in the order of `CLASSES`. Files use
another code: empty (or "-", "nan") for not mentioned, 1 positive, 0 negative, -1 uncertain; their columns may stand in any order.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rad_jax.errors import UserError
from rad_jax.findings import CHEXPERT

CLASSES = CHEXPERT
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = 0, 1, 2, 3
_TO_FILE = {BLANK: "", POSITIVE: "1", NEGATIVE: "0", UNCERTAIN: "-1"}
_FROM_FILE = {"": BLANK, "-": BLANK, "nan": BLANK, "1": POSITIVE, "1.0": POSITIVE}
_FROM_FILE |= {"0": NEGATIVE, "0.0": NEGATIVE, "-1": UNCERTAIN, "-1.0": UNCERTAIN}


def columns(names: Sequence[str] = FIVE) -> list[int]:
    """Where these classes stand in a table."""
    return [CLASSES.index(name) for name in names]


def to_file(code: int) -> str:
    """A class code as label files write it."""
    return _TO_FILE[code]


def write_csv(path: Path, ids: Iterable[str], table: np.ndarray) -> None:
    """One row per report: id, then the 14 classes in the file code."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *CLASSES])
        for name, row in zip(ids, table.tolist(), strict=True):
            writer.writerow([name, *(to_file(code) for code in row)])


def read_csv(path: Path, id_column: str = "id") -> dict[str, np.ndarray]:
    """id -> codes int8 [14] of a label file; other columns are passed over.

    Raises UserError for a missing file or column, a value that is no label, or an id that stands twice.
    """
    if not path.is_file():
        raise UserError(f"no label file at {path}: write one with python -m launch.label")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (id_column, *CLASSES) if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}, a label file has an id and the 14 CheXpert classes")
        out: dict[str, np.ndarray] = {}
        for row in reader:
            name = row[id_column]
            if name in out:
                raise UserError(f"{path}, line {reader.line_num}: an id stands twice, keep one row per report")
            out[name] = np.array([_code(row[column], path, reader.line_num) for column in CLASSES], np.int8)
    return out


def _code(value: str | None, path: Path, line: int) -> int:
    code = _FROM_FILE.get((value or "").strip().lower())
    if code is None:
        raise UserError(f"{path}, line {line}: a label is 1, 0, -1 or empty, not {value!r}")
    return code
