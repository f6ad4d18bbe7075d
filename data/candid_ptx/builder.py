r"""CANDID-PTX as a TFDS builder: 19,237 chest radiographs of Dunedin Hospital with reports (Feng et al. 2021), under its own agreement; not to
be passed on.

  Pneumothorax_reports.csv     SOPInstanceUID, EncodedPixels (a mask, or -1 for none), Report; a film with two masks has two rows
  dataset/SOPInstanceUID       DICOM files without a suffix

  python -m launch.pack --dataset=candid_ptx --source=candid --out=out/candid_ptx

Patient, sex, age and view are read from the DICOM headers. The splits are ours, by patient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data import labels, records, splits, tables

TABLE, FILMS = "Pneumothorax_reports.csv", "dataset"
_TAGS = ("PatientID", "PatientSex", "PatientAge", "ViewPosition")


class CandidPtx(records.SourceBuilder):
    """CANDID-PTX: chest radiographs with reports and pneumothoraces. Its own agreement; not to be passed on."""

    name = "candid_ptx"

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
            elif not path.is_file():
                reason = "missing image"
            elif (header := read_header(path)) is None:
                reason = "unreadable image"
            if reason:
                self.skipped.append(records.Skip(name, name, reason))
                continue
            assert header is not None
            films.append(film(path, header, of_film, report))
        split_of = splits.by_patient(film.patient for film in films)
        return {split: [film for film in films if split_of[film.patient] == split] for split in records.SPLITS}


def film(path: Path, header: dict[str, str], rows: list[tables.Row], report: str) -> records.Film:
    """The film of all rows of one image."""
    masks = {row["EncodedPixels"] for row in rows} - {""}
    stated = int(masks != {"-1"}) if masks else labels.NOT_STATED
    vector = [stated if name == "Pneumothorax" else labels.NOT_STATED for name in labels.CHEXPERT]
    view = header["ViewPosition"].upper()
    return records.Film(
        path=path,
        id=path.name,
        patient=header["PatientID"] or path.name,
        study=path.name,
        view=view,
        # A header that says nothing is of a frontal film, as nearly all are.
        frontal=view not in ("LL", "RL", "LATERAL"),
        texts=[records.text(report)],
        sex=header["PatientSex"] if header["PatientSex"] in ("F", "M") else "",
        age=tables.number(header["PatientAge"]),
        labels=vector,
        source="CANDID-PTX",
    )


def read_header(path: Path) -> dict[str, str] | None:
    """Patient, sex, age and view of a DICOM file, empty where not given; None when it cannot be read."""
    import pydicom

    try:
        header: Any = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=[*_TAGS, "Rows"])
        if "Rows" not in header:  # no image
            return None
        return {tag: str(header.get(tag) or "").strip() for tag in _TAGS}
    except Exception:  # pydicom raises whatever damaged bytes lead it to
        return None
