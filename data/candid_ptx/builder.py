r"""CANDID-PTX as a TFDS builder: 19,237 chest radiographs of Dunedin Hospital with reports (Feng et al. 2021), under its own agreement; not to
be passed on.

  Pneumothorax_reports.csv     SOPInstanceUID, EncodedPixels (a mask, or -1 for none), Report; a film with two masks has two rows
  dataset/SOPInstanceUID       DICOM files without a suffix

  python -m launch.pack --dataset=candid_ptx --source=candid --out=out/candid_ptx

Patient, sex, age and view are read from the DICOM headers. The splits are ours, by patient.
"""

from __future__ import annotations

from pathlib import Path

from data import dicom, labels, records, splits, tables
from rad_jax.chat.access import CREDENTIALED

TABLE, FILMS = "Pneumothorax_reports.csv", "dataset"


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
            elif not path.is_file():
                reason = "missing image"
            elif (header := dicom.read_header(path)) is None:
                reason = "unreadable image"
            if reason:
                self.skipped.append(records.Skip(name, name, reason))
                continue
            assert header is not None
            films.append(film(path, header, of_film, report))
        split_of = splits.by_patient(film.patient for film in films)
        return {split: [film for film in films if split_of[film.patient] == split] for split in records.SPLITS}


def film(path: Path, header: dicom.Header, rows: list[tables.Row], report: str) -> records.Film:
    """The film of all rows of one image."""
    masks = {row["EncodedPixels"] for row in rows} - {""}
    stated = int(masks != {"-1"}) if masks else labels.NOT_STATED
    vector = [stated if name == "Pneumothorax" else labels.NOT_STATED for name in labels.CHEXPERT]
    return records.Film(
        path=path,
        id=path.name,
        patient=header.patient or path.name,
        study=path.name,
        view="LATERAL" if header.lateral else header.view,
        # A header that says nothing is of a frontal film, as nearly all are.
        frontal=not header.lateral,
        texts=[records.text(report)],
        sex=header.sex,
        age=header.age,
        labels=vector,
        source="CANDID-PTX",
    )
