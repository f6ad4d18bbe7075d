"""The phantom corpus as a TFDS builder."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import tensorflow_datasets as tfds

from data import records
from data.phantom.study import studies_of, study
from rad_jax.chat.access import PUBLIC
from rad_jax.errors import UserError

STUDIES, IMAGE_SIZE = 4600, 112
_SHARE = {"test": 400 / 4600, "validation": 200 / 4600}  # train has the rest

Job = tuple[int, int]  # patient, study number


def seed_from_environment() -> int:
    """The corpus seed, PHANTOM_SEED (default 0).

    Raises:
        UserError: it is not a whole number of at least 0.
    """
    text = os.environ.get("PHANTOM_SEED", "0")
    if not text.isdigit():
        raise UserError(f"PHANTOM_SEED={text!r} is not a whole number of at least 0: set it to one, or unset it.")
    return int(text)


def plan(seed: int, studies: int) -> dict[str, list[Job]]:
    """Split -> (patient, study number), `studies` in all; no patient is in two splits."""
    counts = {split: max(1, round(studies * share)) for split, share in _SHARE.items()}
    counts["train"] = studies - sum(counts.values())
    split_jobs: dict[str, list[Job]] = {}
    patient = 0
    for split in records.SPLITS:
        jobs: list[Job] = []
        while len(jobs) < counts[split]:
            jobs += [(patient, k) for k in range(studies_of(seed, patient))]
            patient += 1
        split_jobs[split] = jobs[: counts[split]]
    return split_jobs


def study_name(seed: int, job: Job) -> str:
    """Its id; what precedes the last hyphen is the patient's."""
    patient, number = job
    return f"phantom-{seed}-{patient:05d}-{number}"


def patient_of(name: str) -> str:
    """The patient's name, of the name of a study."""
    return name.rpartition("-")[0]


def make(job: Job, seed: int, size: int) -> dict[str, Any]:
    """One record of the corpus."""
    made = study(seed, *job, size)
    name = study_name(seed, job)
    return records.record(
        image=made.image,
        id=name,
        patient=patient_of(name),
        study=name,
        view=made.view,
        frontal=True,
        texts=[
            records.text(
                made.report.findings,
                impression=made.report.impression,
                indication=made.report.indication or None,
            )
        ],
        labels=made.labels,
        annotations=[
            {"finding": f.finding, "side": f.side, "size": f.size, "place": f.place, "box": list(f.box or ())}
            for f in made.findings
        ],
        source=f"rad_jax phantom, seed {seed}",
        shape=made.image.shape,
    )


class Phantom(records.CorpusBuilder):
    """Procedurally drawn chest radiographs with reports, labels and boxes that are known exactly."""

    name = "phantom"
    access = PUBLIC

    def __init__(self, *, studies: int = STUDIES, image_size: int = IMAGE_SIZE, seed: int = 0, **kwargs: Any):
        """Args: studies: in all splits together; image_size: pixels on each side; seed: of everything."""
        self.studies, self.image_size, self.seed = studies, image_size, seed
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Drawn chest radiographs (normal, cardiomegaly, pleural effusion, pneumothorax, consolidation, nodule, "
                "endotracheal tube, central line, pacemaker) with reports, CheXpert labels and boxes. No real patient."
            ),
            features=records.features(),
            license="Apache-2.0",
        )

    def jobs(self) -> dict[str, list[Job]]:
        return plan(self.seed, self.studies)

    def maker(self) -> Callable[[Job], dict[str, Any]]:
        return functools.partial(make, seed=self.seed, size=self.image_size)

    def key(self, job: Job) -> str:
        return study_name(self.seed, job)

    def patient(self, job: Job) -> str:
        return patient_of(study_name(self.seed, job))
