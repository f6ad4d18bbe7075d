"""An epoch of 10,000 films, one JPEG of a hundred corrupt: every film is read once or listed, though the number of processes changes.

The same with a shard missing and another cut short, and with the processes of two jobs, one after the other.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.packing import Arguments, pack
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError
from rad_jax.input_pipeline import train_iterator

ROOT = Path(__file__).parents[2]
FILMS, FILES, BATCH = 10_000, 100, 100


# A process of a job that reads its share of some batches and tells the ids of each batch's films, without weight or not, and where it stopped.
READER = """
import json, sys
from rad_jax.corpus import Corpus
from rad_jax.input_pipeline import train_iterator
path, options, state, steps, index, count = json.loads(sys.argv[1])
corpus = Corpus.open(path)
rows = corpus.source("train", options["selection"])
part = train_iterator(corpus, "train", process_index=index, process_count=count, **options)
part.set_state(state)
batches = [[(rows[int(n)]["id"], float(w)) for n, w in zip(b["index"], b["weight"])] for b in (next(part) for _ in range(steps))]
print(json.dumps({"batches": batches, "state": part.get_state(), "tensorflow": "tensorflow" in sys.modules}))
"""
OPTIONS: dict[str, Any] = {
    "template": "plain",
    "batch_size": BATCH,
    "text_length": 32,
    "target_length": 16,
    "image_size": 16,
    "seed": 3,
    "selection": "frontal",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, list[str]]:
    """The corpus, and the ids of the films that are not in it."""
    folder = tmp_path_factory.mktemp("epoch")
    source = folder / "films"
    source.mkdir()
    for number in range(FILES):
        Image.fromarray(np.full((16, 16), number, np.uint8)).save(source / f"{number}.jpg")
    whole = (source / "0.jpg").read_bytes()
    (source / "0.jpg").write_bytes(whole[: len(whole) // 2])
    with (source / "reports.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "image", "findings", "patient", "split"])
        writer.writeheader()
        for number in range(FILMS):
            name = f"{number % FILES}.jpg"
            writer.writerow(
                {"id": number, "image": name, "findings": f"Film {number}.", "patient": number, "split": "train"}
            )
    arguments = Arguments("folder", str(source), image_size=16, studies=10, seed=0, tokenizer=None, vocab_size=512)
    manifest, _ = pack(arguments, folder / "c", workers=1, progress=False)
    assert manifest["summary"]["skipped"] == {"unreadable image": FILMS // FILES}
    with (folder / "c/skipped.csv").open(newline="") as file:
        return folder / "c", [row["id"] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_every_film_once(packed, tmp_path):
    whole, listed = packed
    shutil.copytree(whole, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    rows = corpus.source("train", "frontal")
    assert len(rows) + len(listed) == FILMS and len(rows) % BATCH == 0
    given, bad = epoch(corpus)
    ids = [rows[number]["id"] for number in given]
    assert sorted(ids + listed, key=int) == [str(number) for number in range(FILMS)] and not bad

    # One shard gone and one cut short: refused by name, or, where that is asked for, every one of their rows counted and none of the others.
    first, second, *_ = sorted((tmp_path / "c").glob("folder/*/*train*"))
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: this shard of the corpus is missing"):
        Corpus.open(tmp_path / "c")
    damaged = Corpus.open(tmp_path / "c", "count")
    assert [Path(sentence.split(":")[0]).name for sentence in damaged.lost] == [first.name, second.name]
    again, bad = epoch(damaged)
    assert again == given
    known = json.loads((tmp_path / "c/folder/1.0.0/dataset_info.json").read_text())["splits"][0]["shardLengths"]
    assert sorted(bad) == list(range(int(known[0]) + int(known[1])))


@pytest.mark.slow
def test_every_film_once_over_processes_of_their_own(packed, tmp_path):
    """Two processes read half of an epoch, four go on from the state that the first of the two saved."""
    folder, listed = packed
    saved, given = tmp_path / "state.json", list[str]()
    saved.write_text(json.dumps({"global_next_index": 0}))
    steps = (FILMS - len(listed)) // BATCH
    for count, taken in ((2, steps // 2), (4, steps - steps // 2)):
        told = read_by(count, folder, json.loads(saved.read_text()), taken)
        assert not any(of["tensorflow"] for of in told)
        for step in range(taken):
            shares = [of["batches"][step] for of in told]
            assert {len(share) for share in shares} == {BATCH // count}
            batch = [shares[place % count][place // count] for place in range(BATCH)]
            assert {weight for _, weight in batch} == {1.0}
            given += [name for name, _ in batch]
        first, *others = (of["state"] for of in told)
        assert all(state == first for state in others)
        saved.write_text(json.dumps(first))
    assert json.loads(saved.read_text()) == {"global_next_index": steps * BATCH}
    assert sorted(given + listed, key=int) == [str(number) for number in range(FILMS)]
    # In the order in which one process would have read them.
    corpus = Corpus.open(folder)
    rows, alone = corpus.source("train", "frontal"), train_iterator(corpus, "train", **OPTIONS)
    for step in (0, 1, 2):
        assert [rows[int(n)]["id"] for n in next(alone)["index"]] == given[step * BATCH : (step + 1) * BATCH]
    alone.set_state({"global_next_index": (steps - 1) * BATCH})
    assert [rows[int(n)]["id"] for n in next(alone)["index"]] == given[-BATCH:]


def read_by(count: int, folder: Path, state: dict[str, int], steps: int) -> list[dict[str, Any]]:
    """What `count` processes tell that run side by side."""
    running = []
    for index in range(count):
        told = json.dumps([str(folder), OPTIONS, state, steps, index, count])
        command = [sys.executable, "-c", READER, told]
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count
    return [json.loads(text) for text in said]


def epoch(corpus: Corpus) -> tuple[list[int], list[int]]:
    """The rows of an epoch, of 1, then 2, then 4 processes, and those of them that had no weight."""
    steps, state = len(corpus.source("train", "frontal")) // BATCH, {"global_next_index": 0}
    order: list[int] = []
    bad: list[int] = []
    for processes, count in ((1, steps // 3), (2, steps // 3), (4, steps - 2 * (steps // 3))):
        parts = [
            train_iterator(
                corpus,
                "train",
                process_index=index,
                process_count=processes,
                **OPTIONS,
            )
            for index in range(processes)
        ]
        for part in parts:
            part.set_state(state)
        for _ in range(count):
            batch = np.empty(BATCH, int)
            for index, part in enumerate(parts):
                taken = next(part)
                bad += taken["index"][taken["weight"] == 0].tolist()
                batch[index::processes] = taken["index"]
            order += batch.tolist()
        state = parts[0].get_state()
        assert {str(part.get_state()) for part in parts} == {str(state)}
    assert state == {"global_next_index": steps * BATCH}
    return order, bad
