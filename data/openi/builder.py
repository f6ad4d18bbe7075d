r"""Open-I, the chest radiographs and reports of Indiana University, as a TFDS builder.

3,955 XML reports and 7,470 PNG films (Demner-Fushman et al., JAMIA 2016), CC BY-NC-ND 4.0, without an account:

  mkdir -p openi/NLMCXR_png && cd openi
  curl -O https://openi.nlm.nih.gov/imgs/collections/NLMCXR_reports.tgz && tar xzf NLMCXR_reports.tgz
  curl -O https://openi.nlm.nih.gov/imgs/collections/NLMCXR_png.tgz && tar xzf NLMCXR_png.tgz -C NLMCXR_png
  python -m launch.pack --dataset=openi --source=openi --out=out/openi

which gives

  openi/ecgen-radiology/1.xml ...                     a report with the ids of its films
  openi/NLMCXR_png/CXR1_1_IM-0001-3001.png ...        the films, all in one folder
  openi/openi_image_views.csv                         yours, optional: columns dicom_id and ViewPosition (frontal or lateral)

The collection does not say which film is frontal. Films that the CSV does not name have no view and belong to no selection of frontal films.
`XXXX` in a text stands for what was removed when the collection was made anonymous. One report is one patient; the splits are ours.
"""

from __future__ import annotations

import csv
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from data import records, splits
from rad_jax.chat.access import PUBLIC
from rad_jax.errors import UserError

REPORTS, FILMS, VIEWS = "ecgen-radiology", "NLMCXR_png", "openi_image_views.csv"


class OpenI(records.SourceBuilder):
    """Chest radiographs with reports of Indiana University: Open-I, Demner-Fushman et al. 2016, CC BY-NC-ND 4.0."""

    name = "openi"
    access = PUBLIC

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        reports = sorted((source / REPORTS).glob("*.xml"))
        if not reports:
            raise UserError(
                f"{source}: no {REPORTS}/*.xml in it: --source is the folder of Open-I's reports and films."
            )
        return reports + [path for path in (source / VIEWS,) if path.is_file()]

    def jobs(self) -> dict[str, list[records.Film]]:
        views = read_views(self.source / VIEWS)
        films: list[records.Film] = []
        patients = []
        for path in self.defining(self.source):
            if path.suffix == ".xml":
                patients.append(path.stem)
                films += self._films(path, views)
        split_of = splits.by_patient(patients)
        usable = self.present(films)
        return {split: [film for film in usable if split_of[film.patient] == split] for split in records.SPLITS}

    def _films(self, path: Path, views: dict[str, str]) -> list[records.Film]:
        """The films of one report that has findings or an impression."""
        self.counts["reports"] += 1
        try:
            words, ids = read_report(path)
        except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two over an encoding that is none
            self.skipped.append(records.Skip(path.stem, "", "damaged report", damage(error)))
            return []
        for name in ("findings", "impression"):
            self.counts[f"reports with {name}"] += words[name] is not None
        reason = ""
        if not ids:
            reason = "report without film"
        elif not (words["findings"] or words["impression"]):
            reason = "neither findings nor impression"
        if reason:
            self.skipped += [records.Skip(name, "", reason) for name in ids or [path.stem]]
            return []
        self.counts["films without a view"] += sum(name not in views for name in ids)
        return [
            records.Film(
                path=self.source / FILMS / f"{name}.png",
                id=name,
                patient=path.stem,
                study=path.stem,
                view=views.get(name, "").upper(),
                frontal=views.get(name) == "frontal",
                texts=[words],
                source="Open-I, CC BY-NC-ND 4.0",
            )
            for name in ids
        ]


def read_report(path: Path) -> tuple[dict[str, str | None], list[str]]:
    """The text of a report, and the ids of its films.

    Raises:
        ElementTree.ParseError, LookupError, ValueError: the file is no XML.
    """
    root = ElementTree.parse(path).getroot()
    sections = {e.get("Label"): (e.text or "").strip() or None for e in root.iter("AbstractText")}
    words = records.text(
        sections.get("FINDINGS"), impression=sections.get("IMPRESSION"), indication=sections.get("INDICATION")
    )
    return words, [name for image in root.iter("parentImage") if (name := image.get("id"))]


def damage(error: Exception) -> str:
    """What is wrong with a report, of the errors of `read_report`; of an entity not even the name, which is part of the text."""
    if isinstance(error, ElementTree.ParseError):
        line, column = error.position
        return f"{expat.ErrorString(error.code)}: line {line}, column {column}"
    return str(error)


def read_views(path: Path) -> dict[str, str]:
    """Film -> frontal or lateral; empty without the file. A row that ends before its view says nothing of its film.

    Raises:
        UserError: the file is no CSV in UTF-8, or lacks a column.
    """
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"dicom_id", "ViewPosition"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path}: missing column {' and '.join(sorted(missing))}: add it, or remove the file.")
            views = {row["dicom_id"]: (row["ViewPosition"] or "").strip().lower() for row in reader}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV in UTF-8 ({error}): save it as one, or remove the file.") from error
    return {name: view for name, view in views.items() if view}
