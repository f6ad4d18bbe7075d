"""Splits by patient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from rad_jax.errors import UserError

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


def check_patients(of_split: Mapping[str, Iterable[tuple[str, str]]]) -> None:
    """Raises UserError when a patient has films in two splits; says how many do, and names a film of the first, not the patient.

    Args:
        of_split: split -> (patient, name) of each film.
    """
    seen: dict[str, str] = {}
    twice: dict[str, tuple[str, str, str]] = {}
    for split, films in of_split.items():
        for patient, name in films:
            if (first := seen.setdefault(patient, split)) != split:
                twice.setdefault(patient, (name, split, first))
    if twice:
        name, split, first = next(iter(twice.values()))
        raise UserError(
            f"{len(twice)} patients are in more than one split; that of {name}, in {split}, is in {first} too: keep each patient in one."
        )


def _shuffled(patients: Iterable[str]) -> Sequence[str]:
    """In the order of a hash of their names."""
    return sorted(set(patients), key=lambda patient: hashlib.sha256(patient.encode()).hexdigest())
