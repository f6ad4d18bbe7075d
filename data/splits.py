"""Splits by patient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

HELD_OUT = 0.1  # share of the patients in validation, and in test


def by_patient(patients: Iterable[str]) -> dict[str, str]:
    """Patient -> split, for a corpus that publishes none.

    The patients are ordered by a hash of their name and a tenth each, at least one, goes to test and to validation; fewer than three
    patients all go to train.
    """
    ordered = _shuffled(patients)
    held_out = max(1, round(HELD_OUT * len(ordered))) if len(ordered) >= 3 else 0
    splits = ["test"] * held_out + ["validation"] * held_out
    return dict(zip(ordered, splits + ["train"] * (len(ordered) - len(splits)), strict=True))


def validation_of(patients: Iterable[str]) -> set[str]:
    """The tenth of the training patients, none of fewer than two, that becomes the validation set of a corpus that publishes none."""
    ordered = _shuffled(patients)
    return set(ordered[: max(1, round(HELD_OUT * len(ordered)))]) if len(ordered) >= 2 else set()


def _shuffled(patients: Iterable[str]) -> Sequence[str]:
    """In the order of a hash of their names."""
    return sorted(set(patients), key=lambda patient: hashlib.sha256(patient.encode()).hexdigest())
