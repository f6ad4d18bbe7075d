"""Batches of like length, and a file that outlives the run that writes it."""

import json

import numpy as np
import pytest

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
    file.finish(3)
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
