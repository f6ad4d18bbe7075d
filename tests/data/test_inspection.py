"""The page of a corpus: its counts are those of the corpus, films that are held out and trained on are found, nothing in it is markup."""

import csv
import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import inspection
from data.labels import CHEXPERT
from data.packing import Arguments, pack
from data.phantom.study import study
from rad_jax import corpus
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError
from rad_jax.input_pipeline import eval_batches, longest
from rad_jax.prompts import SYSTEM, question


def run(*arguments):
    """The command: its exit status, and what it printed."""
    command = [sys.executable, "-m", "launch.inspect", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout


NASTY = "<script>alert(1)</script>"


def packed(folder, films, tokenizer=None):
    """A corpus of (id, split, image, findings)."""
    source = folder / "films"
    source.mkdir(parents=True)
    with (source / "reports.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "image", "findings", "patient", "view"])
        for name, split, image, findings in films:
            if image is not None:
                Image.fromarray(image).save(source / f"{name}.png")
            writer.writerow([name, split, f"{name}.png", findings, name, "PA"])
    arguments = Arguments("folder", str(source), 64, studies=10, seed=0, tokenizer=tokenizer, vocab_size=512)
    pack(arguments, folder / "corpus", workers=1, progress=False)
    return folder / "corpus"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    film = [study(0, patient, 0, 64).image for patient in range(6)]
    brighter = np.clip(film[1].astype(int) + 6, 0, 255).astype(np.uint8)
    first = packed(
        folder / "a",
        [
            ("a0", "train", film[0], f"Clear. {NASTY}"),
            ("a1", "train", film[1], "Heart is large. " * 20),
            ("a2", "train", film[0], "Clear."),
            ("a3", "test", film[2], "Clear."),
            ("a4", "validation", film[3], "Clear."),
            ("a5", "train", None, "Clear."),
            ("a6", "train", film[5], ""),
        ],
    )
    second = packed(
        folder / "b",
        [
            ("b0", "test", film[0], "Clear."),
            ("b1", "test", brighter, "Clear."),
            ("b2", "train", film[4], "Clear."),
            ("b3", "validation", film[2], "Clear."),
        ],
        tokenizer=str(first / "tokenizer.json"),
    )
    return first, second


def test_what_is_counted(corpora):
    facts = inspection.look(Corpus.open(corpora[0]), films=100, samples=3, progress=False)
    assert facts.films == {"train": 3, "validation": 1, "test": 1} and facts.patients == {
        "train": 3,
        "validation": 1,
        "test": 1,
    }
    assert facts.counts["view"] == {"PA": 5} and facts.counts["sections"]["findings"] == 5
    assert sorted(row["reason"] for row in facts.skipped) == ["empty findings", "missing image"]
    assert len(facts.samples) == 3 and {sample["split"] for sample in facts.samples} == {"train", "validation", "test"}
    assert facts.tokens["train"].max() > 60
    few = inspection.look(Corpus.open(corpora[0]), films=2, samples=0, progress=False)
    assert few.films["train"] == 2 and not few.samples
    summary = facts.corpus.meta["summary"]
    assert summary["duplicate_images"] == {"in the same split": 1, "in two splits": 0}
    assert summary["near_duplicates"] == {"in the same split": 0, "in two splits": 0}


def test_lengths_of_rows_are_those_of_training(corpora):
    """Counted by hand, by the batches themselves, and by what was set from them: nothing is cut that was said to be whole."""
    opened = Corpus.open(corpora[0])
    rows = inspection.look(opened, films=100, samples=0, progress=False).rows
    encode = opened.tokenizer().encode
    texts = [f"Clear. {NASTY}", "Clear.", "Heart is large. " * 20]  # in the order of the corpus
    prompt = 3 + len(encode(f"{SYSTEM} USER: ")) + len(encode(f"\n{question(None)} ASSISTANT:"))  # and <s>, image, </s>
    findings = [len(encode(text.strip())) for text in texts]
    assert rows["v1"].tolist() == [[prompt + n, n + 1] for n in findings]
    assert rows["plain"].tolist() == [[2 + n, n] for n in (len(encode(text.strip() + "\n")) for text in texts)]
    assert rows["clip"].tolist() == [[2 + n, 0] for n in findings]
    sizes: dict[str, Any] = {"batch_size": 3, "image_size": 64, "selection": "frontal"}
    for template, of in rows.items():
        found = inspection.lengths(of, 0 if template == "clip" else 16)
        chosen: dict[str, Any] = {"text_length": found.text_length, "target_length": found.target_length}
        batch = next(eval_batches(opened, "train", template=template, **sizes, **chosen))
        assert batch["length"].tolist() == of[:, 0].tolist() and not batch["truncated"].any()
        if template != "clip":
            assert batch["target_weights"].sum(axis=1).tolist() == of[:, 1].tolist()
            assert (found.row, found.row % 128) == (found.text_length + 15, 0)
        assert longest(opened, "train", "frontal", template)[1] == found.target_length
    assert (
        inspection.look(opened, films=2, samples=0, progress=False).rows["v1"].tolist() == rows["v1"][[0, 2]].tolist()
    )
    assert not inspection.look(opened, films=2, samples=0, selection="no such", progress=False).rows


def test_quantiles_and_what_to_set():
    rows = np.stack([np.arange(1, 1001), np.arange(1, 1001) // 2], axis=1)[::-1]
    found = inspection.lengths(rows, 1369)
    assert (found.text, found.targets) == ([500, 900, 990, 999, 1000], [250, 450, 495, 499, 500])
    # 990 words and 1,368 more are 2,358: 19 times 128, which has room for 1,064 words.
    assert (found.row, found.text_length, found.target_length, found.kept) == (2432, 1064, 504, 1.0)
    # A multiple of 128 that is just reached: ten of the thousand rows are longer, and their targets do not count.
    found = inspection.lengths(rows, 128 * 12 + 1 - 990)
    assert (found.row, found.text_length, found.target_length, found.kept) == (1536, 990, 496, 0.99)
    found = inspection.lengths(rows * [1, 0], 0)
    assert (found.row, found.text_length, found.target_length, found.kept) == (992, 992, 0, 0.992)
    # Half of the reports up to 130 words, 99 of 100 up to 220, three longer than 296, as those of Open-i: what configs/stage3.py has.
    openi = np.repeat([130, 220, 296, 340], [1713, 1678, 31, 3])
    found = inspection.lengths(np.stack([openi, openi - 64], axis=1), 1369)
    assert (found.row, found.text_length, found.target_length) == (1664, 296, 232) and found.text[:3] == [130, 220, 220]


def test_leaks_between_corpora_are_found(corpora):
    rows = {(row["first"], row["second"]): row for row in inspection.shared([Corpus.open(path) for path in corpora])}
    # Both folders are called corpus; the splits tell them apart here.
    assert rows["corpus train", "corpus test"] | {"first": 0, "second": 0} == {
        "first": 0,
        "second": 0,
        "equal": 1,
        "near": 1,
        "leak": True,
    }
    assert (
        rows["corpus test", "corpus validation"]["equal"] == 1 and not rows["corpus test", "corpus validation"]["leak"]
    )
    assert len(rows) == 2


@pytest.mark.parametrize(("lengths", "expected"), [([], []), ([0, 0, 2], [(0, 0, 2), (1, 1, 0), (2, 2, 1)])])
def test_histogram(lengths, expected):
    assert inspection.histogram(np.array(lengths, int)) == expected
    wide = inspection.histogram(np.arange(1000))
    assert len(wide) <= 30 and sum(count for _, _, count in wide) == 1000


def test_the_command(corpora, tmp_path):
    out = tmp_path / "page.html"
    status, said = run(f"--data={corpora[0]},{corpora[1]}", f"--out={out}", "--text_length=40", "--strict")
    assert status == 1  # a leak
    page = out.read_text()
    assert NASTY not in page and "&lt;script&gt;" in page
    assert "<script" not in page and not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "share 1 equal and 1 similar films" in page and "1 films were missing or damaged" in page
    assert "have more than 40 tokens" in page
    assert "5 films, 2 left out" in said and "Clear." not in said
    # Two of the three rows are short, the third is not; the page says what the terminal says.
    (told,) = (line for line in said.splitlines() if line.startswith("  stage 3 (v1), 3 rows of frontal"))
    opened = Corpus.open(corpora[0])
    rows = inspection.look(opened, films=100, samples=0, progress=False).rows["v1"]
    least, middle, most = sorted(rows[:, 0].tolist())
    settings = inspection.lengths(rows, 16)
    assert least < middle < most
    assert f"up to {middle} in 50 %, {most} in 90 %, {most} in 99 %, {most} in 99.9 %, {most} in 100 %: " in told
    assert (
        f"--config.data.text_length={settings.text_length} --config.data.target_length={settings.target_length}, "
        in told
    )
    assert told.endswith(f"with 16 of the image a row of {settings.row}, keeps 100 % whole")
    assert "Lengths of rows of frontal, and what to set" in page and "Text tokens of a row, v1" in page
    assert (
        f"<td>{middle}</td><td>{most}</td><td>{most}</td><td>{most}</td><td>{most}</td><td>{settings.text_length}</td>"
        in page
    )
    assert run(f"--data={corpora[1]}", f"--out={out}", "--strict")[0] == 0


# ------------------------------------------------------------------------------------------------------------------- the page's numbers


@pytest.fixture(scope="module")
def shown(corpora, tiny_corpus, tmp_path_factory):
    """The page of both folders and of a phantom with boxes and labels, all of whose films are shown, cut into its sections."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    status, _ = run(f"--data={corpora[0]},{corpora[1]},{tiny_corpus}", f"--out={out}", "--samples=99")
    assert status == 0
    return dict(re.findall(r'<section id="([^"]+)">(.*?)</section>', out.read_text(), re.DOTALL))


def cards(section: str) -> dict[str, list[list[str]]]:
    """Title -> rows of cells of the tables of a section."""
    found = {}
    for title, body in re.findall(r"<h3>([^<]*)</h3>.*?<tbody>(.*?)</tbody>", section, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
        found[html.unescape(title)] = [
            [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows
        ]
    return found


def tiles(section: str) -> dict[str, str]:
    return {
        name: value
        for value, name in re.findall(r'<div class="value">([^<]*)</div><div class="name">([^<]*)</div>', section)
    }


def bars(section: str) -> dict[str, list[tuple[int, ...]]]:
    """Title -> (least, greatest, texts) of every bar of the histograms."""
    return {
        title: [tuple(map(int, bar)) for bar in re.findall(r"<title>(\d+) to (\d+) tokens: (\d+)</title>", drawn)]
        for title, drawn in re.findall(r"<h3>(Tokens of [^<]*)</h3>(<svg.*?</svg>)", section, re.DOTALL)
    }


def phantoms(folder: Path) -> list[dict[str, Any]]:
    """All films of the phantom with their splits, read as training reads them and not as the page does."""
    opened = Corpus.open(folder)
    sources = {split: opened.source(split) for split in opened.splits}
    return [source[number] | {"split": split} for split, source in sources.items() for number in range(len(source))]


def test_what_was_left_out_and_what_is_there_twice_is_on_the_page(shown):
    counted, tables_ = tiles(shown["part0-counts"]), cards(shown["part0-tables"])
    assert {name: counted[name] for name in ("films", "patients", "left out", "equal films", "with boxes")} == {
        "films": "5",
        "patients": "5",
        "left out": "2",
        "equal films": "1",
        "with boxes": "0",
    }
    assert sorted(tables_["Left out, by reason"]) == [["empty findings", "1"], ["missing image", "1"]]
    assert sorted(tables_["Left out, the first"]) == [
        ["a5", "a5.png", "missing image", ""],
        ["a6", "a6.png", "empty findings", ""],
    ]
    assert tables_["Views"] == [["PA", "5"]] and "Labels" not in tables_
    # Equal and similar films of two splits, of which the one held out and trained on is a leak; the phantom's are of other patients.
    assert cards(shown["shared"])["Films that two splits have"] == [
        ["corpus train", "corpus test", "1", "1", "yes"],
        ["corpus test", "corpus validation", "1", "0", "no"],
    ]
    titles = re.findall(r'<article class="card study"><h3>([^<]*)</h3>', shown["part0-films"])
    assert sorted(titles) == ["a0", "a1", "a2", "a3", "a4"]


def test_labels_boxes_views_and_lengths_are_on_the_page(shown, tiny_corpus):
    rows = phantoms(tiny_corpus)
    counted, tables_ = tiles(shown["part2-counts"]), cards(shown["part2-tables"])
    labels = {
        label: [str(sum(int(row["labels"][k]) == value for row in rows)) for value in inspection.STATES]
        for k, label in enumerate(CHEXPERT)
    }
    assert tables_["Labels"] == [[label, *of] for label, of in labels.items() if set(of) != {"0"}]
    assert len(tables_["Labels"]) >= 8 and "Left out, by reason" not in tables_
    assert {view: int(count) for view, count in tables_["Views"]} == Counter(row["view"] for row in rows)
    rows_of = dict(Counter(row["split"] for row in rows))
    (selection,) = (of for of in tables_["Selections, rows of an epoch"] if of[0] == "frontal")
    assert selection[1:] == [str(rows_of[split]) for split in ("train", "validation", "test")]

    boxes = {row["id"]: [a for a in json.loads(row["annotations"]) if a["box"]] for row in rows}
    assert counted["films"] == str(len(rows)) == "24" and counted["patients"] == str(len({r["patient"] for r in rows}))
    assert counted["with boxes"] == str(sum(map(bool, boxes.values()))) != "0"
    films = dict(
        re.findall(r'<article class="card study"><h3>([^<]*)</h3>(.*?)</article>', shown["part2-films"], re.DOTALL)
    )
    assert films.keys() == boxes.keys()
    for row in rows:
        film = films[row["id"]]
        drawn = re.findall(r'<rect class="over" x="([^"]*)" y="([^"]*)" width="([^"]*)" height="([^"]*)"', film)
        wanted = [(b[0], b[1], b[2] - b[0], b[3] - b[1]) for b in (a["box"] for a in boxes[row["id"]])]
        assert [tuple(map(float, box)) for box in drawn] == [pytest.approx(box, rel=1e-4) for box in wanted]
        caption = ", ".join(f"{a['finding']} {a['side'] or ''}".strip() for a in boxes[row["id"]])
        assert (f"<figcaption>Boxes: {caption}</figcaption>" in film) == bool(caption)
        chips = re.findall(r'<li class="mark \w+">([^<]*)</li>', film)
        words = {1: "{}", 0: "no {}", -1: "{}?"}
        stated = zip(CHEXPERT, map(int, row["labels"]), strict=True)
        assert chips == [words[value].format(label) for label, value in stated if value in words]
        assert f"<dt>Findings</dt><dd>{html.escape(row['findings'])}</dd>" in film

    tokenizer = Corpus.open(tiny_corpus).tokenizer()
    for split in rows_of:
        lengths = [len(tokenizer.encode(row["findings"])) for row in rows if row["split"] == split]
        drawn_ = bars(shown["part2-counts"])[f"Tokens of findings, {split}"]
        assert drawn_ == [
            (least, greatest, sum(least <= length <= greatest for length in lengths)) for least, greatest, _ in drawn_
        ]
        assert sum(count for _, _, count in drawn_) == len(lengths)


# ------------------------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def copied(corpora, tmp_path):
    """A copy of the first corpus, the one shard of its validation split, and that of the second corpus, which is of one film too."""
    shutil.copytree(corpora[0], tmp_path / "c")
    shard, other = (next(folder.glob("folder/*/*validation*")) for folder in (tmp_path / "c", corpora[1]))
    assert shard.name == other.name and corpus._records(str(shard)) == corpus._records(str(other)) == 1
    return tmp_path / "c", shard, other


def test_a_shard_of_another_corpus_is_noticed(copied):
    folder, shard, other = copied
    # Neither of the two numbers that one would look at first tells them apart; their ends do.
    assert shard.stat().st_size == other.stat().st_size
    shutil.copyfile(other, shard)
    with pytest.raises(UserError, match=rf"{shard.name}: this shard of the corpus is damaged or another corpus's"):
        Corpus.open(folder)
    counted = Corpus.open(folder, "count")
    assert len(counted.lost) == 1 and f"{shard}: " in counted.lost[0]
    # It could be read, but its films are not those of the index.
    with pytest.raises(UserError, match="is in a shard that is lost"):
        counted.source("validation")[0]
    assert counted.source("test")[0]["id"] == "a3"
    sizes: dict[str, Any] = {"batch_size": 1, "text_length": 64, "target_length": 32, "image_size": 64}
    weights = [
        next(eval_batches(counted, split, template="plain", selection="all", **sizes))["weight"].tolist()
        for split in ("validation", "test")
    ]
    assert weights == [[0.0], [1.0]]


def test_a_changed_byte_is_noticed_by_the_checksum(copied):
    folder, shard, _ = copied
    assert inspection.verify(Corpus.open(folder), progress=False) == []
    data = bytearray(shard.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    shard.write_bytes(data)
    (sentence,) = inspection.verify(Corpus.open(folder), progress=False)  # opening does not read that far
    assert (
        sentence == f"{shard}: this shard of the corpus is damaged or another corpus's, copy or pack the corpus again."
    )
    shard.unlink()
    (sentence,) = inspection.verify(Corpus.open(folder, "count"), progress=False)
    assert sentence.startswith(f"{shard}: this shard of the corpus is missing")
    # A list of shards that has been changed with them is not the one that corpus.json was written with.
    known = json.loads((folder / "shards.json").read_text())
    known[shard.name]["sha256"] = "0" * 64
    (folder / "shards.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"shards\.json: this list of shards is damaged or another corpus's"):
        inspection.verify(Corpus.open(folder, "count"), progress=False)


def test_the_command_that_verifies(corpora, copied):
    folder, shard, other = copied
    shutil.copyfile(other, shard)
    status, said = run(f"--data={corpora[1]},{folder}", "--verify")
    assert status == 1
    first, second, third = said.splitlines()
    assert re.fullmatch(rf"{corpora[1]}: 3 shards, 0\.00 GB, all as they were packed", first)
    assert second.startswith(f"{shard}: this shard of the corpus is damaged or another corpus's")
    assert third.startswith(f"{folder}: 3 shards") and third.endswith("1 of them not as they were packed")
    assert run(f"--data={corpora[1]}", "--verify")[0] == 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page with")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window(corpora, tmp_path, width):
    out = tmp_path / "page.html"
    run(f"--data={corpora[0]}", f"--out={out}")
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    page = out.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    out.write_text(page.replace("</body>", probe))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},2000",
        "--dump-dom",
        out.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    match = re.search(r"<title>(\d+)</title>", shown)
    assert match and int(match[1]) <= max(width, 500)  # headless chromium's window is at least 500 wide
