r"""CANDID-PTX as a TFDS builder: 19,237 chest radiographs of Dunedin Hospital with reports (Feng et al. 2021), under its own agreement; not to
be passed on.

  Pneumothorax_reports.csv     SOPInstanceUID, EncodedPixels (a mask, or -1 for none), Report, and filename, which begins with the patient (P12_...);
                               a film with two masks has two rows
  chest_tube.csv, acute_rib_fracture.csv      optional: anon_SOPUID and mask_rle, one row for each mask of a chest tube or of a fracture
  dataset/SOPInstanceUID       DICOM files without a suffix

  python -m launch.pack --dataset=candid_ptx --source=candid --out=out/candid_ptx

A mask is a list of pairs: pixels to pass over since the end of the run before, and pixels of the next run, down the columns of the film (the
form of the SIIM-ACR challenge). Records have the box around each mask. Sex, age and view are read from the DICOM headers, and so is the patient
where the table has no filename. The splits are ours, by patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data import dicom, labels, records, splits, tables
from rad_jax.chat.access import CREDENTIALED

TABLE, FILMS = "Pneumothorax_reports.csv", "dataset"
FINDING, NO_MASK = "Pneumothorax", "-1"
# Tables of other masks, their finding, and CheXpert's label for it.
OTHERS = {
    "chest_tube.csv": ("Chest tube", "Support Devices"),
    "acute_rib_fracture.csv": ("Acute rib fracture", "Fracture"),
}


class CandidPtx(records.SourceBuilder):
    """CANDID-PTX: chest radiographs with reports and pneumothoraces. Its own agreement; not to be passed on."""

    name = "candid_ptx"
    access = CREDENTIALED

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [tables.find(source, TABLE), *(path for name in OTHERS if (path := source / name).is_file())]

    def jobs(self) -> dict[str, list[records.Film]]:
        table, *others = self.defining(self.source)
        rows: dict[str, list[tables.Row]] = {}
        masks: dict[str, list[tuple[str, str]]] = {}
        for row in tables.read(table, "SOPInstanceUID", "EncodedPixels", "Report"):
            rows.setdefault(row["SOPInstanceUID"], []).append(row)
            masks.setdefault(row["SOPInstanceUID"], []).append((FINDING, row["EncodedPixels"]))
            self.counts["rows"] += 1
        for path in others:
            for row in tables.read(path, "anon_SOPUID", "mask_rle"):
                masks.setdefault(row["anon_SOPUID"], []).append((OTHERS[path.name][0], row["mask_rle"]))
        self.counts["films with several rows"] = sum(len(of_film) > 1 for of_film in rows.values())
        films = []
        for name, of_film in rows.items():
            path = self.source / FILMS / name
            report = " ".join(of_film[0]["Report"].split())
            reason = ""
            if not report:
                reason = "no report"
            elif len({patient_of(row) for row in of_film}) > 1:
                reason = "of several patients"
            elif not path.is_file():
                reason = "missing image"
            elif (header := dicom.read_header(path)) is None:
                reason = "unreadable image"
            if reason:
                self.skipped.append(records.Skip(name, name, reason))
                continue
            assert header is not None
            drawn = [(finding, mask) for finding, mask in masks[name] if mask not in ("", NO_MASK)]
            cells = [row["EncodedPixels"] for row in of_film]
            made = film(path, header, drawn, cells, report, patient_of(of_film[0]))
            films.append(made)
            self.counts["masks"] += len(drawn)
            self.counts["masks that do not fit their film"] += len(drawn) - len(made.annotations)
        split_of = splits.by_patient(film.patient for film in films)
        return {split: [film for film in films if split_of[film.patient] == split] for split in records.SPLITS}


def film(
    path: Path, header: dicom.Header, masks: Sequence[tuple[str, str]], cells: Sequence[str], report: str, patient: str
) -> records.Film:
    """The film of all rows of one image.

    Args:
        path, header: its file, and what that says.
        masks: (finding, mask); one that does not fit the film gives no box, and the label all the same.
        cells: of the pneumothorax table: a mask, `NO_MASK` where there is none, or empty.
        report: its text.
        patient: empty where the table does not say.
    """
    stated = {label: 1 for finding, label in OTHERS.values() if any(finding == name for name, _ in masks)}
    if told := set(cells) - {""}:
        stated[FINDING] = int(told != {NO_MASK})
    boxes = ((finding, box_of(mask, header.shape)) for finding, mask in masks)
    return records.Film(
        path=path,
        id=path.name,
        patient=patient or header.patient or path.name,
        study=path.name,
        view="LATERAL" if header.lateral else header.view,
        # A header that says nothing is of a frontal film, as nearly all are.
        frontal=not header.lateral,
        texts=[records.text(report)],
        sex=header.sex,
        age=header.age,
        labels=[stated.get(name, labels.NOT_STATED) for name in labels.CHEXPERT],
        annotations=[records.boxed(finding, box) for finding, box in boxes if box],
        source="CANDID-PTX",
    )


def patient_of(row: tables.Row) -> str:
    """The patient that a row's file name begins with; empty where it has none."""
    first, joined, _ = row.get("filename", "").partition("_")
    return first if joined else ""


def box_of(mask: str, shape: tuple[int, int]) -> list[int] | None:
    """The box [x0, y0, x1, y1] around a mask, ends not in it; None for no mask and for one that does not fit a film of `shape` (Y, X)."""
    try:
        numbers = [int(word) for word in mask.split()]
    except ValueError:
        return None
    height, width = shape
    if len(numbers) < 2 or len(numbers) % 2 or min(numbers) < 0:
        return None
    end, columns, rows = 0, list[int](), list[int]()
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        start, end = end + gap, end + gap + length
        if end > height * width:
            return None
        if length:
            first, last = start // height, (end - 1) // height
            columns += [first, last]
            # A run that goes on in the next column has reached the film's lower and upper edge.
            rows += [start % height, (end - 1) % height] if first == last else [0, height - 1]
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1] if columns else None
