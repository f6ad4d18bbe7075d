"""What the header of a DICOM film says, before its pixels are decoded: patient, view, and whether it is a single grey chest film at all."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from data.tables import number, sex, years

_SUFFIXES = (".dcm", ".dicom", "")
_CHEST = ("CHEST", "THORAX", "LUNG", "RIB")
_LATERAL = ("LL", "RL", "LATERAL", "LAT", "LLD", "RLD")
_TAGS = (
    *("PatientID", "PatientSex", "PatientAge", "ViewPosition", "BodyPartExamined"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
)


@dataclasses.dataclass(frozen=True)
class Header:
    """What is not given is empty, an age -1; `unusable` says why this is no film to pack, in a phrase that can be counted; `shape` is (Y, X)."""

    patient: str
    sex: str
    age: int
    view: str
    unusable: str
    shape: tuple[int, int] = (0, 0)

    @property
    def lateral(self) -> bool:
        return self.view in _LATERAL


def read_header(path: Path) -> Header | None:
    """The header of a DICOM file; None for a file that is none, or whose header cannot be read."""
    import pydicom

    try:
        with path.open("rb") as file:
            named = file.read(132)[128:] == b"DICM"
        if not named and path.suffix.lower() not in _SUFFIXES:
            return None
        # pydicom's warnings quote the header, which may name a patient.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset: Any = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(_TAGS))
            if "Rows" not in dataset or "Columns" not in dataset:
                return None
            said = {tag: str(dataset.get(tag) or "").strip() for tag in _TAGS}
    except Exception:  # pydicom raises whatever damaged bytes lead it to
        return None
    return Header(
        patient=said["PatientID"],
        sex=sex(said["PatientSex"]),
        age=years(said["PatientAge"]),
        view=said["ViewPosition"].upper(),
        unusable=_unusable(said),
        shape=(number(said["Rows"], 0), number(said["Columns"], 0)),
    )


def _unusable(said: dict[str, str]) -> str:
    part = said["BodyPartExamined"].upper()
    if part and not any(word in part for word in _CHEST):
        return "not a chest film"
    if number(said["NumberOfFrames"], 1) > 1:
        return "several frames"
    if number(said["SamplesPerPixel"], 1) != 1 or not said["PhotometricInterpretation"].startswith("MONO"):
        return "colour image"
    return ""
