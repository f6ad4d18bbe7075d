"""2,000 damaged inputs: each becomes a record, a skip with its reason, or one sentence; none crashes, hangs or eats memory."""

import gzip
import json
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from data import records, tables
from data.chestxray14.builder import read_boxes
from data.mimic_cxr import annotations
from data.openi.builder import OpenI
from data.reports.sections import ALL_FIXES, differences, split_sections
from data.vindr_cxr.builder import read_labels
from rad_jax.errors import UserError

EACH = 200
XML = '<?xml version="1.0" encoding="utf-8"?>\n<eCitation><uId id="CXR1"/><AbstractText Label="FINDINGS">Clear.</AbstractText><parentImage id="CXR1_1"/></eCitation>'
REPORT = " FINAL REPORT\n INDICATION:  Cough.\n \n FINDINGS:\n \n Clear.\n \n IMPRESSION:  Normal.\n"


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Cut, with bytes changed, taken out, doubled, or replaced by what parsers trip over."""
    rng = random.Random(seed)
    nasty = (
        b"\x00",
        b"\xff\xff\xff\xff",
        b"<!--",
        b"]]>",
        b'"',
        b",",
        b"\n",
        b"NaN",
        b"[" * 400,
        b"1e999",
        b"&lol;",
        b"utf-99",
    )
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(max(len(changed), 1))
            match rng.randrange(5):
                case 0:
                    del changed[place:]
                case 1:
                    changed[place : place + 1] = bytes([rng.randrange(256)])
                case 2:
                    del changed[place : place + rng.randint(1, 20)]
                case 3:
                    changed[place:place] = changed[place : place + rng.randint(1, 50)]
                case _:
                    changed[place:place] = rng.choice(nasty)
        yield bytes(changed)


def film_bytes(kind: str, folder: Path) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40), np.uint8)
    path = folder / f"whole.{kind}"
    if kind != "dcm":
        Image.fromarray(pixels).save(path)
        return path.read_bytes()
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.UID("1.2.3")
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelRepresentation, dataset.SamplesPerPixel = 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.WindowCenter, dataset.WindowWidth = 100, 200
    dataset.PixelData = pixels.tobytes()
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path.read_bytes()


def read_film(path: Path) -> str:
    film = records.Film(path, "id", "patient", "study", "PA", True, [records.text("Clear.")])
    made = records.make(film, 16)
    return made.reason if isinstance(made, records.Skip) else "record"


def read_openi(path: Path) -> str:
    folder = path.parent / "openi/ecgen-radiology"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1.xml").write_bytes(path.read_bytes())
    builder = OpenI(source=folder.parent, image_size=16, data_dir=path.parent / "tfds")
    builder.jobs()
    assert builder.skipped and builder.counts["reports"] == 1
    return builder.skipped[0].reason


def read_annotations(path: Path) -> str:
    annotations.films(annotations.read(path), path.parent)
    return "films"


def read_sections(path: Path) -> str:
    text = path.read_text("utf-8", errors="replace")
    for fixes in ((), ALL_FIXES):
        assert all(text[s.start : s.start + len(s.text)] == s.text for s in split_sections(text, fixes)[:1])
    differences(text)
    return "sections"


ENTRY = {
    "id": "1_2",
    "image": "mimic/p10/p10000000/s50000000/a.jpg",
    "generate_method": "gpt4",
    "reason": None,
    "view": "PA",
    "chexpert_labels": {"Edema": float("nan")},
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Clear."}],
}
KINDS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], Any]]] = {
    "png": ("a.png", lambda folder: film_bytes("png", folder), read_film),
    "jpeg": ("a.jpg", lambda folder: film_bytes("jpg", folder), read_film),
    "dicom": ("a.dcm", lambda folder: film_bytes("dcm", folder), read_film),
    "dicom without suffix": ("a", lambda folder: film_bytes("dcm", folder), read_film),
    "xml": ("a.xml", lambda folder: XML.encode(), read_openi),
    "json": ("a.json", lambda folder: json.dumps([ENTRY, ENTRY]).encode(), read_annotations),
    "csv": ("a.csv", lambda folder: b"image_id,R,No finding,Edema\na,R1,1,0\na,R2,0,1\nb,R1,1,0\n", read_labels),
    "boxes": (
        "b.csv",
        lambda folder: b"Image Index,Finding Label,Bbox [x,y,w,h],,,\na.png,Mass,1,2,3,4,,,\n",
        read_boxes,
    ),
    "csv.gz": ("a.csv.gz", lambda folder: gzip.compress(b"a,b\n1,2\n", mtime=0), lambda path: tables.read(path, "a")),
    "report": ("a.txt", lambda folder: REPORT.encode(), read_sections),
}


@pytest.mark.filterwarnings("error")  # a warning could quote what was read
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input(kind, tmp_path):
    name, whole, read = KINDS[kind]
    path = tmp_path / name
    path.write_bytes(whole(tmp_path))
    read(path)  # the undamaged one is read
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in mutations(whole(tmp_path), EACH, seed=len(kind)):
        path.write_bytes(data)
        try:
            outcome = read(path)
            outcomes[outcome if isinstance(outcome, str) else "read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes.total() == EACH
    # Text may be anything; of the others some must be noticed.
    assert kind == "report" or outcomes.keys() - {"read", "record", "films", "neither findings nor impression"}, (
        outcomes
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB
    print(kind, dict(outcomes))
