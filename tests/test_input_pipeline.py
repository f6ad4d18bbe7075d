"""The pipeline on a tiny packed corpus: batches, order, sharding, restoring, faults."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rad_jax import FORMAT_VERSION, images, input_pipeline, prompts
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError
from rad_jax.input_pipeline import eval_batches, train_iterator

SIZE = 32
COUNTS = {"train": 21, "validation": 3}
LATERALS = (2, 7, 11)  # record numbers of train
CORRUPT = 5
WORDS = ["lungs", "heart", "clear", "enlarged", "left", "right", "effusion", "small", "no", "pneumothorax", "carina"]
OPTIONS: dict[str, Any] = {
    "batch_size": 4,
    "text_length": 96,
    "target_length": 48,
    "image_size": SIZE,
    "selection": "all",
}


METHODS = ("report", "llm")
TWICE = 2  # record number with two texts


def texts(split: str, number: int, method: str, rng: Any) -> dict:
    """One text of a record."""
    return {
        "method": method,
        "indication": None if number % 3 == 0 else f"Cough for {number} days",
        "findings": " ".join(rng.choice(WORDS, 6)) + f" {number}.",
        "impression": "Überwiegend normal.",
        "prompt": "What is there?",
    }


def row(split: str, number: int, slot: int = 0) -> dict:
    """What `Source` makes of one text of a record."""
    record = study(split, number)
    text = json.loads(record.pop("texts"))[slot]
    del text["prompt"]
    question = prompts.question(text["indication"])
    return record | text | {"indication": text["indication"] or "", "question": question}


def study(split: str, number: int) -> dict:
    """One record; the top left pixel of the crop tells its number."""
    rng = np.random.default_rng([number, len(split)])
    image = rng.integers(0, 256, (SIZE, SIZE + 5) if number % 2 else (SIZE + 9, SIZE), dtype=np.uint8)
    lateral = split == "train" and number in LATERALS
    png = images.encode_png(image)
    return {
        "image": png[: len(png) // 2] if split == "train" and number == CORRUPT else png,
        "id": f"{split}-{number}",
        "patient": f"p{number // 2}",
        "study": f"s{number}",
        "view": "LATERAL" if lateral else "PA",
        "sex": "F",
        "age": 50,
        "texts": json.dumps([texts(split, number, method, rng) for method in METHODS[: 1 + (number == TWICE)]]),
        "frontal": not lateral,
        "orig_height": 100,
        "orig_width": 90,
        "labels": np.full(14, -2, np.int8),
        "annotations": "[]",
        "source": "test",
        "source_sha256": "",
        "look": np.zeros(32, np.uint8),
    }


def pack(folder: Path) -> None:
    """Writes the corpus as launch.pack does: an ArrayRecord dataset, corpus.json and a tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorflow_datasets and its dependencies
        import tensorflow_datasets as tfds

    from data import packing
    from data.records import features
    from data.selections import Selection, write_indices

    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            # Not a module of a package: for those the library asks for one more dependency.
            __module__ = "tiny"
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features(), disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in COUNTS}

            def _generate_examples(self, split):
                for number in range(COUNTS[split]):
                    yield number, study(split, number)

    builder = Tiny(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    words = [row("train", number) for number in range(COUNTS["train"])]
    prompts.train_tokenizer([(w["indication"] or None, w["findings"]) for w in words], 512, folder / "tokenizer.json")
    selections = {
        "all": Selection(lambda record, text: text["method"] == "report"),
        "frontal": Selection(lambda record, text: text["method"] == "report" and record["frontal"]),
        "both": Selection(lambda record, text: True, "stored"),
        "views": Selection(lambda record, text: True, "view"),
        "nothing": Selection(lambda record, text: False),
    }
    meta = {
        "format_version": FORMAT_VERSION,
        "dataset": "tiny",
        "builder_dir": "tiny/1.0.0",
        "image_size": SIZE,
        "tokenizer": "tokenizer.json",
        "splits": COUNTS,
        "selections": write_indices(builder, selections, COUNTS, folder),
        "fingerprint": packing._fingerprint(Path(builder.data_dir), folder),
    }
    (folder / "corpus.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    pack(path)
    return path


@pytest.fixture(scope="module")
def corpus(folder) -> Corpus:
    return Corpus.open(folder)


def stream(corpus, **changes):
    options: dict[str, Any] = {**OPTIONS, "template": "v1", "seed": 0, **changes}
    return train_iterator(corpus, "train", **options)


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_source_gives_text_as_str_and_images_as_png(corpus):
    source = corpus.source("validation")
    assert len(source) == 3
    record, expected = source[1], row("validation", 1)
    for name in ("labels", "look"):
        np.testing.assert_array_equal(record.pop(name), expected.pop(name))
    assert record == expected
    assert corpus.tokenizer().vocab_size > 259


def test_batches_have_fixed_shapes_and_types(corpus):
    expected = {
        "image": ((4, SIZE, SIZE), np.uint8),
        "tokens": ((4, 96), np.int32),
        "length": ((4,), np.int32),
        "truncated": ((4,), np.int32),
        "index": ((4,), np.int32),
        "weight": ((4,), np.float32),
        "targets": ((4, 48), np.int32),
        "target_positions": ((4, 48), np.int32),
        "target_weights": ((4, 48), np.float32),
    }
    for template in input_pipeline.TEMPLATES:
        fields = set(expected)
        if template == "text":
            fields -= {"image"}
        if template in ("prompt", "clip"):
            fields -= {"targets", "target_positions", "target_weights"}
        for batch in take(stream(corpus, template=template), 3):
            assert set(batch) == fields
            for key, value in batch.items():
                assert (value.shape, value.dtype) == expected[key], key


def rendered(tokenizer, template: str, record: dict, number: int) -> prompts.Example:
    impression = tokenizer.encode(record["impression"])
    question = record["question"]
    return {
        "text": lambda: (
            prompts.render_plain(tokenizer, record["findings"], impression)
            if number % 2
            else prompts.render_v1(tokenizer, question, record["findings"], impression)
        ),
        "plain": lambda: prompts.render_plain(tokenizer, record["findings"]),
        "v1": lambda: prompts.render_v1(tokenizer, question, record["findings"]),
        "prompt": lambda: prompts.render_v1(tokenizer, question, None),
        "clip": lambda: prompts.render_clip(tokenizer, record["findings"], 96),
    }[template]()


@pytest.mark.parametrize("template", input_pipeline.TEMPLATES)
def test_rows_are_the_rendered_records(corpus, template):
    tokenizer = corpus.tokenizer()
    rows = 0
    for batch in eval_batches(corpus, "validation", **OPTIONS, template=template):
        for i in np.flatnonzero(batch["weight"]):
            record = row("validation", int(batch["index"][i]))
            example = rendered(tokenizer, template, record, int(batch["index"][i]))
            length = batch["length"][i]
            assert batch["tokens"][i, :length].tolist() == example.ids
            assert (batch["tokens"][i, length:] == tokenizer.pad_id).all()
            assert (batch["tokens"][i] == prompts.IMAGE_ID).sum() == (template in ("plain", "v1", "prompt"))
            if "image" in batch:
                expected = images.centre_crop(images.decode_png(record["image"]), SIZE)
                np.testing.assert_array_equal(batch["image"][i], expected)
            if "targets" in batch:
                real = batch["target_weights"][i] == 1
                places = batch["target_positions"][i][real] + 1
                assert places.tolist() == [j for j, label in enumerate(example.labels) if label != prompts.NO_LOSS]
                assert batch["targets"][i][real].tolist() == batch["tokens"][i, places].tolist()
                assert not batch["target_weights"][i][~real].any()
            assert not batch["truncated"][i]
            rows += 1
    assert rows == 3


def test_long_text_is_cut_after_the_prompt_and_flagged(corpus):
    tokenizer = corpus.tokenizer()
    (whole,) = eval_batches(corpus, "validation", **OPTIONS, template="v1", limit=1)
    prompt = whole["length"][0] - int(whole["target_weights"][0].sum())
    assert prompt > 40
    assert not whole["truncated"].any()

    (cut,) = eval_batches(corpus, "validation", **{**OPTIONS, "text_length": int(prompt) + 3}, template="v1", limit=1)
    assert cut["truncated"][0] == 1
    assert cut["weight"][0] == 1
    np.testing.assert_array_equal(cut["tokens"][0], whole["tokens"][0, : prompt + 3])
    assert cut["target_weights"][0].sum() == 3
    assert tokenizer.eos_id not in cut["targets"][0, :3]

    (few,) = eval_batches(corpus, "validation", **{**OPTIONS, "target_length": 2}, template="v1", limit=1)
    assert few["truncated"][0] == 1
    assert few["target_weights"][0].tolist() == [1, 1]
    np.testing.assert_array_equal(few["tokens"], whole["tokens"])

    (clip,) = eval_batches(corpus, "validation", **{**OPTIONS, "text_length": 6}, template="clip", limit=1)
    assert clip["truncated"][0] == 1
    assert clip["length"][0] == 6
    assert clip["tokens"][0, -1] == tokenizer.eos_id


def test_a_prompt_that_does_not_fit_makes_a_row_of_no_weight(corpus):
    shortest = len(prompts.render_v1(corpus.tokenizer(), prompts.question(None), "").ids)
    options: dict[str, Any] = {**OPTIONS, "text_length": shortest}
    for template in ("v1", "prompt"):
        (batch,) = eval_batches(corpus, "validation", **options, template=template)
        # Record 0 has no indication, the others one of four words.
        assert batch["weight"].tolist() == [1, 0, 0, 0]
        assert batch["truncated"].tolist()[1:3] == [1, 1]
        if template == "v1":
            assert not batch["target_weights"][1:].any()


def test_each_record_once_per_epoch_in_a_new_order(corpus):
    iterator = stream(corpus, batch_size=7)
    epochs = [np.concatenate([batch["index"] for batch in take(iterator, 3)]).tolist() for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(21))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = take(stream(corpus, batch_size=7, seed=1), 3)
    assert np.concatenate([batch["index"] for batch in other]).tolist() != epochs[0]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(corpus, count):
    alone = take(stream(corpus, batch_size=8), 6)
    parts = [take(stream(corpus, batch_size=8, process_index=i, process_count=count), 6) for i in range(count)]
    for step, batch in enumerate(alone):
        for key, value in batch.items():
            for i in range(count):
                np.testing.assert_array_equal(parts[i][step][key], value[i::count], err_msg=key)


def test_a_restored_stream_continues_exactly(corpus):
    iterator = stream(corpus, batch_size=4)
    take(iterator, 7)  # into the second epoch
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"global_next_index": 28}
    following = take(iterator, 5)

    fresh = stream(corpus, batch_size=4, num_threads=0)
    fresh.set_state(state)
    for one, other in zip(take(fresh, 5), following, strict=True):
        same(one, other)
    halves = [stream(corpus, batch_size=4, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.set_state(state)
    for batch in following:
        for i, half in enumerate(halves):
            np.testing.assert_array_equal(next(half)["index"], batch["index"][i::2])
    iterator.set_state(state)  # back, in the same iterator
    same(next(iterator), following[0])


def test_random_crop_depends_on_seed_epoch_and_record_alone(corpus):
    """Whatever process reads it, wherever in the order it comes, and after a restart."""

    def crops(iterator, steps):
        batches = take(iterator, steps)
        return [dict(zip(b["index"].tolist(), b["image"], strict=True)) for b in batches]

    options = {"template": "clip", "text_length": 24, "batch_size": 7, "crop": "random"}
    batches = crops(stream(corpus, **options), 9)
    epochs = [{n: image for batch in batches[e * 3 : e * 3 + 3] for n, image in batch.items()} for e in range(3)]
    source = corpus.source("train")
    for epoch, found in enumerate(epochs):
        assert sorted(found) == list(range(21))
        for number, image in found.items():
            if number == CORRUPT:
                assert not image.any()
                continue
            rng = np.random.default_rng([0, epoch, number])
            expected = images.random_crop(images.decode_png(source[number]["image"]), SIZE, rng)
            np.testing.assert_array_equal(image, expected)
    assert any((epochs[0][n] != epochs[1][n]).any() for n in range(21))
    halves = [stream(corpus, **{**options, "batch_size": 14, "process_index": i, "process_count": 2}) for i in range(2)]
    for half in halves:
        half.set_state({"global_next_index": 28})
        (found,) = crops(half, 1)
        for place, (number, image) in enumerate(found.items()):
            epoch = (28 + 2 * place) // 21
            if number != CORRUPT:
                np.testing.assert_array_equal(image, epochs[epoch][number])


def test_unknown_crop(corpus):
    with pytest.raises(UserError, match=r"config\.data\.crop='middle' is unknown, there are centre, random"):
        stream(corpus, crop="middle")


def test_eval_batches_in_another_order(corpus):
    order = np.array([3, 0, 9])
    lengths = input_pipeline.prompt_lengths(corpus, "train", "all", order)
    options = {**OPTIONS, "batch_size": 2}
    batches = list(eval_batches(corpus, "train", **options, template="prompt", order=order))
    assert [batch["index"].tolist() for batch in batches] == [[3, 0], [9, -1]]
    assert np.concatenate([batch["length"] for batch in batches]).tolist()[:3] == lengths.tolist()


def test_a_corrupt_image_is_a_row_of_no_weight(corpus):
    seen = {}
    for batch in eval_batches(corpus, "train", **OPTIONS, template="plain"):
        for i, number in enumerate(batch["index"].tolist()):
            seen[number] = batch["weight"][i]
            assert batch["target_weights"][i].any() == bool(batch["weight"][i])
            if number == CORRUPT:
                assert not batch["image"][i].any()
                assert prompts.IMAGE_ID in batch["tokens"][i]
    assert [number for number, weight in seen.items() if weight == 0 and number >= 0] == [CORRUPT]
    # Text pretraining never looks at the image.
    text = list(eval_batches(corpus, "train", **OPTIONS, template="text"))
    assert sum(batch["weight"].sum() for batch in text) == 21


def test_a_selection_has_its_own_rows(corpus):
    kept = [number for number in range(21) if number not in LATERALS]
    options: dict[str, Any] = {**OPTIONS, "selection": "frontal"}
    batches = list(eval_batches(corpus, "train", **options, template="plain"))
    numbers = np.concatenate([batch["index"] for batch in batches])
    assert numbers[numbers >= 0].tolist() == list(range(len(kept)))
    source = corpus.source("train", "frontal")
    assert [source[number]["id"] for number in range(len(source))] == [f"train-{number}" for number in kept]
    trained = take(stream(corpus, selection="frontal", batch_size=6), 3)
    assert sorted(np.concatenate([batch["index"] for batch in trained])) == list(range(len(kept)))


def test_one_film_with_two_texts_is_two_rows(corpus):
    source = corpus.source("train", "both")
    assert len(source) == 22 and corpus.splits["train"] == 21
    first, second = source[TWICE], source[TWICE + 1]
    assert (first["id"], second["id"]) == ("train-2", "train-2~llm")
    assert (first["method"], second["method"]) == METHODS
    assert first["image"] == second["image"] and first["findings"] != second["findings"]
    iterator = stream(corpus, selection="both", batch_size=11)
    assert sorted(np.concatenate([batch["index"] for batch in take(iterator, 2)])) == list(range(22))


def test_a_selection_says_what_is_asked(corpus):
    number = TWICE + 1
    assert corpus.source("train", "all")[1]["question"].endswith("indication: Cough for 1 days")
    assert corpus.source("train", "both")[number]["question"] == "What is there?"
    asked = corpus.source("train", "views")[number]["question"]
    assert asked == "Given the chest X-ray image from LATERAL view, describe the findings in the image: "
    assert "from Unknown view" in prompts.view_question("")


def test_the_same_rows_without_indication(corpus):
    """Whatever the selection asks, and as data of its own."""
    plain = prompts.question(None)
    for selection in ("all", "both", "views"):
        usual, without = (corpus.source("train", selection + end) for end in ("", ".without_indication"))
        assert [without[n]["id"] for n in range(len(without))] == [usual[n]["id"] for n in range(len(usual))]
        assert {without[n]["question"] for n in range(len(without))} == {plain}
        assert usual[1]["question"] != plain
    rows, other = (corpus.identity("train", name) for name in ("all", "all.without_indication"))
    assert rows["rows"] == other["rows"] and rows["fingerprint"] != other["fingerprint"]
    with pytest.raises(UserError, match="no selection 'none'"):
        corpus.source("train", "none.without_indication")


def test_the_training_set_is_known_by_length_and_hash(corpus):
    frontal, both = corpus.identity("train", "frontal"), corpus.identity("train", "both")
    assert (frontal["rows"], both["rows"]) == (18, 22)
    assert frontal["fingerprint"].startswith("18-") and both["fingerprint"].startswith("22-")
    assert frontal == corpus.identity("train", "frontal")
    assert (
        frontal["fingerprint"]
        != Corpus(corpus.path, corpus.meta | {"fingerprint": "x"}).identity("train", "frontal")["fingerprint"]
    )


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_is_in_order_and_padded(corpus, count):
    options: dict[str, Any] = {**OPTIONS, "batch_size": 8, "template": "v1"}
    parts = [list(eval_batches(corpus, "train", **options, process_index=i, process_count=count)) for i in range(count)]
    assert {len(part) for part in parts} == {3}
    joined = np.full(24, -2)
    weights = np.zeros(24)
    for i, part in enumerate(parts):
        joined[i::count] = np.concatenate([batch["index"] for batch in part])
        weights[i::count] = np.concatenate([batch["weight"] for batch in part])
    assert joined.tolist() == [*range(21), -1, -1, -1]
    assert weights.tolist() == [float(n != CORRUPT and n >= 0) for n in joined]
    limited = list(eval_batches(corpus, "train", **options, limit=9))
    assert np.concatenate([batch["index"] for batch in limited]).tolist() == [*range(9), *[-1] * 7]


def test_padding_has_no_weight_in_any_template(corpus):
    for template in input_pipeline.TEMPLATES:
        (batch,) = eval_batches(corpus, "validation", **OPTIONS, template=template)
        assert batch["index"].tolist() == [0, 1, 2, -1]
        assert batch["weight"].tolist() == [1, 1, 1, 0]


def test_user_errors(corpus, folder, tmp_path):
    def refused(message: str, **changes):
        with pytest.raises(UserError, match=message):
            stream(corpus, **changes)

    refused("packed for images of 32 pixels", image_size=64)
    refused("cannot be shared by 3 processes", process_count=3)
    refused("text_length=20 is too short", text_length=20)
    with pytest.raises(UserError, match="no split 'dev', there are train, validation"):
        corpus.source("dev")
    with pytest.raises(UserError, match="no selection 'lateral', there are all, all"):
        corpus.source("train", "lateral")
    with pytest.raises(UserError, match="the selection 'nothing' has no rows in the split 'train'"):
        corpus.source("train", "nothing")
    with pytest.raises(UserError, match="no packed corpus here"):
        Corpus.open(tmp_path)

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    meta = json.loads((copy / "corpus.json").read_text())
    for changes, message in (
        ({"format_version": 99}, "format_version 99"),
        ({"splits": {"train": 20}}, "counts 20 train records"),
        ({"builder_dir": "elsewhere"}, "no readable dataset"),
    ):
        (copy / "corpus.json").write_text(json.dumps({**meta, **changes}))
        with pytest.raises(UserError, match=message):
            Corpus.open(copy)
    (copy / "corpus.json").write_text(json.dumps({key: meta[key] for key in meta if key != "selections"}))
    with pytest.raises(UserError, match="has no selections, pack the corpus again"):
        Corpus.open(copy)
    (copy / "corpus.json").write_text(json.dumps(meta))
    index = copy / "index" / "all-train.npy"
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"all-train\.npy: this index of the corpus is damaged"):
        Corpus.open(copy).source("train")
    index.unlink()
    with pytest.raises(UserError, match=r"all-train\.npy: this index of the corpus is missing"):
        Corpus.open(copy).source("train")
    (copy / "shards.json").write_text('{"tiny": {"bytes": 1}}')
    with pytest.raises(UserError, match=r"shards\.json: this list of the corpus's shards is damaged"):
        Corpus.open(copy)
    (copy / "shards.json").unlink()
    with pytest.raises(UserError, match=r"shards\.json: this list of the corpus's shards is missing"):
        Corpus.open(copy)
    (copy / "corpus.json").write_text("{")
    with pytest.raises(UserError, match=r"corpus\.json: damaged"):
        Corpus.open(copy)


def test_missing_and_damaged_shards_are_found(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = sorted(copy.glob("tiny/1.0.0/*train*"))[0]
    whole = shard.read_bytes()

    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{shard.name}: this shard of the corpus is damaged"):
        Corpus.open(copy)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: this shard of the corpus is missing"):
        Corpus.open(copy)
    # Damage inside a record shows only when that record is read: a row of no weight, which the loop counts.
    data = bytearray(whole)
    place = whole.index(b"Cough for")
    data[place : place + 4] = b"XXXX"
    shard.write_bytes(data)
    options: dict[str, Any] = {**OPTIONS, "template": "text"}
    damaged = Corpus.open(copy)
    weights = np.concatenate(
        [batch["weight"][batch["index"] >= 0] for batch in eval_batches(damaged, "train", **options)]
    )
    lost = np.flatnonzero(weights == 0)
    assert len(weights) == 21 and 1 <= len(lost) <= 3
    with pytest.raises(UserError, match=r"of the train split of .* is damaged"):
        damaged.source("train")[int(lost[0])]


def test_reading_needs_neither_tensorflow_nor_torch(folder):
    script = """
import sys
from rad_jax.corpus import Corpus
from rad_jax.input_pipeline import train_iterator
corpus = Corpus.open(sys.argv[1])
next(train_iterator(corpus, "train", template="v1", batch_size=4, text_length=96, target_length=48, image_size=32,
                    seed=0, selection="frontal"))
print([name for name in ("tensorflow", "torch") if name in sys.modules])
"""
    root = Path(input_pipeline.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
