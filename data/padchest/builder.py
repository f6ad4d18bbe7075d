r"""PadChest as a TFDS builder: more than 160,000 chest radiographs of Hospital San Juan with Spanish reports (Bustos et al. 2020), BIMCV's research
use agreement.

From bimcv.cipf.es/bimcv-projects/padchest, the numbered archives unpacked side by side:

  PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv (or .csv.gz)    ImageID, ImageDir, Projection, Report, Labels (a Python list), ...
  0/*.png, 1/*.png ... 54/*.png                                        16-bit PNG films, each in the folder that ImageDir names

  python -m launch.pack --dataset=padchest --source=padchest --out=out/padchest

The reports are Spanish word stems in lower case without accents. They are packed as the texts of the selection "spanish"; the other
selections have an English text made of the labels by rules. The splits are ours, by patient.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from data import labels, records, splits, tables
from data.reports import from_labels
from data.selections import COMMON, Selection
from rad_jax.chat.access import CREDENTIALED

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMNS = ("ImageID", "ImageDir", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM", "StudyDate_DICOM")
SPANISH = "spanish"
FRONTAL = ("PA", "AP", "AP_horizontal")
NO_FINDINGS = ("normal", "exclude", "unchanged", "suboptimal study")  # labels that name nothing that is seen
CLASSES = {  # theirs -> CheXpert's
    "atelectasis": "Atelectasis",
    "cardiomegaly": "Cardiomegaly",
    "consolidation": "Consolidation",
    "fracture": "Fracture",
    "normal": "No Finding",
    "nodule": "Lung Lesion",
    "pleural effusion": "Pleural Effusion",
    "pleural thickening": "Pleural Other",
    "pneumonia": "Pneumonia",
    "pneumothorax": "Pneumothorax",
    "pulmonary edema": "Edema",
    "pulmonary mass": "Lung Lesion",
}


def _english(selection: Selection) -> Selection:
    return dataclasses.replace(
        selection, keep=lambda record, text: text["method"] != SPANISH and selection.keep(record, text)
    )


class PadChest(records.SourceBuilder):
    """PadChest: chest radiographs with Spanish reports. BIMCV research use agreement; not to be passed on."""

    name = "padchest"
    access = CREDENTIALED
    language = "es"
    selections = {name: _english(selection) for name, selection in COMMON.items()} | {
        SPANISH: Selection(lambda record, text: text["method"] == SPANISH)
    }

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [tables.find(source, TABLE)]

    def jobs(self) -> dict[str, list[records.Film]]:
        rows = tables.read(self.defining(self.source)[0], *COLUMNS, "Projection", "Report", "Labels")
        split_of = splits.by_patient(row["PatientID"] for row in rows)
        films: dict[str, list[records.Film]] = {split: [] for split in records.SPLITS}
        for row in rows:
            found = read_labels(row["Labels"])
            texts = texts_of(row["Report"], found)
            reason = ""
            if row["Projection"] == "EXCLUDE" or "exclude" in found:
                reason = "excluded by its publisher"
            elif not texts:
                reason = "neither report nor labels"
            if reason:
                self.skipped.append(records.Skip(row["ImageID"], row["ImageID"], reason))
                continue
            films[split_of[row["PatientID"]]].append(film(row, self.source, found, texts))
        return {split: self.present(of_split) for split, of_split in films.items()}


def film(row: tables.Row, source: Path, found: list[str], texts: list[dict[str, str | None]]) -> records.Film:
    """The film of a row."""
    frontal = row["Projection"] in FRONTAL
    born, taken = tables.number(row["PatientBirth"]), tables.number(row["StudyDate_DICOM"][:4])
    return records.Film(
        path=source / str(tables.number(row["ImageDir"])) / row["ImageID"],
        id=Path(row["ImageID"]).stem,
        patient=row["PatientID"],
        study=row["StudyID"],
        view="LATERAL" if row["Projection"] == "L" else row["Projection"],
        frontal=frontal,
        texts=texts,
        sex=tables.sex(row["PatientSex_DICOM"]),
        age=taken - born if born > 0 and 0 <= taken - born <= tables.OLDEST else -1,
        labels=labels.vector(found, CLASSES),
        source="PadChest",
    )


def read_labels(cell: str) -> list[str]:
    """The labels of a cell, a Python list in which names may begin with a blank, be empty or come twice; none of any other cell."""
    try:
        listed = ast.literal_eval(cell) if cell else []
    # An expression may also nest too deep, or put a list where Python takes none.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return []
    names = [str(name).strip() for name in listed] if isinstance(listed, list) else []
    return list(dict.fromkeys(name for name in names if name))


def texts_of(report: str, found: list[str]) -> list[dict[str, str | None]]:
    """An English text made of the labels, and the Spanish report, as far as there are any."""
    words = from_labels.findings_of([name for name in found if name not in NO_FINDINGS])
    if not words and "normal" in found:
        words = from_labels.of_chexpert(labels.vector(["normal"], CLASSES))
    texts = [records.text(words, method=from_labels.METHOD)] if words else []
    spanish = " ".join(report.split())
    return texts + ([records.text(spanish, method=SPANISH)] if spanish else [])
