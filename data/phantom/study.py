"""One phantom study: film, findings, report and labels, from (seed, patient, study number) alone."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from data.phantom.anatomy import anatomy
from data.phantom.draw import draw
from data.phantom.findings import Finding, sample
from data.phantom.parser import chexpert_labels
from data.phantom.report import Report, write

MOST_STUDIES = 3  # of one patient


@dataclasses.dataclass(frozen=True)
class Study:
    """One study; `labels` are the 14 CheXpert classes as the report states them."""

    image: NDArray[np.uint8]  # [Y,X]
    findings: list[Finding]
    report: Report
    view: str
    labels: list[int]


def study(seed: int, patient: int, number: int, size: int) -> Study:
    """Makes one study.

    Args:
        seed: of the corpus.
        patient: 0 and up; the anatomy depends on nothing else but the seed.
        number: of the study of this patient, 0 and up.
        size: pixels on each side.
    """
    found, report, view = content(seed, patient, number)
    body = anatomy(np.random.default_rng([seed, patient, 1]))
    image, drawn = draw(body, found, view, [seed, patient, 2, number], size)
    return Study(image, drawn, report, view, chexpert_labels(drawn, report.denied))


def content(seed: int, patient: int, number: int) -> tuple[list[Finding], Report, str]:
    """Findings (without boxes), report and view of a study, without drawing it."""
    rng = np.random.default_rng([seed, patient, 3, number])
    found, view = sample(rng), str(rng.choice(["PA", "AP"], p=[0.6, 0.4]))
    return found, write(found, np.random.default_rng([seed, patient, 4, number])), view


def studies_of(seed: int, patient: int) -> int:
    """How many studies a patient has, 1 to `MOST_STUDIES`."""
    return int(np.random.default_rng([seed, patient, 5]).integers(1, MOST_STUDIES + 1))
