"""Published scores, to be shown beside ours where, and only where, they were made the same way.

published.csv: system, metric, the signature (`made`), value in our scale, number of reports, source, and whether the figure was
read at its source ("yes") or where others quote it ("third party"). A row without a signature was made in a convention that nobody states, so
it is kept and never shown beside a number. All are of the MIMIC-CXR test set's 2,461 pairs, which is why another number of reports is refused.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BESIDE = ("scale:", "zero:", "labeler:", "unit:", "ci:", "rouge-score")
FILE = Path(__file__).with_name("published.csv")


def rows() -> list[dict[str, str]]:
    """The file's lines."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def made(signature: str) -> str:
    """The part of a signature that says how a value is made: not its scale, the labeler's version, or how its interval is made."""
    return "|".join(part for part in signature.split("|") if not part.startswith(_BESIDE))


def beside(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The published rows that have the name, number of reports and signature of one of these metrics; the value as a number."""
    out: dict[tuple[str, str, str], dict[str, Any]] = {}
    for metric in metrics:
        for row in rows():
            same = row["metric"] == metric["name"] and row["n"] == str(metric["n"])
            if same and row["signature"] and made(metric["signature"]) == row["signature"].rstrip("|"):
                found = row | {"value": float(row["value"]), "n": metric["n"], "profile": metric["profile"]}
                out[row["system"], row["metric"], metric["profile"]] = found
    return list(out.values())
