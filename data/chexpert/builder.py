r"""CheXpert and CheXpert Plus as TFDS builders: Stanford's chest radiographs with labels (Irvin et al. 2019), and with their reports
(Chambon et al. 2024). Stanford University School of Medicine research use agreement; not to be passed on.

CheXpert, --dataset=chexpert: SOURCE is the folder CheXpert-v1.0 (or CheXpert-v1.0-small) itself:

  train.csv, valid.csv       Path, Sex, Age, Frontal/Lateral, AP/PA and 14 labels: 1.0, 0.0, -1.0 or empty
  train/patient00001/study1/view1_frontal.jpg ...

It has no reports: the texts are made of the labels by rules.

CheXpert Plus, --dataset=chexpert_plus:

  df_chexpert_plus_240401.csv      path_to_image, frontal_lateral, ap_pa, deid_patient_id, section_findings, section_impression, ..., split
  PNG/train/patient00001/study1/view1_frontal.png ...      the table says .jpg

  python -m launch.pack --dataset=chexpert_plus --source=chexpert_plus --out=out/chexpert_plus

Both have the official splits train and valid and no test split.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from data import records, tables
from data.labels import CHEXPERT, chexpert_vector
from data.reports import from_labels
from rad_jax.chat.access import CREDENTIALED
from rad_jax.errors import UserError

_SPLITS = {"train": "train", "valid": "validation"}
PLUS = "df_chexpert_plus_240401.csv"
LATERAL = "LATERAL"


class CheXpert(records.SourceBuilder):
    """CheXpert: chest radiographs of Stanford with 14 labels. Research use agreement; not to be passed on."""

    name = "chexpert"
    access = CREDENTIALED

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [tables.find(source, f"{name}.csv") for name in _SPLITS]

    def jobs(self) -> dict[str, list[records.Film]]:
        return {
            split: self.present(self._films(path))
            for split, path in zip(_SPLITS.values(), self.defining(self.source), strict=True)
        }

    def _films(self, path: Path) -> list[records.Film]:
        films = []
        for line, row in tables.numbered(path, "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT):
            _, _, inner = row["Path"].partition("/")  # without CheXpert-v1.0
            place = place_of(inner, path, line)
            labels = chexpert_vector(row)
            text = from_labels.of_chexpert(labels)
            name = "-".join(place.with_suffix("").parts[1:])
            if not text:
                self.skipped.append(records.Skip(name, place.name, "no label stated"))
                continue
            frontal = row["Frontal/Lateral"] == "Frontal"
            films.append(
                records.Film(
                    path=self.source / place,
                    id=name,
                    patient=place.parts[1],
                    study="-".join(place.parts[1:3]),
                    view=row["AP/PA"] if frontal else LATERAL,
                    frontal=frontal,
                    texts=[records.text(text, method=from_labels.METHOD)],
                    sex=tables.sex(row["Sex"]),
                    age=tables.years(row["Age"]),
                    labels=labels,
                    source="CheXpert",
                )
            )
        return films


class CheXpertPlus(records.SourceBuilder):
    """CheXpert Plus: chest radiographs of Stanford with reports. Research use agreement; not to be passed on."""

    name = "chexpert_plus"
    access = CREDENTIALED

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [tables.find(source, PLUS)]

    def jobs(self) -> dict[str, list[records.Film]]:
        columns = (
            "path_to_image",
            "frontal_lateral",
            "ap_pa",
            "deid_patient_id",
            "section_findings",
            "section_impression",
        )
        (table,) = self.defining(self.source)
        rows = tables.numbered(table, *columns, "section_clinical_history", "section_history", "split")
        films: dict[str, list[records.Film]] = {split: [] for split in _SPLITS.values()}
        for line, row in rows:
            place = place_of(row["path_to_image"], table, line)
            name = "-".join(place.with_suffix("").parts[1:])
            findings, impression, *reasons = (
                " ".join(row[f"section_{part}"].split()) or None
                for part in ("findings", "impression", "clinical_history", "history")
            )
            for part, text in (("findings", findings), ("impression", impression)):
                self.counts[f"films with {part}"] += text is not None
            if row["split"] not in _SPLITS:
                self.skipped.append(records.Skip(name, place.name, "in no official split"))
                continue
            if not (findings or impression):
                self.skipped.append(records.Skip(name, place.name, "neither findings nor impression"))
                continue
            frontal = row["frontal_lateral"] == "Frontal"
            films[_SPLITS[row["split"]]].append(
                records.Film(
                    path=self.source / "PNG" / place.with_suffix(".png"),
                    id=name,
                    patient=row["deid_patient_id"],
                    study="-".join(place.parts[1:3]),
                    view=row["ap_pa"] if frontal else LATERAL,
                    frontal=frontal,
                    texts=[records.text(findings, impression=impression, indication=next(filter(None, reasons), None))],
                    sex=tables.sex(row.get("sex", "")),
                    age=tables.years(row.get("age", "")),
                    source="CheXpert Plus",
                )
            )
        return {split: self.present(of_split) for split, of_split in films.items()}


def place_of(cell: str, table: Path, line: int) -> PurePosixPath:
    """Where a film lies, SPLIT/PATIENT/STUDY/FILM.

    Raises:
        UserError: the cell is not as published.
    """
    place = PurePosixPath(cell)
    if len(place.parts) != 4:
        raise UserError(f"{table}, line {line}: the path of a film is not as published: download it again.")
    return place
