"""Open-I: a miniature of its layout, and the real collection of reports."""

import csv
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.openi.builder import OpenI, read_report, read_views
from data.packing import Arguments, pack
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <uId id="CXR{uid}"/>
   <MedlineCitation><Article><Abstract>
      <AbstractText Label="COMPARISON"/>
      <AbstractText Label="INDICATION">{indication}</AbstractText>
      <AbstractText Label="FINDINGS">{findings}</AbstractText>
      <AbstractText Label="IMPRESSION">{impression}</AbstractText>
   </Abstract></Article></MedlineCitation>
   <MeSH><major>normal</major></MeSH>
   {films}
</eCitation>"""


def arguments(source, **other):
    values = {"image_size": 16, "studies": 10, "seed": 0, "tokenizer": None, "vocab_size": 512}
    return Arguments(dataset="openi", source=str(source), **values | other)


def write_report(source, uid, films, findings="", impression="", indication=""):
    images = "".join(f'<parentImage id="{film}"><figureId>F1</figureId></parentImage>' for film in films)
    text = REPORT.format(uid=uid, films=images, findings=findings, impression=impression, indication=indication)
    (source / "ecgen-radiology" / f"{uid}.xml").write_text(text, encoding="utf-8")


@pytest.fixture
def miniature(tmp_path):
    """Twelve reports: the first ones odd, the others with a frontal and a lateral film."""
    source = tmp_path / "openi"
    (source / "ecgen-radiology").mkdir(parents=True)
    (source / "NLMCXR_png").mkdir()
    write_report(source, 1, [], "Heart &amp; lungs normal.", "Normal.")  # no film
    write_report(source, 2, ["CXR2_IM-0002-1001"])  # no text
    write_report(source, 3, ["CXR3_IM-0003-1001"], impression="Normal.")
    (source / "ecgen-radiology" / "4.xml").write_text("<eCitation><uId")
    for uid in range(5, 13):
        films = [f"CXR{uid}_1_IM-{uid:04d}-{k}001" for k in (3, 4)]
        write_report(source, uid, films, f"Clear lungs {uid}.", "Normal.", "Cough &lt; 3 days" if uid % 2 else "")
    pixels = np.arange(40 * 30, dtype=np.uint8).reshape(40, 30)
    views = []
    for uid in range(2, 13):
        names = [f"CXR{uid}_IM-{uid:04d}-1001"] if uid < 5 else [f"CXR{uid}_1_IM-{uid:04d}-{k}001" for k in (3, 4)]
        for name, view in zip(names, ("lateral", "frontal"), strict=False):
            Image.fromarray(np.stack([pixels] * 3, -1)).save(source / "NLMCXR_png" / f"{name}.png")  # RGB, as theirs
            views.append({"dicom_id": name, "ViewPosition": view})
    (source / "NLMCXR_png" / "CXR12_1_IM-0012-4001.png").unlink()
    with (source / "openi_image_views.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["dicom_id", "ViewPosition"])
        writer.writeheader()
        writer.writerows(views[:-4])  # the films of the last two reports are not in it
    return source


def test_a_miniature(miniature, tmp_path):
    manifest, _ = pack(arguments(miniature), tmp_path / "c", workers=1, progress=False)
    assert manifest["summary"]["counts"] == {
        "reports": 12,
        "reports with findings": 9,
        "reports with impression": 10,
        "films without a view": 4,
    }
    assert manifest["summary"]["skipped"] == {
        "report without film": 1,
        "neither findings nor impression": 1,
        "damaged report": 1,
        "missing image": 1,
    }
    with (tmp_path / "c/skipped.csv").open(newline="") as file:
        details = {row["id"]: row["detail"] for row in csv.DictReader(file) if row["reason"] == "damaged report"}
    assert details == {"4": "unclosed token: line 1, column 11"}
    assert manifest["summary"]["written"] == 16
    rows = {
        name: sum(index["rows"] for index in selection["splits"].values())
        for name, selection in manifest["selections"].items()
    }
    assert rows == {"all": 15, "frontal": 6, "pairs": 16}
    corpus = Corpus.open(tmp_path / "c")
    for split in ("train", "test"):
        source = corpus.source(split, "all")
        for number in range(len(source)):
            row = source[number]
            uid = int(row["patient"])
            assert row["id"].startswith(f"CXR{uid}_") and row["findings"] == f"Clear lungs {uid}."
            assert row["indication"] == ("Cough < 3 days" if uid % 2 else "")
            assert (row["orig_height"], row["orig_width"]) == (40, 30)
            assert row["view"] == "" if uid > 10 else row["view"] in ("FRONTAL", "LATERAL")
    sources = [corpus.source(split, "pairs") for split in corpus.splits]
    patients = [{source[number]["patient"] for number in range(len(source))} for source in sources]
    assert set.union(*patients) == {"3", *map(str, range(5, 13))}
    assert sum(map(len, patients)) == 9  # none of them in two splits


def test_a_wrong_folder_is_refused(miniature, tmp_path):
    with pytest.raises(UserError, match=r"no ecgen-radiology/\*\.xml in it"):
        pack(arguments(miniature / "NLMCXR_png"), tmp_path / "c", workers=1, progress=False)
    (miniature / "openi_image_views.csv").write_text("film,view\n")
    with pytest.raises(UserError, match=r"openi_image_views\.csv: missing column ViewPosition and dicom_id"):
        pack(arguments(miniature), tmp_path / "c", workers=1, progress=False)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<eCitation>Cough&Fever;</eCitation>", "undefined entity: line 1, column 16"),
        ('<?xml version="1.0" encoding="utf-99"?><eCitation/>', "unknown encoding: utf-99"),
        ("<eCitation>Cough</eCited>", "mismatched tag: line 1, column 18"),
    ],
)
def test_damage_is_told_without_the_text(text, said, miniature, tmp_path):
    (miniature / "ecgen-radiology/4.xml").write_text(text)
    builder = OpenI(source=miniature, image_size=16, data_dir=tmp_path)
    builder.jobs()
    assert [skip.detail for skip in builder.skipped if skip.reason == "damaged report"] == [said]


def test_views_that_cannot_be_read(miniature, tmp_path):
    """What is no text is refused; a row that ends early, or has no view, leaves its film without one, and that is counted."""
    path = miniature / "openi_image_views.csv"
    path.write_bytes(b"dicom_id,ViewPosition\nCXR5_1_IM-0005-3001,\xe9\n")
    with pytest.raises(UserError, match=r"openi_image_views\.csv: not a CSV in UTF-8 .*: save it as one"):
        pack(arguments(miniature), tmp_path / "c", workers=1, progress=False)
    path.write_text("dicom_id,ViewPosition\nCXR5_1_IM-0005-3001\nCXR5_1_IM-0005-4001,Frontal \nCXR6_1_IM-0006-3001,\n")
    assert read_views(path) == {"CXR5_1_IM-0005-4001": "frontal"}
    builder = OpenI(source=miniature, image_size=16, data_dir=tmp_path / "d")
    builder.jobs()
    assert builder.counts["films without a view"] == 16


def test_another_view_file_is_another_corpus(miniature, tmp_path):
    pack(arguments(miniature), tmp_path / "c", workers=1, progress=False)
    assert not pack(arguments(miniature), tmp_path / "c", workers=1, progress=False)[1]
    (miniature / "openi_image_views.csv").unlink()
    with pytest.raises(UserError, match=r"other arguments \(source"):
        pack(arguments(miniature), tmp_path / "c", workers=1, progress=False)


def test_the_real_collection(real, tmp_path):
    """All reports; of the films only the eight that are there."""
    source = tmp_path / "openi"
    source.mkdir()
    with tarfile.open(real / "openi/NLMCXR_reports.tgz") as archive:
        archive.extractall(source, filter="data")
    shutil.copytree(real / "images/openi", source / "NLMCXR_png")
    shutil.copyfile(real / "openi/openi_image_views.csv", source / "openi_image_views.csv")
    builder = OpenI(source=source, image_size=64, data_dir=tmp_path / "tfds")
    jobs = builder.jobs()
    assert builder.counts["reports"] == 3955
    assert builder.counts["reports with findings"] == 3425
    assert builder.counts["reports with impression"] == 3921
    assert builder.counts["films without a view"] == 0
    films = [film for of_split in jobs.values() for film in of_split]
    assert len(films) == 8
    # The collection has 7,470 films and 104 reports without one; every one of both is accounted for.
    assert Counter(skip.reason for skip in builder.skipped) == {
        "report without film": 104,
        "neither findings nor impression": 40,
        "missing image": 7470 - 40 - 8,
    }
    assert len({skip.id for skip in builder.skipped} | {film.id for film in films}) == 7470 + 104
    words, ids = read_report(source / "ecgen-radiology" / "1.xml")
    assert ids == ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]
    assert words["impression"] == "Normal chest x-XXXX."
    manifest, _ = pack(arguments(source, image_size=64), tmp_path / "c", workers=1, progress=False, bad_rows=1.0)
    assert manifest["summary"]["written"] == 8
    with (real / "reports.csv").open(newline="", encoding="utf-8") as file:
        known = {Path(row["image"]).stem: row for row in csv.DictReader(file) if row["id"].startswith("openi-")}
    corpus = Corpus.open(tmp_path / "c")
    assert sum(index["rows"] for index in manifest["selections"]["frontal"]["splits"].values()) == 5
    for split in ("train", "validation"):
        rows = corpus.source(split)
        for row in (rows[number] for number in range(len(rows))):
            wanted = known[row["id"]]
            for name in ("findings", "impression", "indication"):
                assert row[name] == wanted[name]
            assert row["frontal"] == ("frontal" in wanted["view"].lower())
            assert (row["orig_width"], row["orig_height"]) == (int(wanted["width"]), int(wanted["height"]))
