"""CSV tables of published corpora."""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
import zlib
from pathlib import Path

from rad_jax.errors import UserError

Row = dict[str, str]

OLDEST = 150  # years; what is beyond is an error of its source
_AGE = re.compile(r"(\d{1,9}+)\s*([DWM]?)(?![a-z])")
_DAYS = {"D": 1, "W": 7, "M": 30.4375}


def find(source: Path, *names: str) -> Path:
    """The first of these files that a corpus's folder has, packed with gzip or not.

    Raises:
        UserError: it has none of them; names the first.
    """
    for name in names:
        for path in (source / name, source / f"{name}.gz"):
            if path.is_file():
                return path
    raise UserError(
        f"{source / names[0]}: not there: --source is the folder that holds it (see the top of the data set's builder)."
    )


def text(path: Path) -> str:
    """The contents of a text file in UTF-8, packed with gzip or not.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: damaged, or no table ({type(error).__name__}): download it again.") from error


def read(path: Path, *columns: str) -> list[Row]:
    """The rows of a table, values stripped.

    Raises:
        UserError: the file cannot be read, is no table, or lacks a column.
    """
    return [row for _, row in numbered(path, *columns)]


def numbered(path: Path, *columns: str) -> list[tuple[int, Row]]:
    """`read` with the number of the line on which each row ends, for errors to name."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # masks are longer than the default allows
    reader = csv.DictReader(io.StringIO(text(path), newline=""))
    try:
        missing = sorted(set(columns) - set(reader.fieldnames or ()))
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)}: is it another table?")
        return [
            (
                reader.line_num,
                {k: (v or "").strip() for k, v in row.items() if isinstance(k, str) and not isinstance(v, list)},
            )
            for row in reader
        ]
    except csv.Error as error:
        raise UserError(f"{path}: damaged, or no table ({type(error).__name__}): download it again.") from error


def number(text: str, unknown: int = -1) -> int:
    """The whole number that a cell starts with ("058Y", "63.0", "85 or more"), or `unknown`."""
    digits = ""
    for letter in text:
        if not letter.isdigit():
            break
        digits += letter
    return int(digits) if digits else unknown


def years(text: str) -> int:
    """An age in whole years, as DICOM ("058Y", "006M", "090Y+") or a table ("63.0", "85 or more") has it; -1 where there is none."""
    found = _AGE.match(text.strip())
    if found is None:
        return -1
    age = int(found[1])
    if found[2]:
        age = int(age * _DAYS[found[2]] / 365.25)
    return age if age <= OLDEST else -1


def sex(text: str) -> str:
    """M or F of a cell such as "F", "male" or "Female"; empty for every other."""
    return {"m": "M", "male": "M", "f": "F", "female": "F"}.get(text.strip().lower(), "")
