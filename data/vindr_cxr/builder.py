r"""VinDr-CXR as a TFDS builder: 18,000 DICOM chest radiographs with 28 labels and boxes by radiologists (Nguyen et al. 2022), PhysioNet
credentialed access; not to be passed on.

From physionet.org/content/vindr-cxr 1.0.0:

  annotations/image_labels_train.csv     image_id, rad_id and 28 labels, one row for each of three radiologists
  annotations/image_labels_test.csv      image_id and 28 labels, one row by consensus; "Other disease" where train has "Other diseases"
  annotations/annotations_train.csv, annotations_test.csv      image_id, class_name, x_min, y_min, x_max, y_max (empty for No finding)
  train/IMAGE_ID.dicom, test/IMAGE_ID.dicom

  python -m launch.pack --dataset=vindr_cxr --source=vindr-cxr --out=out/vindr_cxr

It has no reports: the texts are made of the labels by rules. A finding of a training film is there when two of its radiologists say so, which
is ours, and its boxes are all of theirs. Sex and age are those of the DICOM headers, where they say them. No
patients are published, so every film counts as one; a tenth of the training films becomes validation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from data import labels, records, splits, tables
from data.reports import from_labels
from rad_jax.chat.access import CREDENTIALED
from rad_jax.errors import UserError

_IDS = ("image_id", "rad_id", "rad_ID")
NONE = "No finding"
CLASSES = {  # theirs -> CheXpert's
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Clavicle fracture": "Fracture",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Infiltration": "Lung Opacity",
    "Lung Opacity": "Lung Opacity",
    "Lung tumor": "Lung Lesion",
    "Nodule/Mass": "Lung Lesion",
    "Pleural effusion": "Pleural Effusion",
    "Pleural thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "Rib fracture": "Fracture",
    NONE: "No Finding",
}


class VinDrCxr(records.SourceBuilder):
    """VinDr-CXR: Vietnamese chest radiographs with labels and boxes. PhysioNet credentialed access; not to be passed on."""

    name = "vindr_cxr"
    access = CREDENTIALED

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        kinds = ("image_labels", "annotations")
        return [tables.find(source, f"annotations/{kind}_{split}.csv") for split in ("train", "test") for kind in kinds]

    def jobs(self) -> dict[str, list[records.Film]]:
        train_labels, train_boxes, test_labels, test_boxes = self.defining(self.source)
        films = {
            "train": self._films("train", read_labels(train_labels), read_boxes(train_boxes)),
            "test": self._films("test", read_labels(test_labels), read_boxes(test_boxes)),
        }
        held_out = splits.validation_of(film.patient for film in films["train"])
        films["validation"] = [film for film in films["train"] if film.patient in held_out]
        films["train"] = [film for film in films["train"] if film.patient not in held_out]
        return {split: self.present(films[split]) for split in records.SPLITS}

    def _films(
        self, folder: str, found: dict[str, list[str]], boxes: dict[str, list[dict[str, Any]]]
    ) -> list[records.Film]:
        films = []
        for name, positive in found.items():
            vector = labels.vector(positive, CLASSES)
            text = from_labels.findings_of([n for n in positive if n != NONE]) or from_labels.of_chexpert(vector)
            if not text:
                self.skipped.append(records.Skip(name, f"{name}.dicom", "radiologists do not agree on anything"))
                continue
            films.append(
                records.Film(
                    path=self.source / folder / f"{name}.dicom",
                    id=name,
                    patient=name,
                    study=name,
                    view="PA",  # of all films, by the collection's own description
                    frontal=True,
                    texts=[records.text(text, method=from_labels.METHOD)],
                    labels=vector,
                    annotations=boxes.get(name, []),
                    source="VinDr-CXR",
                )
            )
        return films


def read_labels(path: Path) -> dict[str, list[str]]:
    """Image -> the findings that more than half of its rows say are there, in the order of the columns."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    rows_of: Counter[str] = Counter()
    for row in tables.read(path, "image_id", NONE):
        rows_of[row["image_id"]] += 1
        votes[row["image_id"]].update(
            {name: int(value in ("1", "1.0")) for name, value in row.items() if name not in _IDS}
        )
    return {image: [name for name, n in votes[image].items() if 2 * n > rows] for image, rows in rows_of.items()}


def read_boxes(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Image -> its boxes.

    Raises:
        UserError: a box is no number.
    """
    corners = ("x_min", "y_min", "x_max", "y_max")
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in tables.read(path, "image_id", "class_name", *corners):
        if not row["x_min"]:  # No finding has none
            continue
        try:
            box = [float(row[corner]) for corner in corners]
        except ValueError as error:
            raise UserError(f"{path}: a box is not four numbers: download it again.") from error
        found[row["image_id"]].append(records.boxed(row["class_name"], box))
    return found
