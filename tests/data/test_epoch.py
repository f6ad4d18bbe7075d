"""An epoch of 10,000 films, one JPEG of a hundred corrupt: every film is read once or listed, though the number of processes changes."""

import csv

import numpy as np
import pytest
from PIL import Image

from data.packing import Arguments, pack
from rad_jax.input_pipeline import Corpus, train_iterator

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
    steps, state, order = len(rows) // BATCH, {"global_next_index": 0}, []
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
                assert taken["weight"].all()
                batch[index::processes] = taken["index"]
            order += batch.tolist()
        state = parts[0].get_state()
        assert {str(part.get_state()) for part in parts} == {str(state)}
    assert state == {"global_next_index": len(rows)}
    ids = [rows[number]["id"] for number in order]
    assert sorted(ids + listed, key=int) == [str(number) for number in range(FILMS)]
