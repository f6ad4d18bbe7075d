"""Several corpora as one: exact counts of each, nothing held out anywhere is trained on, and training reads it as any other."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs import mixture as recipe
from data import mixture
from data.packing import Arguments, pack
from rad_jax import prompts
from rad_jax.corpus import Corpus, Mixture
from rad_jax.errors import UserError
from rad_jax.input_pipeline import train_iterator

ROOT = Path(__file__).parents[2]


def corpus_of(folder: Path, name: str, greys: dict[str, list[int]], tokenizer: Path | None, size: int = 16) -> None:
    """Packs films of one grey value each, by split."""
    source = folder / f"{name}_source"
    source.mkdir()
    rows = []
    for split, values in greys.items():
        for grey in values:
            Image.fromarray(np.full((20, 20), grey, np.uint8)).save(source / f"{grey}.png")
            rows.append({"image": f"{grey}.png", "findings": f"{name} {grey}.", "split": split, "id": f"{name}-{grey}"})
    with (source / "reports.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    given = str(tokenizer) if tokenizer else None
    arguments = Arguments("folder", str(source), image_size=size, studies=10, seed=0, tokenizer=given, vocab_size=512)
    pack(arguments, folder / name, workers=1, progress=False)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Two corpora; film 5 trains in `one` and is held out in `two`, film 30 is in the training split of both."""
    folder = tmp_path_factory.mktemp("corpora")
    corpus_of(folder, "one", {"train": [1, 2, 3, 4, 5, 30], "test": [10]}, None)
    corpus_of(folder, "two", {"train": [21, 22, 23, 24, 30], "validation": [5]}, folder / "one/tokenizer.json")
    return folder


def members(one: float = 1.0, two: float = 1.0) -> dict:
    return {"one": {"selection": "all", "weight": one}, "two": {"selection": "frontal", "weight": two}}


def ids(corpus: Corpus, split: str) -> list[str]:
    source = corpus.source(split)
    return [source[number]["id"] for number in range(len(source))]


def test_every_row_once_but_what_is_held_out_elsewhere(corpora, tmp_path):
    manifest, packed = mixture.pack(members(), corpora, tmp_path / "mix")
    assert packed and manifest["splits"] == {"train": 10, "validation": 1, "test": 1}
    counted = {m["name"]: (m["rows"], m[mixture.LEAKED]) for m in manifest["members"]}
    assert counted == {
        "one": ({"train": 5, "validation": 0, "test": 1}, 1),
        "two": ({"train": 5, "validation": 1, "test": 0}, 0),
    }
    corpus = Corpus.open(tmp_path / "mix")
    assert isinstance(corpus.source("train"), Mixture)
    assert sorted(ids(corpus, "train")) == sorted(
        [*(f"one-{k}" for k in (1, 2, 3, 4, 30)), *(f"two-{k}" for k in (21, 22, 23, 24, 30))]
    )
    assert (ids(corpus, "validation"), ids(corpus, "test")) == (["two-5"], ["one-10"])
    row = corpus.source("validation")[0]
    assert row["findings"] == "two 5." and row["question"].startswith("Provide a description")
    unasked = corpus.source("train", "all.without_indication")
    assert {unasked[number]["question"] for number in range(10)} == {prompts.question(None)}
    again, packed = mixture.pack(members(), corpora, tmp_path / "mix")
    assert not packed and again == manifest


def test_weights_are_exact(corpora, tmp_path):
    manifest, _ = mixture.pack(members(0.4, 2.6), corpora, tmp_path / "mix")
    assert [m["rows"]["train"] for m in manifest["members"]] == [2, 13]
    corpus = Corpus.open(tmp_path / "mix")
    times = Counter(ids(corpus, "train"))
    assert sum(n for name, n in times.items() if name.startswith("one")) == 2
    assert sorted(n for name, n in times.items() if name.startswith("two")) == [2, 2, 3, 3, 3]
    other, _ = mixture.pack(members(0.4, 2.6), corpora, tmp_path / "other", seed=1)
    assert other["selections"] != manifest["selections"] and other["fingerprint"] == manifest["fingerprint"]
    assert corpus.identity("train", "all") != Corpus.open(tmp_path / "other").identity("train", "all")


def test_training_on_two_processes_reads_every_row_once(corpora, tmp_path):
    mixture.pack(members(1, 2), corpora, tmp_path / "mix")
    corpus = Corpus.open(tmp_path / "mix")
    options: dict[str, Any] = {"text_length": 64, "target_length": 40, "image_size": 16, "seed": 0, "selection": "all"}
    parts = [
        train_iterator(corpus, "train", template="plain", batch_size=6, process_index=k, process_count=2, **options)
        for k in range(2)
    ]
    batches = [next(part) for _ in range(5) for part in parts]
    source = corpus.source("train")
    seen = Counter(source[int(number)]["id"] for batch in batches for number in batch["index"])
    # 15 rows, 30 drawn: two passes.
    assert seen == {**{f"one-{k}": 2 for k in (1, 2, 3, 4, 30)}, **{f"two-{k}": 4 for k in (21, 22, 23, 24, 30)}}
    for batch in batches:
        for image, number in zip(batch["image"], batch["index"], strict=True):
            assert (image == int(source[int(number)]["id"].split("-")[1])).all()


def test_members_that_do_not_fit(corpora, tmp_path):
    def refused(message: str, chosen: dict, source: Path = corpora) -> None:
        with pytest.raises(UserError, match=message):
            mixture.pack(chosen, source, tmp_path / "mix")
        assert not (tmp_path / "mix").exists()

    refused("three: no packed corpus here", {**members(), "three": {"selection": "all", "weight": 1}})
    refused("no selection 'sideways': use one of all, frontal, pairs", {"one": {"selection": "sideways", "weight": 1}})
    refused("the weight of one is 0", members(one=0))
    refused("a mixture needs members", {})
    other = tmp_path / "others"
    other.mkdir()
    corpus_of(other, "one", {"train": [1, 2]}, None)
    corpus_of(other, "two", {"train": [1, 2]}, None)
    refused("one and two differ in tokenizer", members(), other)
    corpus_of(other, "three", {"train": [1, 2]}, other / "one/tokenizer.json", size=17)
    refused("one and three differ in image size", {"one": members()["one"], "three": members()["one"]}, other)


def test_a_member_that_was_packed_anew_is_noticed(tmp_path):
    corpus_of(tmp_path, "one", {"train": [1, 2]}, None)
    mixture.pack({"one": members()["one"]}, tmp_path, tmp_path / "mix")
    with pytest.raises(UserError, match="is a mixture itself"):
        mixture.pack({"mix": members()["one"]}, tmp_path, tmp_path / "twice")
    file = tmp_path / "one/corpus.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"selections": whole["selections"] | {"frontal": {}}}))
    Corpus.open(tmp_path / "mix")  # another selection is nothing to it
    changed = whole["selections"] | {"all": whole["selections"]["all"] | {"question": "stored"}}
    for change in ({"fingerprint": "other"}, {"selections": changed}):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=r"is not the corpus that .* was mixed from"):
            Corpus.open(tmp_path / "mix")


def test_the_command(corpora, tmp_path):
    command = [sys.executable, "-m", "launch.pack", "--dataset=mixture", f"--out={tmp_path / 'mix'}"]
    flags = ["--recipe=configs/mixture.py:one,two", "--recipe.members.two.weight=2", f"--source={corpora}"]
    done = subprocess.run([*command, *flags], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        "one: 5 train, 0 validation, 1 test; 1 train rows left out, whose image is held out in a member" in done.stdout
    )
    assert (
        "two: 10 train, 1 validation, 0 test\n" in done.stdout and "mix: 15 train, 1 validation, 1 test" in done.stdout
    )
    alone = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert alone.returncode == 2 and "--dataset=mixture and --recipe belong together" in alone.stderr


def test_the_recipe_names_corpora_of_this_project():
    from data.corpora import CORPORA, builder_class

    chosen = recipe.get_config().members.to_dict()
    assert chosen.keys() <= CORPORA.keys()
    for name, member in chosen.items():
        assert member["selection"] in builder_class(name).selections
    assert recipe.get_config("openi").members.to_dict() == {"openi": {"selection": "frontal", "weight": 1.0}}
