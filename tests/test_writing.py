"""Batches of like length, a file that outlives the run that writes it, and launch.generate with both."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from launch import generate
from rad_jax.errors import UserError
from rad_jax.writing import Unfinished, by_length

SETTINGS = {"checkpoint": "abc", "seed": 0}


@pytest.mark.parametrize(("count", "batch_size", "multiple"), [(1, 4, 8), (37, 4, 8), (40, 8, 16), (5, 64, 64)])
def test_every_row_once_in_batches_of_like_length(count, batch_size, multiple):
    lengths = np.random.default_rng(count).integers(1, 90, count)
    groups = list(by_length(lengths, batch_size, multiple))
    assert sorted(np.concatenate([places for _, places in groups]).tolist()) == list(range(count))
    padded = [length for length, _ in groups]
    assert padded == sorted(set(padded), reverse=True)
    assert padded[0] == min(-(-lengths.max() // multiple) * multiple, -(-lengths.max() // 8) * 8)
    for number, (length, places) in enumerate(groups):
        assert lengths[places].max() <= length
        assert len(places) % batch_size == 0 or number == len(groups) - 1
        assert length - lengths[places].max() < multiple
    order = np.concatenate([places for _, places in groups])
    assert (np.diff(lengths[order]) <= 0).all()


def test_nothing_to_write():
    assert list(by_length(np.array([], int), 4)) == []


def row(number):
    return {"id": f"s{number}", "prediction": "No \u2028 effusion.\nNormal."}


def test_rows_come_out_in_order(tmp_path):
    out = tmp_path / "deep" / "out.jsonl"
    file = Unfinished(out, SETTINGS)
    file.add({3: row(3), 0: row(0)})
    file.add({1: row(1), 2: row(2)})
    assert not out.exists()
    assert (tmp_path / "deep" / "out.jsonl.partial").stat().st_mode & 0o777 == 0o600
    file.finish(3)
    assert out.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line) for line in out.read_text().split("\n")[:-1]] == [row(0), row(1), row(2)]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("cut", [1, 30])
def test_killed_while_it_writes(tmp_path, cut):
    """Whole lines are kept, half a line is written again."""
    out = tmp_path / "out.jsonl"
    Unfinished(out, SETTINGS).add({5: row(5), 6: row(6)})
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-cut])
    again = Unfinished(out, SETTINGS)
    assert again.rows == {5: row(5)}
    again.add({6: row(6)})
    assert Unfinished(out, SETTINGS).rows == {5: row(5), 6: row(6)}
    again.finish(10)
    assert [json.loads(line)["id"] for line in out.read_text().split("\n")[:-1]] == ["s5", "s6"]


def test_killed_within_its_first_line(tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_bytes(b'{"check')
    file = Unfinished(out, SETTINGS)
    file.add({1: row(1)})
    assert Unfinished(out, SETTINGS).rows == {1: row(1)}


def test_file_of_other_settings(tmp_path):
    out = tmp_path / "out.jsonl"
    Unfinished(out, SETTINGS).add({1: row(1)})
    with pytest.raises(
        UserError, match=r"out\.jsonl\.partial was begun with other settings: remove it, or choose another --out"
    ):
        Unfinished(out, {**SETTINGS, "seed": 1})


@pytest.fixture(scope="module")
def options(chain, tiny_corpus):
    """Those of launch.generate, with changes; here are eight devices."""
    given = {
        "checkpoint": str(chain / "stage3"),
        "data": str(tiny_corpus),
        "split": "train",
        "limit": 13,
        "pixels": "real",
        "batch_size": 8,
        "fsdp": 1,
        "tensor": 1,
        "max_new_tokens": 6,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 3,
        "dtype": None,
        "attention": "xla",
        "selection": "all",
    }
    return lambda out, **changes: SimpleNamespace(**{**given, "out": str(out), **changes})


def written(options):
    generate.write(generate.Writer(options), options)
    with open(options.out) as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("temperature", "pixels"),
    [
        (1.0, "real"),
        pytest.param(1.0, "noise", marks=pytest.mark.slow),
        pytest.param(0.0, "shuffled", marks=pytest.mark.slow),
    ],
)
def test_killed_and_gone_on_with_on_another_mesh(options, tmp_path, tiny_corpus, monkeypatch, temperature, pixels):
    """The same texts, drawn or greedy, in the corpus's order, whatever the batches, the mesh, and where it was interrupted."""
    from rad_jax.corpus import Corpus

    source = Corpus.open(tiny_corpus).source("train")
    shown = {"temperature": temperature, "pixels": pixels}
    once = written(options(tmp_path / "once.jsonl", **shown))
    assert [row["id"] for row in once] == [source[number]["id"] for number in range(13)]
    assert [row["reference"] for row in once] == [source[number]["findings"] for number in range(13)]
    assert len({row["prediction"] for row in once}) > 1
    again = options(tmp_path / "again.jsonl", batch_size=4, fsdp=2, tensor=2, **shown)
    writer, left = generate.Writer(again), [2]
    first = writer._write

    def until_killed(batch):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return first(batch)

    monkeypatch.setattr(writer, "_write", until_killed)
    with pytest.raises(KeyboardInterrupt):
        generate.write(writer, again)
    partial = tmp_path / "again.jsonl.partial"
    assert len(partial.read_bytes().splitlines()) == 1 + 2 * 4
    assert written(again) == once
    assert not partial.exists()


def test_mesh_that_does_not_fit(options, tmp_path):
    assert jax.device_count() == 8
    with pytest.raises(UserError, match="--fsdp=3 x --tensor=1 does not divide the 8 devices here"):
        generate.Writer(options(tmp_path / "out", fsdp=3))
    with pytest.raises(UserError, match="--tensor=4 does not divide the model's 2 heads of keys and values"):
        generate.Writer(options(tmp_path / "out", tensor=4))
