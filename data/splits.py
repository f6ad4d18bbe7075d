"""Splits by patient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

HELD_OUT = 0.1  # share of the patients in validation, and in test


def by_patient(patients: Iterable[str]) -> dict[str, str]:
    """Patient -> split, for a corpus that publishes none.

    The patients are ordered by a hash of their name and a tenth each, at least one, goes to test and to validation; fewer than three
    patients all go to train.
    """
    ordered = sorted(set(patients), key=lambda patient: hashlib.sha256(patient.encode()).hexdigest())
    held_out = max(1, round(HELD_OUT * len(ordered))) if len(ordered) >= 3 else 0
    splits = ["test"] * held_out + ["validation"] * held_out
    return dict(zip(ordered, splits + ["train"] * (len(ordered) - len(splits)), strict=True))
