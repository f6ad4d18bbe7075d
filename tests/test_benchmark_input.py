"""The suite `input`: both sides see the same films, every row is there, and what a host must feed is worked out as it says."""

import functools
import io
import json
import textwrap

import numpy as np
import pytest
from PIL import Image

from data import shards
from launch.benchmarks import films, host
from rad_jax import prompts
from rad_jax.errors import UserError

# A peer of our own, for where the usual one is not at hand: the same contract, and a transform that can be made wrong.
PEER = """
import json, sys
import numpy as np, torch
from PIL import Image
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
def transform(image, size):
    image = image.convert("RGB")
    w, h = image.size
    s, l = sorted((w, h))
    image = image.resize((size, int(size * l / s)) if w <= h else (int(size * l / s), size), Image.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    x = np.array(image.crop((left, top, left + size, top + size)))
    return (torch.from_numpy(x).permute(2, 0, 1).float().div(255) - MEAN) / STD + WRONG
if __name__ == "__main__":
    assert any(flag.startswith("--items=") for flag in sys.argv)
    print(json.dumps({"images_per_s": 20.0, "cpu_ms_per_image": 100.0}))
"""


@pytest.fixture
def small(monkeypatch):
    for name, value in {"HEIGHT": 120, "WIDTH": 100, "SIZE": 56, "COPIES": 8, "OUR_ITEMS": 16, "TRANSFORMS": 2}.items():
        monkeypatch.setattr(films, name, value)


def peer(folder, wrong="0"):
    (folder / "peer.py").write_text(textwrap.dedent(PEER).replace("WRONG", wrong))
    prompts.train_tokenizer([("Cough.", "The lungs are clear.")] * 3, 512, folder / "tokenizer.json")
    return folder / "peer.py", folder / "tokenizer.json"


def test_sides_that_differ_are_refused(small, tmp_path):
    program, tokenizer = peer(tmp_path, "1e-6")
    with pytest.raises(UserError, match="make different pixels"):
        films.prepare(tmp_path / "work", tokenizer, program, count=2)


@pytest.mark.slow
def test_every_row(small, tmp_path, monkeypatch):
    program, tokenizer = peer(tmp_path)
    # The sides are processes of their own, in which the sizes above are the real ones.
    monkeypatch.setattr(films, "SIZE", 518)
    films.prepare(tmp_path / "work", tokenizer, program, count=2)
    rows, cpu = films.measure(tmp_path / "work", tmp_path / "work/corpus", 1, 1, program)
    assert [row["name"] for row in rows] == [*films.FLOORS]
    assert all(row["peer_s"] > 0 and row["ratio"] == row["peer_s"] / row["ours_s"] for row in rows)
    assert rows[0]["peer_s"] == 50.0 and rows[0]["peer_cpu_s_per_image"] == 0.1
    assert set(cpu) == set(host.FLOPS) and min(cpu.values()) > 0


def test_missing_peer(tmp_path):
    with pytest.raises(UserError, match="--peer"):
        films.run(tmp_path / "work", 1, 1, tmp_path / "none.py", tmp_path / "none.json")


def test_drawn_films_weigh_what_real_ones_do():
    data = films.draw(0)
    assert 1.3e6 < len(data) < 1.8e6  # MIMIC-CXR-JPG: 570 GB of 377,110 films
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (2544, 3056) and image.mode == "L"
        assert np.ptp(np.asarray(image)) > 100


def test_what_a_host_must_feed(tmp_path):
    rows = {row["name"]: row for row in host.demand({"stage 1": 4e-3, "stage 2": 4e-3, "stage 3": 1.0})}
    first = rows["stage 1, v5e-64 at 50% of peak"]
    # 64 chips of 197 TFLOP/s at a half, 1.05 TFLOP an image, 16 hosts: 6,000 images a second, 375 for each.
    assert first["images_per_s_per_host"] == pytest.approx(375, rel=0.01) and first["cores_needed"] == pytest.approx(
        1.5, rel=0.01
    )
    assert rows["stage 3, v5e-256 at 50% of peak"]["images_per_s_per_host"] == pytest.approx(8.8, rel=0.01)
    assert not any(row["bottleneck"] for row in rows.values())
    assert host.demand({"stage 1": 0.4, "stage 2": 0, "stage 3": 0})[0]["bottleneck"]
    file = tmp_path / "v5e-64.json"
    file.write_text(json.dumps({"topology": "v5e-64", "global_batch": 128, "predicted_step_s": 2.0, "chips": 64}))
    compiled = host.demand({"stage 1": 4e-3, "stage 2": 1e-3, "stage 3": 1e-3}, [file])[-1]
    assert compiled["images_per_s_per_host"] == 4.0 and compiled["cores_needed"] == 16e-3
    file.write_text("[]")
    with pytest.raises(UserError, match=r"v5e-64\.json"):
        host.demand({"stage 1": 1, "stage 2": 1, "stage 3": 1}, [file])


def test_cpu_of_writing_a_shard(small, tmp_path):
    from data import records

    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.png")
    film = records.Film(tmp_path / "a.png", "a", "a", "a", "PA", True, [records.text("Clear.")])
    make = functools.partial(records.make, size=8)
    task = shards.Task("train", tmp_path / "a.array_record", [film], make, records.serialise)
    assert films.cpu_of_writing(task) > 0
