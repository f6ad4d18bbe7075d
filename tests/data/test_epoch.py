"""An epoch of 10,000 films, one JPEG of a hundred corrupt: every film is read once or listed, though the number of processes changes.

The same with a shard missing and another cut short.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.packing import Arguments, pack
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError
from rad_jax.input_pipeline import train_iterator

FILMS, FILES, BATCH = 10_000, 100, 100


@pytest.mark.slow
def test_every_film_once(tmp_path):
    source = tmp_path / "films"
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
    manifest, _ = pack(arguments, tmp_path / "c", workers=1, progress=False)
    assert manifest["summary"]["skipped"] == {"unreadable image": FILMS // FILES}
    with (tmp_path / "c/skipped.csv").open(newline="") as file:
        listed = [row["id"] for row in csv.DictReader(file)]

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
                template="plain",
                batch_size=BATCH,
                text_length=32,
                target_length=16,
                image_size=16,
                seed=3,
                selection="frontal",
                process_index=index,
                process_count=processes,
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
