"""Published corpora: a miniature of each one's true layout with its quirks, and a wrong folder refused by the name of the missing file."""

import csv
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from data import tables
from data.candid_ptx.builder import box_of
from data.corpora import CORPORA, builder_class
from data.dicom import read_header
from data.labels import CHEXPERT
from data.packing import Arguments, pack
from data.padchest.builder import read_labels
from data.records import Film
from data.reports.from_labels import findings_of, of_chexpert
from data.selections import count_patients
from data.splits import by_patient, validation_of
from evaluation.corpus import groups_of
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError

PIXELS = np.arange(45 * 30, dtype=np.uint16).reshape(45, 30)


def write_table(path: Path, rows: list[dict[str, Any]], header: str | None = None) -> None:
    """A CSV; with `header` as the first line where the publisher's is no valid one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if header is None:
            writer.writeheader()
        else:
            file.write(f"{header}\n")
        writer.writerows(rows)


def write_film(path: Path, deep: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS * 50 if deep else (PIXELS % 256).astype(np.uint8)).save(path)


def write_dicom(path: Path, **tags: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.Rows, dataset.Columns = PIXELS.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation, dataset.SamplesPerPixel = 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.PixelData = PIXELS.tobytes()
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def packed(dataset: str, source: Path, out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The manifest, and every text of every film by its id, with its split; no patient is in two splits."""
    arguments = Arguments(
        dataset=dataset, source=str(source), image_size=20, studies=10, seed=0, tokenizer=None, vocab_size=512
    )
    manifest, _ = pack(arguments, out, workers=1, progress=False)
    corpus = Corpus.open(out)
    rows: dict[str, dict[str, Any]] = {}
    patients: list[set[str]] = []
    for name in manifest["selections"]:
        for split in manifest["splits"]:
            if manifest["selections"][name]["splits"][split]["rows"]:
                source_ = corpus.source(split, name)
                found = [source_[number] for number in range(len(source_))]
                rows |= {row["id"]: row | {"split": split} for row in found}
    for split in manifest["splits"]:
        patients.append({row["patient"] for row in rows.values() if row["split"] == split})
    assert sum(map(len, patients)) == len(set.union(*patients))
    counted = manifest["summary"]["patients"]
    assert counted == dict(zip(manifest["splits"], map(len, patients), strict=True))
    return manifest, rows


def refused(dataset: str, source: Path, message: str) -> None:
    builder = builder_class(dataset)(source=source, image_size=20, data_dir=source.parent / "refused")
    with pytest.raises(UserError, match=message):
        builder.jobs()


def stated(row: dict[str, Any]) -> dict[str, int]:
    return {name: int(value) for name, value in zip(CHEXPERT, row["labels"], strict=True) if value != -2}


def selected(manifest: dict[str, Any], name: str) -> int:
    return sum(index["rows"] for index in manifest["selections"][name]["splits"].values())


# ------------------------------------------------------------------------------------------------------------------ one miniature each


def nih_row(name: str, found: str, patient: int, age: str) -> dict[str, Any]:
    return {
        "Image Index": name,
        "Finding Labels": found,
        "Follow-up #": 0,
        "Patient ID": patient,
        "Patient Age": age,
        "Patient Gender": "F",
        "View Position": "AP",
        "w": 2682,
        "h": 2749,
        "x": 0.143,
        "y": 0.143,
        "": "",
    }


def test_chestxray14(tmp_path):
    source = tmp_path / "nih"
    names = [f"{patient:08d}_{film:03d}.png" for patient in range(1, 7) for film in range(2)]
    found = ["Cardiomegaly|Effusion", "No Finding", "Pleural_Thickening|Nodule", *["No Finding"] * 9]
    rows = [
        nih_row(n, f, int(n[:8]), "058Y" if k else "007Y") for k, (n, f) in enumerate(zip(names, found, strict=True))
    ]
    rows.append(nih_row("00000099_000.png", "Mass", 99, "060Y"))  # in neither list
    # The brackets in the header hold commas, so that it has as many columns as the rows.
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    write_table(source / "Data_Entry_2017.csv", rows, header)
    (source / "train_val_list.txt").write_text("\n".join(names[:8]))
    (source / "test_list.txt").write_text("\n".join(names[8:]))
    for k, name in enumerate(names[:-1]):
        write_film(source / f"images_{1 + k // 6:03d}" / "images" / name)
    box = {"i": names[0], "f": "Infiltrate", "x": 10.0, "y": 4.0, "w": 10.0, "h": 8.0, "a": "", "b": "", "c": ""}
    write_table(source / "BBox_List_2017.csv", [box], "Image Index,Finding Label,Bbox [x,y,w,h],,,")

    manifest, films = packed("chestxray14", source, tmp_path / "c")
    assert manifest["splits"] == {"train": 6, "validation": 2, "test": 3}
    assert manifest["summary"]["skipped"] == {"in no official split": 1, "missing image": 1}
    first, second, third = (films[name.removesuffix(".png")] for name in names[:3])
    assert first["findings"] == "Cardiomegaly and effusion." and first["method"] == "labels"
    assert stated(first) == {"Cardiomegaly": 1, "Pleural Effusion": 1}
    assert second["findings"] == "No abnormality is labelled." and stated(second) == {"No Finding": 1}
    assert third["findings"] == "Pleural thickening and nodule." and stated(third) == {
        "Pleural Other": 1,
        "Lung Lesion": 1,
    }
    assert (first["patient"], first["sex"], first["age"], second["age"]) == ("1", "F", 7, 58)
    # Boxes are in pixels of the stored image: 45 x 30 became 30 x 20.
    assert (
        '"finding": "Infiltration"' in first["annotations"] and '"box": [6.7, 2.7, 13.3, 8.0]' in first["annotations"]
    )
    (source / "test_list.txt").write_bytes(b"00000005_000.png\n\xff\xfe\n")
    refused("chestxray14", source, r"test_list\.txt: damaged, or no table \(UnicodeDecodeError\)")


def chexpert_row(
    path: str, sex: str = "Female", side: str = "Frontal", view: str = "AP", **stated: str
) -> dict[str, Any]:
    row = {"Path": f"CheXpert-v1.0/{path}", "Sex": sex, "Age": "68", "Frontal/Lateral": side, "AP/PA": view}
    return row | dict.fromkeys(CHEXPERT, "") | {name.replace("_", " "): value for name, value in stated.items()}


def test_chexpert(tmp_path):
    source = tmp_path / "CheXpert-v1.0"
    rows = [
        chexpert_row("train/patient00001/study1/view1_frontal.jpg", No_Finding="1.0", Support_Devices="1.0"),
        chexpert_row(
            "train/patient00001/study1/view2_lateral.jpg", "Male", "Lateral", "", Edema="-1.0", Fracture="0.0"
        ),
        chexpert_row("train/patient00002/study3/view1_frontal.jpg", "Unknown", No_Finding="1.0", Pneumonia="0.0"),
        chexpert_row("train/patient00003/study1/view1_frontal.jpg"),  # nothing stated
    ]
    valid = [chexpert_row("valid/patient64541/study1/view1_frontal.jpg", **dict.fromkeys(CHEXPERT, "0.0"))]
    for name, table in (("train", rows), ("valid", valid)):
        write_table(source / f"{name}.csv", table)
        for row in table:
            write_film(source / row["Path"].removeprefix("CheXpert-v1.0/"))

    manifest, films = packed("chexpert", source, tmp_path / "c")
    assert manifest["splits"] == {"train": 3, "validation": 1, "test": 0}
    assert manifest["summary"]["skipped"] == {"no label stated": 1}
    first = films["patient00001-study1-view1_frontal"]
    assert first["findings"] == "Support devices."
    assert (first["patient"], first["study"], first["sex"], first["age"]) == (
        "patient00001",
        "patient00001-study1",
        "F",
        68,
    )
    lateral = films["patient00001-study1-view2_lateral"]
    assert lateral["findings"] == "Possible edema. No fracture." and not lateral["frontal"]
    assert films["patient00002-study3-view1_frontal"]["findings"] == "No abnormality is labelled. No pneumonia."
    assert films["patient00002-study3-view1_frontal"]["sex"] == ""
    assert selected(manifest, "frontal") == 3
    assert stated(films["patient64541-study1-view1_frontal"]) == dict.fromkeys(CHEXPERT, 0)
    for path in ("train", "", "train/patient00001/view1_frontal.jpg"):
        write_table(source / "train.csv", [rows[0], chexpert_row(path)])
        refused("chexpert", source, r"train\.csv, line 3: the path of a film is not as published")


def test_chexpert_plus(tmp_path):
    source = tmp_path / "plus"

    def row(path: str, split: str = "train", **other: str) -> dict[str, Any]:
        known = {
            "path_to_image": path,
            "frontal_lateral": "Frontal",
            "ap_pa": "AP",
            "deid_patient_id": path.split("/")[1],
        }
        texts = ("section_clinical_history", "section_history", "section_findings", "section_impression")
        return known | dict.fromkeys(texts, "") | {"age": "61.0", "sex": "Male", "split": split} | other

    rows = [
        row("train/patient1/study1/view1_frontal.jpg", section_findings="Clear\n lungs.", section_history="Cough"),
        row("train/patient2/study1/view1_frontal.jpg", section_impression="1. Normal."),
        row("train/patient3/study1/view1_frontal.jpg"),
        row("valid/patient4/study1/view1_frontal.jpg", "valid", section_findings="Clear."),
    ]
    write_table(source / "df_chexpert_plus_240401.csv", rows)
    for r in rows:
        write_film((source / "PNG" / r["path_to_image"]).with_suffix(".png"))

    manifest, films = packed("chexpert_plus", source, tmp_path / "c")
    assert manifest["splits"] == {"train": 2, "validation": 1, "test": 0}
    assert manifest["summary"]["skipped"] == {"neither findings nor impression": 1}
    assert manifest["summary"]["counts"] == {"films with findings": 2, "films with impression": 1}
    first = films["patient1-study1-view1_frontal"]
    assert (first["findings"], first["indication"], first["sex"], first["age"]) == ("Clear lungs.", "Cough", "M", 61)
    assert (selected(manifest, "all"), selected(manifest, "pairs")) == (2, 3)
    # A report has lines of its own in the table: the first row takes two.
    write_table(source / "df_chexpert_plus_240401.csv", [rows[0], rows[1], rows[1] | {"path_to_image": ""}])
    refused("chexpert_plus", source, r"df_chexpert_plus_240401\.csv, line 5: the path of a film is not as published")


def test_padchest(tmp_path):
    source = tmp_path / "padchest"

    def row(number: int, projection: str, found: str, report: str, **other: str) -> dict[str, Any]:
        known = {"": number, "ImageID": f"{number}_a.png", "ImageDir": "12.0", "StudyDate_DICOM": "20140915"}
        known |= {"StudyID": f"s{number}", "PatientID": f"p{number}", "PatientBirth": "1930.0", "PatientSex_DICOM": "F"}
        return known | {"Projection": projection, "Report": report, "Labels": found} | other

    rows = [
        row(1, "PA", "['cardiomegaly', ' pleural effusion', '']", "cardiomegalia derram pleural ."),
        row(2, "L", "['normal']", "sin hallazg patolog ."),
        row(3, "AP_horizontal", "['unchanged']", "sin cambi ."),
        row(4, "EXCLUDE", "['normal']", "sin hallazg ."),
        row(5, "PA", "['exclude']", "no valorabl ."),
        row(6, "PA", "", ""),
        row(7, "COSTAL", "nan", "fractur costal .", PatientBirth="", PatientSex_DICOM="O"),
    ]
    write_table(source / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", rows)
    plain = source / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    plain.with_suffix(".csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    for number in range(1, 8):
        write_film(source / "12" / f"{number}_a.png", deep=True)

    manifest, films = packed("padchest", source, tmp_path / "c")
    assert manifest["summary"]["skipped"] == {"excluded by its publisher": 2, "neither report nor labels": 1}
    assert manifest["summary"]["written"] == 4
    assert films["1_a"]["findings"] == "Cardiomegaly and pleural effusion."
    assert stated(films["1_a"]) == {"Cardiomegaly": 1, "Pleural Effusion": 1}
    assert films["1_a~spanish"]["findings"] == "cardiomegalia derram pleural ."
    assert films["2_a"]["findings"] == "No abnormality is labelled." and films["2_a"]["view"] == "LATERAL"
    assert films["3_a"]["method"] == "spanish" and films["3_a"]["frontal"]
    assert (films["1_a"]["age"], films["1_a"]["sex"], films["7_a"]["age"], films["7_a"]["sex"]) == (84, "F", -1, "")
    counts = {name: selected(manifest, name) for name in ("all", "frontal", "pairs", "spanish")}
    assert counts == {"all": 2, "frontal": 1, "pairs": 2, "spanish": 4}


def test_padchest_labels_that_are_no_list():
    nested = ("[" * 5000, "-" * 100_000 + "1", "[" * 150 + "]" * 150, "1+" * 20_000 + "1")
    for cell in (*nested, "{[]: 1}", "{['edema']}", "['edema'", "__import__('os')", "'edema'", "nan"):
        assert not any("edema" in name for name in read_labels(cell)), cell[:20]
    assert read_labels("['edema', ' mass', '', 'edema']") == ["edema", "mass"]


def test_brax(tmp_path):
    source = tmp_path / "brax"

    def row(number: int, view: str, age: str, **other: str) -> dict[str, Any]:
        path = f"images/id_{number}/Study_1.{number}/Series_2.{number}/image-{number}.png"
        known = {"DicomPath": "x", "PngPath": path, "PatientID": f"id{number}", "PatientSex": "M", "PatientAge": age}
        labels = dict.fromkeys(CHEXPERT, "") | {name.replace("_", " "): value for name, value in other.items()}
        return known | {"AccessionNumber": f"a{number}", "StudyDate": "20100101"} | labels | {"ViewPosition": view}

    rows = [
        row(1, "PA", "45", No_Finding="1.0"),
        row(2, "L", "85 or more", Cardiomegaly="1", Pneumothorax="0"),
        row(3, "", "30", Lung_Opacity="-1.0"),
        row(4, "AP", "30"),
        row(5, "PA", "30", Edema="1.0"),
    ]
    write_table(source / "master_spreadsheet_update.csv", rows)
    for r in rows[:4]:
        write_film(source / r["PngPath"])

    manifest, films = packed("brax", source, tmp_path / "c")
    assert manifest["summary"]["skipped"] == {"no label stated": 1, "missing image": 1}
    assert films["image-2"]["findings"] == "Cardiomegaly. No pneumothorax."
    assert (films["image-2"]["age"], films["image-2"]["view"], films["image-2"]["frontal"]) == (85, "LATERAL", False)
    assert films["image-3"]["findings"] == "Possible lung opacity." and not films["image-3"]["frontal"]
    assert (films["image-1"]["patient"], films["image-1"]["study"]) == ("id1", "a1")


def runs(mask: np.ndarray) -> str:
    """A mask [Y, X] as CANDID-PTX has it: down the columns, each run by the pixels since the one before, and its own."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(int), [0]])
    edges = np.flatnonzero(np.diff(flat))
    return " ".join(map(str, np.diff(edges, prepend=0)))


def test_boxes_of_masks():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((7, 5)) < 0.1 + 0.5 * rng.random()
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask.any()
        assert box_of(runs(mask), (7, 5)) == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    # The first runs of a published mask of the same form: rows 548 to 570, 543 to 575 and 538 to 580 of three columns.
    assert box_of("387620 23 996 33 986 43", (1024, 1024)) == [378, 538, 381, 581]
    for mask_ in ("", "-1", "1", "1 2 3", "a b", "1 -2", "34 2", "5 0", "9" * 30 + " 1", "1.5 2"):
        assert box_of(mask_, (7, 5)) is None, mask_


def test_candid_ptx(tmp_path):
    source = tmp_path / "candid"

    def row(number: int, mask: str, report: str = "CXR: The lungs\nare clear.", patient: int = 0) -> dict[str, Any]:
        film = {"SOPInstanceUID": f"1.2.276.{number}", "EncodedPixels": mask, "Report": report}
        return film | {"filename": f"P{patient}_{number}.dcm" if patient else ""}

    mask = np.zeros(PIXELS.shape, bool)
    mask[9:27, 3:12] = mask[30:33, 6:9] = True
    long = "1 2 " * 50_000  # longer than Python's reader takes by default, and than the film
    rows = [row(1, "-1"), row(2, long), row(2, runs(mask)), row(2, runs(np.ones(PIXELS.shape, bool)))]
    rows += [row(3, "-1", " "), row(4, "-1"), row(5, "-1"), row(6, "")]
    rows += [row(7, runs(mask), patient=7), row(8, "-1", patient=7), row(9, "-1", patient=7), row(9, "-1", patient=8)]
    write_table(source / "Pneumothorax_reports.csv", rows)
    tubes = [(1, runs(mask)), (1, "-1"), (7, "1 0"), (99, runs(mask))]
    tubes_ = [{"anon_SOPUID": f"1.2.276.{number}", "annotation_ref": "a", "mask_rle": cell} for number, cell in tubes]
    write_table(source / "chest_tube.csv", tubes_)
    for number in (1, 2, 3, 6, 7, 8, 9):
        tags = {"PatientID": f"p{number % 2}", "PatientSex": "F", "PatientAge": "058Y", "ViewPosition": "AP"}
        write_dicom(source / "dataset" / f"1.2.276.{number}", **tags)
    (source / "dataset" / "1.2.276.5").write_bytes(b"not a DICOM file")

    manifest, films = packed("candid_ptx", source, tmp_path / "c")
    assert manifest["summary"]["counts"] == {
        "rows": 12,
        "films with several rows": 2,
        "masks": 6,
        "masks that do not fit their film": 2,
    }
    skipped = {"no report": 1, "missing image": 1, "unreadable image": 1, "of several patients": 1}
    assert manifest["summary"]["skipped"] == skipped
    tube, seen = {"Support Devices": 1}, {"Pneumothorax": 1}
    wanted = [{"Pneumothorax": 0} | tube, seen, {}, seen | tube]
    assert [stated(films[f"1.2.276.{n}"]) for n in (1, 2, 6, 7)] == wanted
    # The film of 45 x 30 became 30 x 20, and the boxes with it; each row's mask has one.
    boxes = {n: [(a["finding"], a["box"]) for a in json.loads(films[f"1.2.276.{n}"]["annotations"])] for n in (1, 2, 7)}
    one, whole = ("Pneumothorax", [2.0, 6.0, 8.0, 22.0]), ("Pneumothorax", [0.0, 0.0, 20.0, 30.0])
    assert boxes == {1: [("Chest tube", one[1])], 2: [one, whole], 7: [one]}
    assert films["1.2.276.7"]["patient"] == films["1.2.276.8"]["patient"] == "P7"
    assert films["1.2.276.7"]["split"] == films["1.2.276.8"]["split"]
    film = films["1.2.276.2"]
    assert (film["findings"], film["patient"], film["sex"], film["age"]) == ("CXR: The lungs are clear.", "p0", "F", 58)
    assert film["method"] == "report" and film["frontal"]


def test_vindr_cxr(tmp_path):
    source = tmp_path / "vindr"
    votes = {  # image -> what three radiologists see
        "a": (["Cardiomegaly", "Rib fracture"], ["Cardiomegaly"], ["Pneumonia"]),
        "b": (["No finding"],) * 3,
        "c": (["Edema"], ["Atelectasis"], ["Pneumonia"]),
        "d": (["No finding"], ["No finding"], ["Edema"]),
    }
    columns = ["Atelectasis", "Cardiomegaly", "Edema", "Rib fracture", "Pneumonia", "Other diseases", "No finding"]
    train = [
        {"image_id": image, "rad_id": f"R{k}"} | {name: int(name in seen) for name in columns}
        for image, readers in votes.items()
        for k, seen in enumerate(readers)
    ]
    test = [{"image_id": "e"} | {name.replace("diseases", "disease"): int(name == "Edema") for name in columns}]
    write_table(source / "annotations/image_labels_train.csv", train)
    write_table(source / "annotations/image_labels_test.csv", test)
    none = {"class_name": "No finding", "x_min": "", "y_min": "", "x_max": "", "y_max": ""}
    box = {"class_name": "Cardiomegaly", "x_min": 3.0, "y_min": 6.0, "x_max": 15.0, "y_max": 30.0}
    write_table(
        source / "annotations/annotations_train.csv",
        [{"image_id": "a", "rad_id": "R1"} | box, {"image_id": "b", "rad_id": "R1"} | none],
    )
    write_table(source / "annotations/annotations_test.csv", [{"image_id": "e"} | none])
    for image in votes:
        write_dicom(source / "train" / f"{image}.dicom", PatientSex="F" if image == "a" else "", PatientAge="045Y")
    write_dicom(source / "test" / "e.dicom")

    manifest, films = packed("vindr_cxr", source, tmp_path / "c")
    assert manifest["splits"] == {"train": 2, "validation": 1, "test": 1}
    assert manifest["summary"]["skipped"] == {"radiologists do not agree on anything": 1}
    assert films["a"]["findings"] == "Cardiomegaly." and stated(films["a"]) == {"Cardiomegaly": 1}
    assert '"box": [2.0, 4.0, 10.0, 20.0]' in films["a"]["annotations"] and films["b"]["annotations"] == "[]"
    assert films["b"]["findings"] == films["d"]["findings"] == "No abnormality is labelled."
    assert films["e"]["findings"] == "Edema." and films["e"]["split"] == "test"
    known = [(films[image]["sex"], films[image]["age"]) for image in ("a", "b", "e")]  # which the tables do not say
    assert known == [("F", 45), ("", 45), ("", -1)]


def test_object_cxr(tmp_path):
    source = tmp_path / "objects"
    rows = [
        {"image_name": "08001.jpg", "annotation": "0 3 6 15 30;2 6 6 9 9 12 6"},
        {"image_name": "08002.jpg", "annotation": ""},
        {"image_name": "08003.jpg", "annotation": "1 3 6 15 30"},
    ]
    write_table(source / "train.csv", rows)
    write_table(source / "dev.csv", [{"image_path": "/path/08001.jpg", "annotation": ""}])
    for name in ("train/08001", "train/08002", "train/08003", "dev/08001"):
        write_film(source / f"{name}.jpg")

    manifest, films = packed("object_cxr", source, tmp_path / "c")
    assert manifest["splits"] == {"train": 2, "validation": 1, "test": 1}
    assert films["train-08001"]["findings"] == "Foreign object."
    assert films["train-08002"]["findings"] == films["dev-08001"]["findings"] == "No foreign object."
    assert '"box": [2.0, 4.0, 10.0, 20.0]' in films["train-08001"]["annotations"]
    assert '"box": [4.0, 4.0, 8.0, 6.0]' in films["train-08001"]["annotations"]
    good = {"image_path": "08001.jpg", "annotation": ""}
    write_table(source / "dev.csv", [good, good | {"annotation": "0 3 6 15"}])
    refused("object_cxr", source, r"dev\.csv, line 3: an annotation is not as published")
    write_table(source / "dev.csv", [{"annotation": "0 3 6 15 30"}])
    refused("object_cxr", source, r"dev\.csv, line 2: no column with the film beside the annotation")


def test_what_a_dicom_header_says_is_believed_and_counted(tmp_path):
    """A folder of films without a column for the view."""
    person = {"PatientName": "Doe^Jane", "PatientID": "MRN-4711", "PatientBirthDate": "19300102"}
    tags: dict[str, dict[str, Any]] = {
        "frontal": {"BodyPartExamined": "CHEST", "ViewPosition": "PA", "PatientSex": "F", "PatientAge": "090Y"}
        | person,
        "silent": {"PatientSex": "O"} | person,
        "lateral": {"BodyPartExamined": "PORT CHEST", "ViewPosition": "LL", "PatientSex": "F", "PatientAge": "030M"}
        | person,
        "ankle": {"BodyPartExamined": "ANKLE"},
        "many": {"NumberOfFrames": 2, "PixelData": PIXELS.tobytes() * 2},
        "colour": {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PixelData": PIXELS.tobytes() * 3},
        "cut": {"PixelData": PIXELS.tobytes()[:-400]},
    }
    for name, values in tags.items():
        write_dicom(tmp_path / f"{name}.dcm", **values)
    rows = [
        {"image": f"{name}.dcm", "findings": "Clear.", "id": name, "split": "train", "sex": "", "age": ""}
        for name in tags
    ]
    rows[2] |= {"sex": "male"}
    write_table(tmp_path / "reports.csv", rows)
    manifest, films = packed("folder", tmp_path, tmp_path / "c")
    assert manifest["summary"]["skipped"] == {
        "not a chest film": 1,
        "several frames": 1,
        "colour image": 1,
        "unreadable image": 1,
    }
    assert manifest["summary"]["views"] == {"PA": 1, "unknown": 1, "LATERAL": 1}
    assert {name: row["frontal"] for name, row in films.items()} == {"frontal": True, "silent": True, "lateral": False}
    # Sex and age are taken where the table says none; an age that was cut off at 90 stays 90, and months are no years.
    found = {name: (row["sex"], row["age"]) for name, row in films.items()}
    assert found == {"frontal": ("F", 90), "silent": ("", -1), "lateral": ("M", 2)}
    for name, row in films.items():
        data = (tmp_path / f"{name}.dcm").read_bytes()
        assert row["source_sha256"] == hashlib.sha256(data).hexdigest() and row["patient"] == name
        assert b"MRN-4711" in data
    written = b"".join(path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file())
    assert not any(secret in written for secret in (b"Doe", b"Jane", b"4711", b"19300102"))
    assert groups_of(films)["frontal"] == {"view": "PA", "sex": "F", "age": "80+", "indication": "absent"}


def test_the_real_dicom_files(real, tmp_path):
    headers = {path.name: read_header(path) for path in sorted((real / "dicom").glob("*.dcm"))}
    assert {name: (h.view, h.unusable) for name, h in headers.items() if h} == {
        "CR-MONO1-10-chest.dcm": ("PA", ""),
        "CR-ModalitySequenceLUT.dcm": ("", ""),
        "RG1_J2KI.dcm": ("PA", ""),
        "RG1_JLSN.dcm": ("PA", ""),
        "RG3_J2KI_extremity.dcm": ("AP", "not a chest film"),
        "mlut_18.dcm": ("", ""),
        "vlut_04.dcm": ("", ""),
    }
    assert read_header(real / "images/openi/CXR54_IM-2145-1001.png") is None


# ------------------------------------------------------------------------------------------------------------------ what they share

NEEDED = {
    "openi": r"ecgen-radiology/\*\.xml",
    "mimic_cxr": r"chat_train_MIMIC_CXR_all_gpt4extract_rulebased_v1\.json",
    "mimic_cxr_reports": r"mimic-cxr-2\.0\.0-split\.csv",
    "mimic_cxr_reports_corrected": r"mimic-cxr-2\.0\.0-split\.csv",
    "chexpert": r"train\.csv",
    "chexpert_plus": r"df_chexpert_plus_240401\.csv",
    "padchest": r"PADCHEST_chest_x_ray_images_labels_160K_01\.02\.19\.csv",
    "brax": r"master_spreadsheet_update\.csv",
    "candid_ptx": r"Pneumothorax_reports\.csv",
    "vindr_cxr": r"annotations/image_labels_train\.csv",
    "object_cxr": r"train\.csv",
    "chestxray14": r"Data_Entry_2017_v2020\.csv",
}


@pytest.mark.parametrize("dataset", sorted(CORPORA.keys() - {"phantom", "folder"}))
def test_a_wrong_folder_is_refused_by_the_file_it_lacks(dataset, tmp_path):
    with pytest.raises(UserError, match=NEEDED[dataset]):
        builder_class(dataset).defining(tmp_path)


@pytest.mark.parametrize("dataset", sorted(CORPORA.keys() - {"phantom", "folder", "openi", "mimic_cxr"}))
def test_a_table_that_is_another_or_damaged_is_refused(dataset, tmp_path):
    for name in (
        *NEEDED[dataset].replace("\\", "").split("|"),
        "valid.csv",
        "dev.csv",
        "train_val_list.txt",
        "test_list.txt",
    ):
        write_table(tmp_path / name, [{"a": 1}])
    for name in (
        "mimic-cxr-2.0.0-metadata.csv",
        *(f"annotations/{k}_{s}.csv" for k in ("image_labels", "annotations") for s in ("train", "test")),
    ):
        write_table(tmp_path / name, [{"a": 1}])
    (tmp_path / "files").mkdir()
    builder: Callable[[], Any] = builder_class(dataset)(source=tmp_path, image_size=20, data_dir=tmp_path / "out").jobs
    with pytest.raises(UserError, match="no column"):
        builder()
    for path in tmp_path.rglob("*.csv"):
        path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="damaged, or no table"):
        builder()


def test_cells_that_begin_with_a_number():
    cells = {"058Y": 58, "63.0": 63, "85 or more": 85, "": -1, "nan": -1, "0": 0}
    assert {cell: tables.number(cell) for cell in cells} == cells


def test_ages_and_sexes():
    ages = {"058Y": 58, "090Y+": 90, "006M": 0, "030M": 2, "060W": 1, "400D": 1, "63.0": 63, "85 or more": 85, " 7 ": 7}
    none = dict.fromkeys(("", "nan", "Y", "414Y", "66m", "12345678901234567890", "-3"), -1)
    assert {cell: tables.years(cell) for cell in ages | none} == ages | none
    sexes = {"F": "F", "male": "M", " Female ": "F", "O": "", "Unknown": "", "": ""}
    assert {cell: tables.sex(cell) for cell in sexes} == sexes


def test_texts_of_labels():
    assert findings_of(["Edema", "Mass", "Nodule"], ["Fracture"], ["Pneumonia"]) == (
        "Edema, mass and nodule. Possible pneumonia. No fracture."
    )
    assert findings_of(["COPD signs"]) == "Copd signs." and findings_of([]) == ""
    assert of_chexpert([-2] * 14) == ""
    vector = dict.fromkeys(CHEXPERT, -2) | {"No Finding": 1, "Edema": -1}
    assert of_chexpert(list(vector.values())) == "Possible edema."


@pytest.mark.parametrize("dataset", sorted(CORPORA))
def test_no_corpus_may_have_a_patient_in_two_splits(dataset, tmp_path, monkeypatch):
    """Whatever a builder's tables say; a film of the patient is named, the patient is not."""
    given: dict[str, Any] = {"source": tmp_path} if dataset != "phantom" else {}
    builder = builder_class(dataset)(image_size=20, data_dir=tmp_path / "out", **given)
    jobs: dict[str, list[Any]]
    if dataset == "phantom":
        jobs = {"train": [(0, 0), (1, 0)], "test": [(2, 0), (1, 1)]}
        named = "phantom-0-00001-1"
    else:
        known: dict[str, Any] = {"study": "s", "view": "PA", "frontal": True, "texts": []}
        films = [
            Film(path=tmp_path / name, id=name, patient=f"secret-{patient}", **known)
            for name, patient in (("a", 1), ("b", 2), ("c", 3), ("d", 2), ("e", 2))
        ]
        jobs = {"train": films[:2], "validation": [], "test": films[2:]}
        named = "d"
    monkeypatch.setattr(builder, "jobs", lambda: jobs)
    with pytest.raises(
        UserError, match=f"1 patients are in more than one split; that of {named}, in test, is in train"
    ) as told:
        builder.tasks(tmp_path)
    assert "secret" not in str(told.value)
    jobs["test"] = jobs["test"][:1]
    assert [task.split for task in builder.tasks(tmp_path)] == ["train", "test"]


def test_published_tables_with_a_patient_in_two_splits(tmp_path):
    source = tmp_path / "CheXpert-v1.0"
    for name, study in (("train", 1), ("valid", 2)):
        row = chexpert_row(f"{name}/patient00001/study{study}/view1_frontal.jpg", No_Finding="1.0")
        write_table(source / f"{name}.csv", [row])
        write_film(source / row["Path"].removeprefix("CheXpert-v1.0/"))
    with pytest.raises(UserError, match=r"that of patient00001-study2-view1_frontal, in validation, is in train too"):
        packed("chexpert", source, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["CheXpert-v1.0"]


def test_patients_of_records_are_counted_and_compared(tmp_path):
    (tmp_path / "index").mkdir()
    for split, patients in {"train": [7, 7, 9], "validation": [], "test": [8]}.items():
        np.save(tmp_path / f"index/patients-{split}.npy", np.array(patients, np.uint64))
    splits = ("train", "validation", "test")
    assert count_patients(tmp_path, splits) == {"train": 2, "validation": 0, "test": 1}
    np.save(tmp_path / "index/patients-test.npy", np.array([8, 9, 9], np.uint64))
    with pytest.raises(UserError, match="1 patients have records in more than one split"):
        count_patients(tmp_path, splits)


def test_splits_by_patient_do_not_depend_on_order():
    patients = [f"p{k}" for k in range(50)]
    split_of = by_patient(patients)
    assert split_of == by_patient(patients[::-1])
    assert sorted(split_of.values()).count("test") == 5 == list(split_of.values()).count("validation")
    assert len(validation_of(patients)) == 5 and validation_of(["a"]) == set() and len(validation_of("ab")) == 1
