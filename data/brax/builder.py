r"""BRAX as a TFDS builder: 40,967 chest radiographs of Hospital Israelita Albert Einstein with 14 labels (Reis et al. 2022), PhysioNet
credentialed access; not to be passed on.

From physionet.org/content/brax 1.1.0:

  master_spreadsheet_update.csv      PngPath, PatientID, PatientSex, PatientAge ("85 or more"), AccessionNumber, 14 labels, ViewPosition, ...
  images/id_.../Study_.../Series_.../image-....png

  python -m launch.pack --dataset=brax --source=brax --out=out/brax

The Portuguese reports are not published: the texts are made of the labels by rules. The splits are ours, by patient.
"""

from __future__ import annotations

from pathlib import Path

from data import records, splits, tables
from data.labels import CHEXPERT, chexpert_vector
from data.reports import from_labels
from rad_jax.chat.access import CREDENTIALED

TABLE = "master_spreadsheet_update.csv"
FRONTAL = ("PA", "AP")


class Brax(records.SourceBuilder):
    """BRAX: Brazilian chest radiographs with 14 labels. PhysioNet credentialed access; not to be passed on."""

    name = "brax"
    access = CREDENTIALED

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [tables.find(source, TABLE)]

    def jobs(self) -> dict[str, list[records.Film]]:
        columns = ("PngPath", "PatientID", "PatientSex", "PatientAge", "AccessionNumber", "ViewPosition", *CHEXPERT)
        rows = tables.read(self.defining(self.source)[0], *columns)
        split_of = splits.by_patient(row["PatientID"] for row in rows)
        films: dict[str, list[records.Film]] = {split: [] for split in records.SPLITS}
        for row in rows:
            path = self.source / row["PngPath"]
            labels = chexpert_vector(row)
            text = from_labels.of_chexpert(labels)
            if not text:
                self.skipped.append(records.Skip(path.stem, path.name, "no label stated"))
                continue
            view = "LATERAL" if row["ViewPosition"] in ("L", "LL", "RL") else row["ViewPosition"]
            films[split_of[row["PatientID"]]].append(
                records.Film(
                    path=path,
                    id=path.stem,
                    patient=row["PatientID"],
                    study=row["AccessionNumber"],
                    view=view,
                    frontal=view in FRONTAL,
                    texts=[records.text(text, method=from_labels.METHOD)],
                    sex=tables.sex(row["PatientSex"]),
                    age=tables.years(row["PatientAge"]),
                    labels=labels,
                    source="BRAX",
                )
            )
        return {split: self.present(of_split) for split, of_split in films.items()}
