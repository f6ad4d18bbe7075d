r"""CANDID-PTX as a TFDS builder: 19,237 chest radiographs of Dunedin Hospital with reports (Feng et al. 2021), under its own agreement; not to
be passed on.

  Pneumothorax_reports.csv     SOPInstanceUID, EncodedPixels (a mask, or -1 for none), Report, and filename, which begins with the patient (P12_...);
                               a film with two masks has two rows
  dataset/SOPInstanceUID       DICOM files without a suffix

  python -m launch.pack --dataset=candid_ptx --source=candid --out=out/candid_ptx

A mask is a list of pairs: pixels to pass over since the end of the run before, and pixels of the next run, down the columns of the film (the
form of the SIIM-ACR challenge). Records have the box around each mask. Sex, age and view are read from the DICOM headers, and so is the patient
where the table has no filename. The splits are ours, by patient.
"""

from __future__ import annotations

from pathlib import Path

from data import dicom, labels, records, splits, tables
from rad_jax.chat.access import CREDENTIALED

TABLE, FILMS = "Pneumothorax_reports.csv", "dataset"
FINDING, NO_MASK = "Pneumothorax", "-1"


class CandidPtx(records.SourceBuilder):
    """CANDID-PTX: chest radiographs with reports and pneumothoraces. Its own agreement; not to be passed on."""

    name = "candid_ptx"
    access = CREDENTIALED

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [tables.find(source, TABLE)]

    def jobs(self) -> dict[str, list[records.Film]]:
        rows: dict[str, list[tables.Row]] = {}
        for row in tables.read(self.defining(self.source)[0], "SOPInstanceUID", "EncodedPixels", "Report"):
            rows.setdefault(row["SOPInstanceUID"], []).append(row)
            self.counts["rows"] += 1
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
            made = film(path, header, of_film, report)
            films.append(made)
            masks = sum(row["EncodedPixels"] not in ("", NO_MASK) for row in of_film)
            self.counts["masks"] += masks
            self.counts["masks that do not fit their film"] += masks - len(made.annotations)
        split_of = splits.by_patient(film.patient for film in films)
        return {split: [film for film in films if split_of[film.patient] == split] for split in records.SPLITS}


def film(path: Path, header: dicom.Header, rows: list[tables.Row], report: str) -> records.Film:
    """The film of all rows of one image. A mask that does not fit it gives no box, and the label all the same."""
    masks = {row["EncodedPixels"] for row in rows} - {""}
    stated = int(masks != {NO_MASK}) if masks else labels.NOT_STATED
    boxes = (box_of(row["EncodedPixels"], header.shape) for row in rows)
    vector = [stated if name == FINDING else labels.NOT_STATED for name in labels.CHEXPERT]
    return records.Film(
        path=path,
        id=path.name,
        patient=patient_of(rows[0]) or header.patient or path.name,
        study=path.name,
        view="LATERAL" if header.lateral else header.view,
        # A header that says nothing is of a frontal film, as nearly all are.
        frontal=not header.lateral,
        texts=[records.text(report)],
        sex=header.sex,
        age=header.age,
        labels=vector,
        annotations=[records.boxed(FINDING, box) for box in boxes if box],
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
