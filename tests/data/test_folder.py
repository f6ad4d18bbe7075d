"""Own data: any folder with a CSV; what cannot be used is counted, what is wrong is said in one sentence."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data.folder.builder import assign_splits, film, find_csv, read_rows
from data.packing import Arguments, pack
from data.records import Skip, make
from rad_jax.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "real"


def write_csv(folder, rows, name="reports.csv"):
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({k for row in rows for k in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_image(folder, name, shape=(40, 30), value=None):
    pixels = (
        np.full(shape, value, np.uint8) if value is not None else np.arange(shape[0] * shape[1]).reshape(shape) % 256
    )
    Image.fromarray(pixels.astype(np.uint8)).save(folder / name)


def arguments(source, **other):
    values = {"image_size": 16, "studies": 10, "seed": 0, "tokenizer": None, "vocab_size": 512}
    return Arguments(dataset="folder", source=str(source), **values | other)


def records(out, split):
    manifest = json.loads((out / "corpus.json").read_text())
    return list(tfds.builder_from_directory(out / manifest["builder_dir"]).as_data_source(split))


def test_the_real_collection(tmp_path):
    if not (REAL / "reports.csv").is_file():
        pytest.skip(f"the real test data is not at {REAL}")
    manifest, _ = pack(arguments(REAL, image_size=64), tmp_path / "c", workers=2, progress=False)
    summary = manifest["summary"]
    assert (summary["read"], summary["written"], summary["skipped"]) == (87, 64, {"empty findings": 23})
    assert summary["duplicate_images"] == {"in the same split": 0, "in two splits": 0}
    assert sum(manifest["splits"].values()) == 64 and min(manifest["splits"].values()) > 0
    rows = {split: records(tmp_path / "c", split) for split in manifest["splits"]}
    patients = [{row["patient"] for row in split} for split in rows.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))
    everything = [row for split in rows.values() for row in split]
    laterals = [row for row in everything if not row["frontal"]]
    assert len(laterals) == 3 and {row["view"] for row in laterals} == {b"LATERAL"}
    assert all(min(row["image"].shape[:2]) == 64 for row in everything)
    with (REAL / "reports.csv").open(newline="", encoding="utf-8") as file:
        source = {row["id"]: row for row in csv.DictReader(file)}
    for row in everything:
        wanted = source[row["id"].decode()]
        assert json.loads(row["texts"])[0]["findings"] == wanted["findings"].strip()
        assert (row["orig_width"], row["orig_height"]) == (int(wanted["width"]), int(wanted["height"]))


def test_unusable_rows_are_skipped_counted_and_listed(tmp_path):
    for k in range(5):
        write_image(tmp_path, f"{k}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "short.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    good = [{"image": f"{k}.png", "findings": f"Clear lungs {k}.", "patient": k, "split": "train"} for k in range(5)]
    bad = [
        {"image": "broken.png", "findings": "Clear.", "patient": 10, "split": "train"},
        {"image": "text.png", "findings": "Clear.", "patient": 11, "split": "train"},
        {"image": "nowhere.png", "findings": "Clear.", "patient": 12, "split": "train"},
        {"image": "0.png", "findings": "  ", "patient": 13, "split": "train"},
        {"image": "short.png", "findings": "Clear.", "patient": 14, "split": "train"},
    ]
    write_csv(tmp_path, good + bad)
    manifest, _ = pack(arguments(tmp_path), tmp_path / "c", workers=1, progress=False)
    assert manifest["summary"]["read"] == 10 and manifest["summary"]["written"] == 5
    assert manifest["summary"]["skipped"] == {"unreadable image": 3, "missing image": 1, "empty findings": 1}
    assert manifest["splits"] == {"train": 5, "validation": 0, "test": 0}
    with (tmp_path / "c" / "skipped.csv").open(newline="") as file:
        listed = {row["image"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}
    # The reason is a phrase to count; the detail is what Pillow or the reader said, without places on disk and in memory.
    assert listed == {
        "broken.png": ("unreadable image", "damaged or incomplete image (image file is truncated)"),
        "text.png": ("unreadable image", "not a PNG, JPEG or DICOM file"),
        "short.png": ("unreadable image", "damaged or incomplete image (cannot identify image file)"),
        "nowhere.png": ("missing image", ""),
        "0.png": ("empty findings", ""),
    }


def test_a_record_keeps_texts_shape_and_sides(tmp_path):
    pixels = np.zeros((60, 40), np.uint8)
    pixels[:, :10] = 200  # bright at image left
    Image.fromarray(pixels).save(tmp_path / "a.png")
    row = {"image": "a.png", "findings": "Clear.", "impression": "Normal.", "view": "Left Lateral", "source": "here"}
    row |= {"sex": "Female", "age": "58"}
    write_csv(tmp_path, [row])
    (read,) = read_rows(tmp_path / "reports.csv")
    record = make(film(read, tmp_path), 20)
    assert not isinstance(record, Skip)
    assert (record["orig_height"], record["orig_width"]) == (60, 40)
    assert record["frontal"] is False and record["view"] == "LATERAL"
    assert (record["sex"], record["age"]) == ("F", 58)
    assert record["source_sha256"] == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert (record["id"], record["patient"], record["annotations"]) == ("a", "a", "[]")
    (text,) = json.loads(record["texts"])
    assert (text["impression"], text["indication"], text["method"]) == ("Normal.", None, "report")
    assert list(record["labels"]) == [-2] * 14
    (tmp_path / "b.png").write_bytes(record["image"])
    stored = np.asarray(Image.open(tmp_path / "b.png"))
    assert stored.shape == (30, 20) and stored[:, :4].mean() > 150 > 20 > stored[:, 8:].mean()


def test_one_film_with_two_reports_gets_two_ids_and_one_patient(tmp_path):
    row = {"image": "a.png", "findings": "x"}
    write_csv(tmp_path, [row, row, row | {"id": "a~2"}])
    rows = read_rows(tmp_path / "reports.csv")
    assert len({row["id"] for row in rows}) == 3
    assert rows[0]["patient"] == rows[1]["patient"] == "a"


def test_a_missing_column_is_named_with_file_and_columns(tmp_path):
    path = write_csv(tmp_path, [{"image": "a.png", "report": "x"}])
    with pytest.raises(UserError, match=r"reports\.csv: missing column 'findings'; found image, report"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(UserError, match="missing column 'image' and 'findings'; found none"):
        read_rows(path)
    path.write_bytes(b"image,findings\na.png,\xff\xfe\xfa\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_rows(path)


def test_the_csv_is_found(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        find_csv(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no CSV in this folder"):
        find_csv(tmp_path)
    one = write_csv(tmp_path, [{"image": "a"}], "one.csv")
    assert find_csv(tmp_path) == one == find_csv(one)
    write_csv(tmp_path, [{"image": "a"}], "two.csv")
    with pytest.raises(UserError, match=r"several CSVs \(one\.csv, two\.csv\)"):
        find_csv(tmp_path)
    assert find_csv(write_csv(tmp_path, [{"image": "a"}])).name == "reports.csv"
    assert find_csv(tmp_path).name == "reports.csv"


@pytest.mark.parametrize("patients", [1, 2, 3, 10, 100])
def test_splits_by_patient_without_a_column(patients):
    rows = [{"id": f"{p}-{k}", "patient": f"p{p}"} for p in range(patients) for k in range(2)]
    splits = assign_splits(rows, Path("x.csv"))
    assert splits == {k: sorted(v, key=rows.index) for k, v in assign_splits(rows[::-1], Path("x.csv")).items()}
    assert sum(map(len, splits.values())) == len(rows)
    held_out = max(1, patients // 10) if patients >= 3 else 0
    assert len(splits["test"]) == len(splits["validation"]) == 2 * held_out
    names = [{row["patient"] for row in split} for split in splits.values()]
    assert sum(map(len, names)) == patients


def test_given_splits():
    rows = [{"id": str(k), "patient": str(k), "split": s} for k, s in enumerate(["train", "val", "TEST"])]
    splits = assign_splits(rows, Path("x.csv"))
    assert {split: [row["id"] for row in part] for split, part in splits.items()} == {
        "train": ["0"],
        "validation": ["1"],
        "test": ["2"],
    }
    with pytest.raises(UserError, match="unknown split 'nonsense'"):
        assign_splits([rows[0] | {"split": "nonsense"}], Path("x.csv"))
    with pytest.raises(UserError, match="patient is in two splits"):
        assign_splits([rows[0], rows[1] | {"patient": "0"}], Path("x.csv"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_a_usable_image_is_an_error(tmp_path, split):
    (tmp_path / "text.png").write_text("not an image")
    write_image(tmp_path, "a.png")
    other = "test" if split == "train" else "train"
    rows = [
        {"image": "text.png", "findings": "Clear.", "split": split},
        {"image": "a.png", "findings": "Clear.", "split": other},
    ]
    write_csv(tmp_path, rows)
    with pytest.raises(UserError, match=f"split '{split}': none of its 1 inputs"):
        pack(arguments(tmp_path), tmp_path / "c", workers=1, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "reports.csv", "text.png"]


def test_no_usable_row_at_all_is_an_error(tmp_path):
    write_csv(tmp_path, [{"image": "a.png", "findings": ""}])
    with pytest.raises(UserError, match=r"no usable input.*empty findings"):
        pack(arguments(tmp_path), tmp_path / "c", workers=1, progress=False)
    assert not (tmp_path / "c").exists()
