r"""NIH ChestX-ray14 as a TFDS builder: 112,120 frontal PNG films of 1024 x 1024 with 14 labels (Wang et al., CVPR 2017), free to use.

From nihcc.app.box.com/v/ChestXray-NIHCC, unpacked into one folder:

  Data_Entry_2017_v2020.csv or Data_Entry_2017.csv    Image Index, Finding Labels (joined by |), Patient ID, Patient Age ("058Y" in the older file), ...
  train_val_list.txt, test_list.txt                   the official split by patient; a tenth of the training patients becomes validation
  images/*.png, or images_001/images/*.png ...        the films
  BBox_List_2017.csv                                  optional: boxes of 8 findings

  python -m launch.pack --dataset=chestxray14 --source=nih --out=out/nih

It has no reports: the texts are made of the labels by rules.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from data import labels, records, splits, tables
from data.reports import from_labels
from rad_jax.chat.access import PUBLIC
from rad_jax.errors import UserError

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
BOXES = "BBox_List_2017.csv"
CLASSES = {  # theirs -> CheXpert's
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Infiltration": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "No Finding": "No Finding",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}


class ChestXray14(records.SourceBuilder):
    """NIH ChestX-ray14: frontal chest radiographs with 14 labels. NIH Clinical Center, Wang et al. 2017."""

    name = "chestxray14"
    access = PUBLIC

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        optional = [path for path in (source / BOXES,) if path.is_file()]
        return [tables.find(source, *TABLES), *(tables.find(source, name) for name in LISTS.values()), *optional]

    def jobs(self) -> dict[str, list[records.Film]]:
        table, *lists = self.defining(self.source)[:3]
        rows = tables.read(table, "Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position")
        listed = {name: split for split, path in zip(LISTS, lists, strict=True) for name in tables.text(path).split()}
        places = {path.name: path for path in sorted(self.source.glob("images*/**/*.png"))}
        boxes = read_boxes(self.source / BOXES)
        training = {row["Patient ID"] for row in rows if listed.get(row["Image Index"]) == "train"}
        held_out = splits.validation_of(training)
        films: dict[str, list[records.Film]] = {split: [] for split in records.SPLITS}
        for row in rows:
            name = row["Image Index"]
            split = listed.get(name)
            if split is None:
                self.skipped.append(records.Skip(name, name, "in no official split"))
                continue
            made = film(row, places.get(name, self.source / "images" / name), boxes.get(name, []))
            films["validation" if split == "train" and made.patient in held_out else split].append(made)
        return {split: self.present(of_split) for split, of_split in films.items()}


def film(row: tables.Row, path: Path, boxes: list[dict[str, Any]]) -> records.Film:
    """The film of a row."""
    found = row["Finding Labels"].split("|")
    positive = [name.replace("_", " ") for name in found if name != "No Finding"]
    stem = Path(row["Image Index"]).stem
    return records.Film(
        path=path,
        id=stem,
        patient=row["Patient ID"],
        study=stem,
        view=row["View Position"],
        frontal=True,
        texts=[
            records.text(
                from_labels.findings_of(positive) or from_labels.of_chexpert(labels.vector(found, CLASSES)),
                method=from_labels.METHOD,
            )
        ],
        sex=tables.sex(row.get("Patient Gender") or row.get("Patient Sex") or ""),
        age=tables.years(row["Patient Age"]),
        labels=labels.vector(found, CLASSES),
        annotations=boxes,
        source="NIH ChestX-ray14",
    )


def read_boxes(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Image -> its boxes. The header is "Image Index,Finding Label,Bbox [x,y,w,h],,," and one finding is spelled Infiltrate.

    Raises:
        UserError: a box is no number.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if not path.is_file():
        return found
    for row in tables.read(path, "Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"):
        try:
            x, y, width, height = (float(row[name]) for name in ("Bbox [x", "y", "w", "h]"))
        except ValueError as error:
            raise UserError(f"{path}: a box is not four numbers: download it again.") from error
        finding = row["Finding Label"].replace("Infiltrate", "Infiltration")
        found[row["Image Index"]].append(records.boxed(finding, [x, y, x + width, y + height]))
    return found
