r"""MIMIC-CXR as TFDS builders: with the texts of the LLaVA-Rad annotations (mimic_cxr), or with its own reports, split by the rules of MIMIC's
own section parser (mimic_cxr_reports) or with that parser's defects mended (mimic_cxr_reports_corrected).

PhysioNet gives access after a course and a signed agreement; reports, films and what is made of them stay with those who signed. Put into
one folder, as PhysioNet lays them out:

  files/p10/p10000000/s50000000/DICOM.jpg             MIMIC-CXR-JPG 2.1.0, physionet.org/content/mimic-cxr-jpg
  chat_train_MIMIC_CXR_all_gpt4extract_rulebased_v1.json   and chat_dev_..., chat_test_...: LLaVA-Rad MIMIC-CXR Annotations 1.0.0,
                                                      physionet.org/content/llava-rad-mimic-cxr-annotation
  files/p10/p10000000/s50000000.txt                   mimic_cxr_reports: mimic-cxr-reports.zip of MIMIC-CXR 2.1.0, unpacked
  mimic-cxr-2.0.0-split.csv.gz, -metadata.csv.gz, -chexpert.csv.gz   mimic_cxr_reports: of MIMIC-CXR-JPG; .csv will do

  python -m launch.pack --dataset=mimic_cxr --source=mimic --tokenizer=tokenizer.model --out=out/mimic_cxr

The selections are the five loaders of LLaVA-Rad (default, mimic_train_findings, mimic_test_findings, mimic_cxr_all_frontal_findings,
mimic_cxr_all_views_findings), each also with one method alone (mimic_train_findings.rule-based, .gpt4). Packing compares the rows of the
training, validation and test sets with the published numbers, 400,042 / 3,238 / 2,461.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from data import records, tables
from data.labels import CHEXPERT, NOT_STATED, chexpert_vector
from data.mimic_cxr import annotations as llava_rad
from data.reports import sections
from data.selections import COMMON, Selection
from rad_jax.chat.access import CREDENTIALED
from rad_jax.errors import UserError

FILES, TABLE = "files", "mimic-cxr-2.0.0-{}.csv"
_SPLITS = {"train": "train", "validate": "validation", "test": "test"}


class MimicCxr(records.SourceBuilder):
    """MIMIC-CXR-JPG with the texts of the LLaVA-Rad annotations. PhysioNet credentialed access; not to be passed on."""

    name = "mimic_cxr"
    access = CREDENTIALED
    selections: ClassVar = {**COMMON, **llava_rad.LOADERS}
    published = llava_rad.PUBLISHED

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [_needed(source / name) for name in llava_rad.FILES.values()]

    def jobs(self) -> dict[str, list[records.Film]]:
        paths, folder = self.defining(self.source), _needed(self.source / FILES)
        of_split: dict[str, list[records.Film]] = {}
        for split, path in zip(llava_rad.FILES, paths, strict=True):
            entries = llava_rad.read(path)
            self.counts[f"{split} entries"] = len(entries)
            of_split[split] = llava_rad.films(entries, folder)
            for name in ("mimic_train_findings", "mimic_test_findings"):
                if split in self.published[name]:
                    self.counts[f"{split} entries of {name}"] = _kept(of_split[split], self.selections[name])
        return {split: self.present(films) for split, films in of_split.items()}


class MimicCxrReports(records.SourceBuilder):
    """MIMIC-CXR-JPG with MIMIC-CXR's reports, split into sections by rules. PhysioNet credentialed access; not to be passed on."""

    name = "mimic_cxr_reports"
    access = CREDENTIALED
    fixes: ClassVar[frozenset[str]] = frozenset()
    method = "rule-based"

    @classmethod
    def defining(cls, source: Path) -> list[Path]:
        return [tables.find(source, TABLE.format(name)) for name in ("split", "metadata")]

    def jobs(self) -> dict[str, list[records.Film]]:
        folder = _needed(self.source / FILES)
        split_table, view_table = self.defining(self.source)
        split_of = tables.read(split_table, "dicom_id", "study_id", "subject_id", "split")
        views = {row["dicom_id"]: row["ViewPosition"] for row in tables.read(view_table, "dicom_id", "ViewPosition")}
        labels = self._labels()
        read: dict[str, tuple[str | None, list[dict[str, str | None]]]] = {}
        of_split: dict[str, list[records.Film]] = {split: [] for split in records.SPLITS}
        for row in split_of:
            patient, study, dicom = row["subject_id"], row["study_id"], row["dicom_id"]
            place = folder / f"p{patient[:2]}" / f"p{patient}"
            if row["split"] not in _SPLITS:
                self.skipped.append(records.Skip(dicom, f"{dicom}.jpg", "in no official split"))
                continue
            if study not in read:
                read[study] = self._report(place / f"s{study}.txt")
            report, texts = read[study]
            if not texts and not (report and self.keeps(report)):
                self.skipped.append(records.Skip(dicom, f"{dicom}.jpg", "no report with findings or impression"))
                continue
            view = views.get(dicom, "")
            film = records.Film(
                path=place / f"s{study}" / f"{dicom}.jpg",
                id=dicom,
                patient=patient,
                study=study,
                view=view,
                frontal=view in llava_rad.FRONTAL,
                texts=texts,
                report=report,
                labels=labels.get(study, (NOT_STATED,) * len(CHEXPERT)),
                source="MIMIC-CXR-JPG, MIMIC-CXR reports",
            )
            of_split[_SPLITS[row["split"]]].append(film)
        return {split: self.present(films) for split, films in of_split.items()}

    def _report(self, path: Path) -> tuple[str | None, list[dict[str, str | None]]]:
        """A report file, None where there is none, and its text in a list, empty where it has neither findings nor impression."""
        self.counts["reports"] += 1
        try:
            report = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            self.counts["reports missing"] += 1
            return None, []
        for fix in sections.differences(report):
            self.counts[f"reports that the fix {fix!r} changes"] += 1
        found = {name: " ".join(text.split()) or None for name, text in sections.extract(report, self.fixes).items()}
        for name in ("findings", "impression"):
            self.counts[f"reports with {name}"] += found.get(name) is not None
        if not (found.get("findings") or found.get("impression")):
            return report, []
        indication = found.get("indication") or found.get("history")
        words = records.text(
            found.get("findings"), impression=found.get("impression"), indication=indication, method=self.method
        )
        return report, [words]

    def _labels(self) -> dict[str, list[int]]:
        """Study -> CheXpert's labels, where the table is there."""
        try:
            path = tables.find(self.source, TABLE.format("chexpert"))
        except UserError:
            return {}
        return {row["study_id"]: chexpert_vector(row) for row in tables.read(path, "study_id", *CHEXPERT)}


class MimicCxrReportsCorrected(MimicCxrReports):
    """MIMIC-CXR-JPG with MIMIC-CXR's reports, split by the mended rules. PhysioNet credentialed access; not to be passed on."""

    name = "mimic_cxr_reports_corrected"
    fixes = sections.ALL_FIXES
    method = "rule-based-corrected"


def _needed(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: not there: --source is the folder of MIMIC-CXR-JPG with what --dataset adds to it.")
    return path


def _kept(films: list[records.Film], selection: Selection) -> int:
    return sum(selection.keep({"view": film.view}, text) for film in films for text in film.texts)
