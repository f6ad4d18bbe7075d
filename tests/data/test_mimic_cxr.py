"""MIMIC-CXR's layout in miniature, all text made up: LLaVA-Rad's annotations with their loaders, and raw reports."""

import csv
import gzip
import json
import re

import numpy as np
import pytest
from PIL import Image

from data.labels import CHEXPERT
from data.mimic_cxr import annotations
from data.mimic_cxr.builder import MimicCxr, MimicCxrReports
from data.packing import Arguments, pack
from data.reports import structure
from rad_jax import prompts
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError
from rad_jax.input_pipeline import train_iterator

NAN = float("nan")
STORED = "<image>\nDescribe the findings of the chest x-ray.\n"


def arguments(source, dataset="mimic_cxr", **other):
    values = {"image_size": 16, "studies": 10, "seed": 0, "tokenizer": None, "vocab_size": 512}
    return Arguments(dataset=dataset, source=str(source), **values | other)


def place(number, view=0):
    """Subject, study and film of a made-up patient."""
    subject = f"{10_000_000 + number * 1_000_000 // 4}"
    return subject, f"5{number:07d}", f"{number:08x}-{view:08x}-00000000-00000000-00000000"


def write_film(source, number, view=0):
    subject, study, dicom = place(number, view)
    folder = source / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 30), 7 * number, np.uint8)).save(folder / f"{dicom}.jpg")


def entry(number, method="rule-based", findings="The lungs are clear.", view="PA", reason="Cough", film=0, **other):
    subject, study, dicom = place(number, film)
    labels = dict.fromkeys(CHEXPERT, NAN) | {"Cardiomegaly": 1.0, "Edema": 0.0, "Pneumonia": -1.0}
    return {
        "id": f"{subject}_{study}",
        "image": f"mimic/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg",
        "generate_method": method,
        "reason": reason,
        "impression": None,
        "indication": None,
        "history": None,
        "view": view,
        "orientation": "Erect",
        "chexpert_labels": labels,
        "conversations": [{"from": "human", "value": STORED}, {"from": "gpt", "value": findings}],
        **other,
    }


# Split -> entries, with every quirk that the annotations have.
ENTRIES = {
    "train": [
        entry(0, "gpt4", "Clear lungs by gpt4."),
        entry(0, "rule-based", "Clear lungs by rule."),
        entry(1, findings=NAN),  # nothing was extracted
        entry(1, "gpt4", "Only gpt4 found this.", reason=None),
        entry(2, view="AP", reason="Fever\n// PNA?"),
        entry(2, view="LATERAL", film=1),
        entry(3, view=NAN, findings="View unknown."),
        entry(4, view="LL", findings=NAN, chexpert_labels=None),
        entry(5, reason="", findings=""),  # an empty string is findings, and an empty reason is one
        entry(6, findings="Its film is missing."),
    ],
    "dev": [entry(7), entry(7, "gpt4")],
    "test": [entry(8), entry(8, "gpt4"), entry(9, view="LATERAL")],
}


@pytest.fixture
def miniature(tmp_path):
    source = tmp_path / "mimic"
    source.mkdir()
    for split, entries in ENTRIES.items():
        name = f"chat_{split}_MIMIC_CXR_all_gpt4extract_rulebased_v1.json"
        (source / name).write_text(json.dumps(entries))
        assert re.search(r": NaN\b", (source / name).read_text()) or split != "train"
    for number in (*range(6), 7, 8, 9):
        write_film(source, number)
    write_film(source, 2, 1)
    return source


def rows_of(corpus, split, selection):
    source = corpus.source(split, selection)
    return sorted((source[number] for number in range(len(source))), key=lambda row: row["id"])


def test_a_miniature(miniature, tmp_path):
    manifest, _ = pack(arguments(miniature), tmp_path / "c", workers=1, progress=False)
    assert manifest["splits"] == {"train": 7, "validation": 1, "test": 2}
    assert manifest["summary"]["skipped"] == {"missing image": 1}
    assert manifest["summary"]["counts"] == {
        "train entries": 10,
        "validation entries": 2,
        "test entries": 3,
        "train entries of mimic_train_findings": 6,
        "validation entries of mimic_train_findings": 2,
        "test entries of mimic_test_findings": 1,
    }
    assert manifest["published"]["mimic_train_findings"] == {
        "train": {"rows": 5, "published": 400_042},
        "validation": {"rows": 2, "published": 3_238},
    }
    assert manifest["published"]["mimic_test_findings"] == {"test": {"rows": 1, "published": 2_461}}
    counts = {
        name: tuple(index["rows"] for index in selection["splits"].values())
        for name, selection in manifest["selections"].items()
        if not name.startswith(("all", "frontal", "pairs"))
    }
    assert counts == {
        "default": (9, 2, 3),
        "default.gpt4": (2, 1, 1),
        "default.rule-based": (7, 1, 2),
        "mimic_train_findings": (5, 2, 2),
        "mimic_train_findings.gpt4": (2, 1, 1),
        "mimic_train_findings.rule-based": (3, 1, 1),
        "mimic_test_findings": (3, 1, 1),
        "mimic_test_findings.gpt4": (0, 0, 0),
        "mimic_test_findings.rule-based": (3, 1, 1),
        "mimic_cxr_all_frontal_findings": (5, 2, 2),
        "mimic_cxr_all_frontal_findings.gpt4": (2, 1, 1),
        "mimic_cxr_all_frontal_findings.rule-based": (3, 1, 1),
        "mimic_cxr_all_views_findings": (7, 2, 3),
        "mimic_cxr_all_views_findings.gpt4": (2, 1, 1),
        "mimic_cxr_all_views_findings.rule-based": (5, 1, 2),
    }


@pytest.fixture
def corpus(miniature, tmp_path):
    pack(arguments(miniature), tmp_path / "c", workers=1, progress=False)
    return Corpus.open(tmp_path / "c")


def test_the_questions_of_the_five_loaders(corpus):
    film = [place(number)[2] for number in range(6)]
    given = "Provide a description of the findings in the radiology image given the following indication: "
    trained = {row["id"]: row for row in rows_of(corpus, "train", "mimic_train_findings")}
    assert {name: row["question"] for name, row in trained.items()} == {
        film[0]: given + "Cough",
        f"{film[0]}~gpt4": given + "Cough",
        f"{film[1]}~gpt4": "Provide a description of the findings in the radiology image.",
        film[2]: given + "Fever // PNA?",
        film[5]: given,
    }
    assert trained[film[0]]["findings"] == "Clear lungs by rule."
    assert trained[f"{film[0]}~gpt4"]["findings"] == "Clear lungs by gpt4."
    for name in ("default", "mimic_cxr_all_frontal_findings"):
        assert {row["question"] for row in rows_of(corpus, "train", name)} == {STORED.removeprefix("<image>\n")}
    asked = {row["id"]: row["question"] for row in rows_of(corpus, "train", "mimic_cxr_all_views_findings")}
    for name, view in ((film[0], "PA"), (film[2], "AP"), (place(2, 1)[2], "LATERAL"), (film[3], "Unknown")):
        assert asked[name] == (f"Given the chest X-ray image from {view} view, describe the findings in the image: ")


def test_labels_ids_and_views(corpus):
    rows = {row["id"]: row for row in rows_of(corpus, "train", "default")}
    subject, study, dicom = place(0)
    row = rows[dicom]
    assert (row["patient"], row["study"], row["view"], row["frontal"]) == (subject, study, "PA", True)
    assert dict(zip(CHEXPERT, row["labels"].tolist(), strict=True)) == dict.fromkeys(CHEXPERT, -2) | {
        "Cardiomegaly": 1,
        "Edema": 0,
        "Pneumonia": -1,
    }
    assert rows[place(3)[2]]["view"] == "" and not rows[place(3)[2]]["frontal"]
    assert set(rows[place(4)[2]]["labels"].tolist()) == {-2}


def test_training_reads_the_selection(corpus):
    """An entry with empty findings keeps its row, so that the length is the published one, and has no weight."""
    batches = train_iterator(
        corpus,
        "train",
        template="v1",
        batch_size=5,
        text_length=200,
        target_length=64,
        image_size=16,
        seed=0,
        selection="mimic_train_findings",
    )
    batch = next(batches)
    source = corpus.source("train", "mimic_train_findings")
    assert sorted(batch["index"].tolist()) == list(range(5))
    weights = {source[int(n)]["id"]: float(w) for n, w in zip(batch["index"], batch["weight"], strict=True)}
    assert [name for name, weight in weights.items() if weight == 0] == [place(5)[2]]
    tokenizer = corpus.tokenizer()
    for i, number in enumerate(batch["index"].tolist()):
        row = source[number]
        wanted = prompts.render_v1(tokenizer, row["question"], row["findings"]).ids
        assert batch["tokens"][i, : batch["length"][i]].tolist() == wanted


def test_a_wrong_folder_or_file_is_refused(miniature, tmp_path):
    def refused(message, dataset="mimic_cxr"):
        with pytest.raises(UserError, match=message):
            pack(arguments(miniature, dataset), tmp_path / "c", workers=1, progress=False)

    train = miniature / annotations.FILES["train"]
    whole = train.read_text()
    refused(r"mimic-cxr-2\.0\.0-split\.csv: not there", "mimic_cxr_reports")
    train.write_text(whole[:-40])
    refused("not a JSON file, or one that ends early")
    train.write_text('{"a": 1}')
    refused("not a list of annotations")
    train.write_text("[" * 100_000)
    refused(r"rulebased_v1\.json: not a JSON file")
    changes: list[dict] = [{"image": "mimic/p10.jpg"}, {"generate_method": "by hand"}, {"conversations": []}]
    for change in changes:
        train.write_text(json.dumps([entry(0), entry(1) | change]))
        refused("entry 1 of the annotations is not as published")
    train.write_text(json.dumps([entry(8)]))  # of the test set
    refused("1 patients are in more than one split")
    train.write_text(whole)
    (miniature / "files").rename(miniature / "films")
    refused("files: not there")
    train.unlink()
    refused(r"chat_train_MIMIC_CXR_all_gpt4extract_rulebased_v1\.json: not there")


REPORT = """\
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 {reason}:  Cough for
 three days.

 FINDINGS:

 The lungs are clear {number}.

 IMPRESSION:  Normal.
"""


@pytest.fixture
def reports(tmp_path):
    """Six studies: five with a report, one of which has no usable section; one lateral film, one film without its file."""
    source = tmp_path / "mimic"
    source.mkdir()
    splits = ("train", "train", "train", "validate", "test", "train")
    tables: dict[str, list[dict]] = {"split": [], "metadata": [], "chexpert": []}
    for number, split in enumerate(splits):
        subject, study, dicom = place(number)
        write_film(source, number)
        ids = {"dicom_id": dicom, "study_id": study, "subject_id": subject}
        view = "LATERAL" if number == 1 else "AP"
        tables["split"].append(ids | {"split": split})
        tables["metadata"].append(ids | {"ViewPosition": view, "Rows": "40", "Columns": "30"})
        values = dict.fromkeys(CHEXPERT, "") | {"Edema": "1.0", "Fracture": "-1.0", "Pneumonia": "0.0"}
        tables["chexpert"].append({"subject_id": subject, "study_id": study} | values)
        text = REPORT.format(reason="NDICATION" if number == 0 else "HISTORY", number=number)
        path = source / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
        if number != 5:
            path.write_text("Nothing to see." if number == 2 else text)
    for name, rows in tables.items():
        with gzip.open(source / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return source


def test_raw_reports(reports, tmp_path):
    manifest, _ = pack(arguments(reports, "mimic_cxr_reports"), tmp_path / "c", workers=1, progress=False)
    assert manifest["splits"] == {"train": 2, "validation": 1, "test": 1}
    assert manifest["summary"]["skipped"] == {"no report with findings or impression": 2}
    assert manifest["summary"]["counts"] == {
        "reports": 6,
        "reports missing": 1,
        "reports with findings": 4,
        "reports with impression": 4,
        "reports that the fix 'typo' changes": 1,
    }
    corpus = Corpus.open(tmp_path / "c")
    rows = {row["id"]: row for split in corpus.splits for row in rows_of(corpus, split, "all")}
    assert rows.keys() == {place(number)[2] for number in (0, 1, 3, 4)}
    row = rows[place(3)[2]]
    assert (row["findings"], row["impression"]) == ("The lungs are clear 3.", "Normal.")
    assert (row["indication"], row["method"]) == ("Cough for three days.", "rule-based")
    assert dict(zip(CHEXPERT, row["labels"].tolist(), strict=True))["Fracture"] == -1
    # The typo is an impression to the official parser, which a later one replaces; the mended rules read it.
    assert rows[place(0)[2]]["indication"] == "" and not rows[place(1)[2]]["frontal"]
    arguments_ = arguments(reports, "mimic_cxr_reports_corrected")
    pack(arguments_, tmp_path / "d", workers=1, progress=False)
    mended = {row["id"]: row for row in rows_of(Corpus.open(tmp_path / "d"), "train", "all")}
    assert mended[place(0)[2]]["indication"] == "Cough for three days."
    assert mended[place(0)[2]]["method"] == "rule-based-corrected"


def test_a_film_in_no_official_split_is_left_out_and_counted(reports):
    table = reports / "mimic-cxr-2.0.0-split.csv.gz"
    rows = gzip.decompress(table.read_bytes()).decode().replace(",validate", ",dev")
    table.write_bytes(gzip.compress(rows.encode()))
    builder = MimicCxrReports(source=reports, image_size=16, data_dir=reports / "out")
    jobs = builder.jobs()
    assert {split: len(films) for split, films in jobs.items()} == {"train": 2, "validation": 0, "test": 1}
    assert [(skip.id, skip.reason) for skip in builder.skipped if "split" in skip.reason] == [
        (place(3)[2], "in no official split")
    ]


def test_tables_may_be_unpacked_and_are_checked(reports):
    packed = reports / "mimic-cxr-2.0.0-split.csv.gz"
    (reports / "mimic-cxr-2.0.0-split.csv").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert [path.name for path in MimicCxrReports.defining(reports)] == [
        "mimic-cxr-2.0.0-split.csv",
        "mimic-cxr-2.0.0-metadata.csv.gz",
    ]
    builder = MimicCxrReports(source=reports, image_size=16, data_dir=reports / "out")
    assert sum(map(len, builder.jobs().values())) == 4
    (reports / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(b"not packed")
    with pytest.raises(UserError, match=r"metadata\.csv\.gz: damaged, or no table"):
        builder.jobs()
    with gzip.open(reports / "mimic-cxr-2.0.0-metadata.csv.gz", "wt") as file:
        file.write("dicom_id,View\n")
    with pytest.raises(UserError, match=r"metadata\.csv\.gz: no column ViewPosition"):
        builder.jobs()


def test_the_published_counts_add_up():
    counts = MimicCxr.published
    train, rules, gpt4 = (counts[f"mimic_train_findings{method}"] for method in ("", ".rule-based", ".gpt4"))
    for split in ("train", "validation"):
        assert train[split] == rules[split] + gpt4[split]
    assert (train["train"], counts["mimic_test_findings"]["test"]) == (400_042, 2_461)


def test_reports_that_the_rules_cannot_read_may_be_structured(reports, tmp_path):
    """A report without findings and impression is no film's, unless a language model has found some in it."""
    builder = MimicCxrReports(source=reports, image_size=16, data_dir=tmp_path)
    documents = builder.documents()
    assert not {skip.reason for skip in builder.skipped} - {"no report with findings or impression"}
    rows = [
        structure.row(key, dict.fromkeys(structure.SECTIONS) | {"findings": f"Edema {number}."}, "credentialed")
        for number, key in enumerate(documents)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = arguments(reports, "mimic_cxr_reports", structured=str(tmp_path / "s.jsonl"))
    manifest, _ = pack(given, tmp_path / "c", workers=1, progress=False)
    assert manifest["access"] == "credentialed"
    assert manifest["summary"]["skipped"] == {"no report with findings or impression": 1}  # the one without a report
    corpus = Corpus.open(tmp_path / "c")
    found = [row for split in corpus.splits for row in rows_of(corpus, split, "all.llm")]
    assert len(found) == 5 and all(row["findings"].startswith("Edema") for row in found)
    alone = [row for row in found if not row["id"].endswith("~llm")]
    assert len(alone) == 1  # its only text


def test_structured_reports_are_in_no_loader(miniature, tmp_path):
    """The published selections keep their rows when texts are added."""
    builder = MimicCxr(source=miniature, image_size=16, data_dir=tmp_path)
    rows = [
        structure.row(key, dict.fromkeys(structure.SECTIONS) | {"findings": "Edema."}, "credentialed")
        for key in builder.documents()
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    without, _ = pack(arguments(miniature), tmp_path / "c", workers=1, progress=False)
    given = arguments(miniature, structured=str(tmp_path / "s.jsonl"))
    manifest, _ = pack(given, tmp_path / "d", workers=1, progress=False)
    for name in annotations.LOADERS:
        found = manifest["selections"][name]["splits"]
        assert {split: index["rows"] for split, index in found.items()} == {
            split: index["rows"] for split, index in without["selections"][name]["splits"].items()
        }
    assert manifest["selections"]["all.llm"]["splits"]["train"]["rows"] > 0
    assert manifest["published"] == without["published"]
