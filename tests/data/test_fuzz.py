"""2,000 damaged inputs: each becomes a record, a skip with its reason, or one sentence; none crashes, hangs or eats memory.

They are read in a process of their own, which is this file as a script: the system ends it when one input takes too long, and refuses it a
gigabyte more than it has after the undamaged input. A refusal that a reader makes a sentence of is told all the same.
"""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import warnings
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
from rad_jax import images
from rad_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EACH, SECONDS, MEMORY = 200, 30, 1 << 30
# Outcomes of an input that nothing is wrong with, or none that shows.
UNNOTICED = {"read", "record", "films", "sections", "missing image", "neither findings nor impression"}
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
    if not isinstance(made, records.Skip):
        return "record"
    if made.reason == "unreadable image":
        images.load_short(path, 16)  # raises, with what is behind it
    return made.reason


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


def hang(path: Path) -> None:
    while path.read_bytes() != b"whole":
        pass


def fill(path: Path) -> None:
    if path.read_bytes() != b"whole":
        try:
            bytearray(2 * MEMORY)
        except MemoryError as error:
            raise UserError("no film") from error


FAULTS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], Any]]] = {
    name: ("a", lambda folder: b"whole", read) for name, read in (("hang", hang), ("fill", fill))
}


def read_all(kind: str, folder: Path, count: int, seconds: int) -> Counter[str]:
    """What becomes of the mutations of one kind, in this process, which must be one to lose."""
    name, whole, read = (KINDS | FAULTS)[kind]
    path = folder / name
    path.write_bytes(whole(folder))
    read(path)  # the undamaged one is read, and what it imports is there
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    outcomes: Counter[str] = Counter()
    for data in mutations(whole(folder), count, seed=len(kind)):
        path.write_bytes(data)
        signal.alarm(seconds)
        try:
            outcome = read(path)
            outcomes[outcome if isinstance(outcome, str) else "read"] += 1
        except UserError as error:
            outcomes["out of memory" if out_of_memory(error) else "refused"] += 1
        signal.alarm(0)
    return outcomes


def out_of_memory(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def child(*arguments: object) -> subprocess.CompletedProcess[str]:
    """This file as a script."""
    command = [sys.executable, __file__, *map(str, arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Kind -> outcome -> how many inputs; the kind that ended the process, and those after it, are not there."""
    done = child(tmp_path_factory.mktemp("fuzz"), EACH, SECONDS, *KINDS)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == 0, (done.returncode, list(KINDS)[len(found)], done.stderr[-2000:])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input(kind, outcomes):
    found = outcomes[kind]
    assert "out of memory" not in found, found
    noticed = sum(count for outcome, count in found.items() if outcome not in UNNOTICED)
    # Every byte of a PNG is under a checksum, and a report may be any text.
    least, most = {"png": (EACH, EACH), "report": (0, 0)}.get(kind, (EACH // 4, EACH - 1))
    assert least <= noticed <= most, found


@pytest.mark.parametrize(("fault", "status"), [("hang", -signal.SIGALRM), ("fill", 0)])
def test_the_limits_hold(fault, status, tmp_path):
    """A reader that hangs ends its process, and one that hides that it ran out of memory is found out."""
    done = child(tmp_path, 2, 3, fault)
    assert done.returncode == status, done.stderr[-2000:]
    if fault == "fill":
        assert json.loads(done.stdout) == [fault, {"out of memory": 2}]


if __name__ == "__main__":
    warnings.simplefilter("error")  # a warning could quote what was read
    place, count, seconds, *kinds = sys.argv[1:]
    for each in kinds:
        print(json.dumps([each, read_all(each, Path(place), int(count), int(seconds))]), flush=True)
