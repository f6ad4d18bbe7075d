r"""Object-CXR of JF Healthcare as a TFDS builder: frontal chest radiographs with and without foreign objects, and where those are.

From academictorrents.com/details/fdc91f11d7010f7259a05403fc9d00079a09f5d5, unpacked:

  train.csv, dev.csv       two columns, the film and its annotation: shapes joined by ;, each a kind (0 rectangle, 1 ellipse, 2 polygon) and its
                           coordinates; empty without a foreign object
  train/*.jpg, dev/*.jpg   the films

  python -m launch.pack --dataset=object_cxr --source=object-cxr --out=out/object_cxr

It has no reports: the texts say whether there is a foreign object. No patients are published, so every film counts as one. dev is the test
split; a tenth of the training films becomes validation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data import records, splits, tables
from data.reports import from_labels
from rad_jax.errors import UserError

_SPLITS = {"train": "train", "dev": "test"}
OBJECT = "foreign object"


class ObjectCxr(records.SourceBuilder):
    """Object-CXR: chest radiographs with foreign objects, JF Healthcare."""

    name = "object_cxr"

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [tables.find(source, f"{name}.csv") for name in _SPLITS]

    def jobs(self) -> dict[str, list[records.Film]]:
        films: dict[str, list[records.Film]] = {split: [] for split in records.SPLITS}
        for name, path in zip(_SPLITS, self.defining(self.source), strict=True):
            rows = tables.numbered(path, "annotation")
            films[_SPLITS[name]] = [film(row, self.source / name, f"{path}, line {line}") for line, row in rows]
        held_out = splits.validation_of(film.patient for film in films["train"])
        films["validation"] = [film for film in films["train"] if film.patient in held_out]
        films["train"] = [film for film in films["train"] if film.patient not in held_out]
        return {split: self.present(of_split) for split, of_split in films.items()}


def film(row: tables.Row, folder: Path, where: str) -> records.Film:
    """The film of a row; `where` that is, for errors to name.

    Raises:
        UserError: the annotation is not as published.
    """
    # The first column has had different names.
    image = next((value for name, value in row.items() if name != "annotation"), None)
    if image is None:
        raise UserError(f"{where}: no column with the film beside the annotation: download it again.")
    path = folder / Path(image).name
    try:
        boxes = read_shapes(row["annotation"])
    except ValueError as error:
        raise UserError(f"{where}: an annotation is not as published: download it again.") from error
    name = f"{folder.name}-{path.stem}"
    text = from_labels.findings_of([OBJECT]) if boxes else from_labels.findings_of([], [OBJECT])
    return records.Film(
        path=path,
        id=name,
        patient=name,
        study=name,
        view="",
        frontal=True,
        texts=[records.text(text, method=from_labels.METHOD)],
        annotations=boxes,
        source="Object-CXR, JF Healthcare",
    )


def read_shapes(cell: str) -> list[dict[str, Any]]:
    """The boxes around the shapes of an annotation.

    Raises:
        ValueError: it is not as published.
    """
    boxes = []
    for shape in filter(None, (part.strip() for part in cell.split(";"))):
        kind, *values = (float(value) for value in shape.split())
        if kind not in (0, 1, 2) or len(values) < 4 or len(values) % 2 or (kind != 2 and len(values) != 4):
            raise ValueError("no such shape")
        x, y = values[::2], values[1::2]
        boxes.append(records.boxed(OBJECT, [min(x), min(y), max(x), max(y)]))
    return boxes
