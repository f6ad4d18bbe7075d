"""Phrases on films: regions go the way of the pixels, and nothing is chosen on the patients it is scored on."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import heads, phrases
from evaluation.phrases import Region
from rad_jax import images
from rad_jax.errors import UserError


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A wide film, a tall one, one mask, and a file of boxes with every kind of fault."""
    rng = np.random.default_rng(0)
    for name, shape in (("wide.png", (60, 100)), ("tall.png", (90, 45))):
        (tmp_path / name).write_bytes(images.encode_png(rng.integers(0, 256, shape).astype(np.uint8)))
    drawn = np.zeros((10, 20), np.uint8)
    drawn[:, :5] = 200
    (tmp_path / "mask.png").write_bytes(images.encode_png(drawn))
    (tmp_path / "broken.png").write_bytes(b"no")
    rows = [
        ("wide.png", "heart", 30, 10, 20, 30, "", ""),
        ("wide.png", "heart", 60, 10, 10, 10, "", ""),
        ("wide.png", "edge", 0, 0, 10, 60, "", ""),
        ("wide.png", "opacity", 40, 20, 20, 10, "", "mask.png"),
        ("tall.png", "lung", -5, 30, 25, 30, "45", ""),
        ("tall.png", "all", 0, 0, 45, 90, "", ""),
        ("tall.png", "odd", "x", 0, 45, 90, "", ""),
        ("tall.png", "other film", 0, 0, 5, 5, "46", ""),
        ("tall.png", "lost mask", 0, 0, 5, 5, "", "nothing.png"),
        ("broken.png", "heart", 0, 0, 5, 5, "", ""),
    ]
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*phrases.COLUMNS, "img_w", "mask"])
        writer.writerows(rows)
    return tmp_path / "boxes.csv"


def test_regions_go_the_way_of_the_film(films: Path) -> None:
    """A white box painted on a black film, through the film's own resize and crop, is the mask (but for pixels on its edge)."""
    found = phrases.read(films, 30, {"wide.png": "p1"})
    kept = {(region.film, region.phrase): region for region in found.kept}
    assert set(kept) == {("wide.png", "heart"), ("wide.png", "opacity"), ("tall.png", "lung")}
    assert kept["wide.png", "heart"].patient == "p1" and kept["tall.png", "lung"].patient == "tall.png"
    painted = {
        ("wide.png", "heart"): ((60, 100), [(slice(10, 40), slice(30, 50)), (slice(10, 20), slice(60, 70))]),
        ("wide.png", "opacity"): ((60, 100), [(slice(20, 30), slice(40, 45))]),
        ("tall.png", "lung"): ((90, 45), [(slice(30, 60), slice(0, 20))]),
    }
    for key, (shape, parts) in painted.items():
        film = np.zeros(shape, np.uint8)
        for part in parts:
            film[part] = 255
        square = images.centre_crop(images.resize_short(film, 30), 30)
        mask = kept[key].mask
        assert (square[mask] > 100).all() and (square[~mask] < 155).all(), key
        assert images.decode_png(kept[key].image).shape == (30, 30)
    assert set(found.skipped) == {
        ("wide.png", "edge", "outside the crop"),
        ("tall.png", "all", "covers the whole crop"),
        ("tall.png", "odd", "unreadable box or mask"),
        ("tall.png", "other film", "unreadable box or mask"),
        ("tall.png", "lost mask", "unreadable box or mask"),
        ("broken.png", "heart", "unreadable image"),
    }


@pytest.mark.parametrize("shape", [(60, 100), (90, 45), (32, 32), (33, 71)])
def test_boxes_and_masks_move_alike(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        x0, y0 = int(rng.integers(0, shape[1] - 9)), int(rng.integers(0, shape[0] - 9))
        x1, y1 = int(rng.integers(x0 + 8, shape[1])), int(rng.integers(y0 + 8, shape[0]))
        mask = np.zeros(shape, bool)
        mask[y0:y1, x0:x1] = True
        seen = images.mask_seen(mask, 32)
        moved = images.boxes_seen([[x0, y0, x1, y1]], shape, 32)
        if not moved:
            assert seen.sum() <= 32  # at most a row of pixels that the edge cuts
            continue
        ((a, b, c, d),) = moved
        y, x = np.nonzero(seen)
        if len(y):
            np.testing.assert_allclose([x.min(), y.min(), x.max() + 1, y.max() + 1], [a, b, c, d], atol=1.0)
    assert images.boxes_seen([[-5, -5, 200, 200]], shape, 32) == [[0, 0, 32, 32]]


def regions(count: int) -> list[Region]:
    """Two phrases of every patient, in the left and in the right half."""
    left = np.zeros((8, 8), bool)
    left[:, :4] = True
    return [Region(f"{i}.png", f"p{i}", phrase, b"", left ^ (phrase == "b")) for i in range(count) for phrase in "ab"]


def test_chosen_on_other_patients_than_scored() -> None:
    """A head that is right on the patients who choose and wrong on the others wins the choice, and its score says what it is worth."""
    known = regions(20)
    held = phrases.validation_patients([region.patient for region in known])
    assert len(held) == 6 and held == phrases.validation_patients([region.patient for region in reversed(known)])
    maps = np.random.default_rng(0).random((40, 2, 2, 8, 8))
    for map_, region in zip(maps, known, strict=True):
        map_[1, 0] = region.mask ^ (region.patient not in held)
    on = [i for i, region in enumerate(known) if region.patient in held]
    rest = [i for i in range(40) if i not in on]
    chosen = heads.choose(maps[on], [known[i].mask for i in on], [(0, 0), (0, 1), (1, 0), (1, 1)])
    assert (chosen.chosen, chosen.share) == (((1, 0),), 1.0)
    found = phrases.scores(list(chosen.read(maps[rest])), [known[i] for i in rest])
    assert (found["accuracy"]["value"], found["n"], found["patients"]) == (0.0, 28, 14)
    assert found["above_chance"]["value"] == -0.5 and found["mass"]["value"] == 0.0


def test_scores_and_their_control() -> None:
    known = regions(12)
    exact = phrases.scores([region.mask.astype(float) for region in known], known)
    assert exact["accuracy"] == {"value": 1.0, "ci": (1.0, 1.0)}
    assert exact["mean_iou"]["value"] == exact["mass"]["value"] == 1.0
    assert exact["contrast"] is None  # no noise: the ratio is not defined
    assert set(exact["phrases"]) == {"a", "b"} and exact["phrases"]["a"]["n"] == 12
    assert exact["shuffled"]["shuffled_accuracy"] == 1.0  # the same half in every patient: place alone is enough
    noise = phrases.scores(list(np.random.default_rng(3).random((24, 8, 8))), known)
    low, high = noise["above_chance"]["ci"]
    assert low < 0 < high and noise["chance"]["value"] == 0.5
    flat = phrases.scores([np.ones((8, 8))] * 24, known)
    assert flat["accuracy"]["value"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no boxes at"),
        (lambda path: path.write_text("image,phrase\n"), "no column 'x'"),
        (lambda path: path.write_text("image,phrase,x,y,w,h\nno.png,heart,0,0,1,1\n"), "none of its 1 phrases"),
        (lambda path: path.write_text("image,phrase,x,y,w,h\n"), "none of its 0 phrases"),
    ],
)
def test_unusable_boxes(films: Path, change: Any, message: str) -> None:
    change(films)
    with pytest.raises(UserError, match=message):
        phrases.read(films, 30, {})


def test_patients(tmp_path: Path) -> None:
    assert phrases.read_patients(None) == {}
    (tmp_path / "p.csv").write_text("image,patient,x\na.png,p1,\nb.png,,\n")
    assert phrases.read_patients(tmp_path / "p.csv") == {"a.png": "p1"}
    (tmp_path / "q.csv").write_text("image\n")
    for name, message in (("q.csv", "needs the columns"), ("r.csv", "no patients at")):
        with pytest.raises(UserError, match=message):
            phrases.read_patients(tmp_path / name)
    with pytest.raises(UserError, match="two or more"):
        phrases.validation_patients(["a", "a"])
