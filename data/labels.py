"""Label vectors of the 14 classes of `rad_jax.findings.CHEXPERT`, in its order.

1 positive, 0 negative, -1 uncertain, -2 not stated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rad_jax.findings import CHEXPERT

NOT_STATED = -2


def chexpert_vector(row: Mapping[str, str]) -> list[int]:
    """The labels of a row of a table with CheXpert's columns: 1.0, 0.0, -1.0, or empty where not stated."""
    known = {"1": 1, "0": 0, "-1": -1}
    return [known.get(row.get(name, "").removesuffix(".0"), NOT_STATED) for name in CHEXPERT]


def vector(positive: Iterable[str], names: Mapping[str, str]) -> list[int]:
    """Labels for the findings of another corpus that are there; `names` gives CheXpert's name for theirs, the rest is not stated."""
    present = {names[name] for name in positive if name in names}
    return [1 if name in present else NOT_STATED for name in CHEXPERT]
