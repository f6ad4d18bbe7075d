import numpy as np
import pytest

from evaluation import pointing


def peak(row: int, column: int) -> np.ndarray:
    out = np.zeros((4, 8))
    out[row, column] = 1.0
    return out


def test_hit_and_miss_in_pixels() -> None:
    # Cells of the map are 10 x 10 pixels of a 40 x 80 image; the centre of cell (1, 6) is at x 65, y 15.
    box = [60, 10, 70, 20]
    game = pointing.pointing_game([peak(1, 6), peak(1, 5), peak(2, 6)], [[box]] * 3, [(40, 80)] * 3)
    assert (game.hits, game.n, game.accuracy) == (1, 3, 1 / 3)
    assert game.chance == pytest.approx(100 / 3200)


def test_several_boxes_are_a_union() -> None:
    boxes = [[0, 0, 40, 40], [20, 0, 60, 40]]
    game = pointing.pointing_game([peak(0, 5)], [boxes], [(40, 80)])
    assert game.accuracy == 1.0
    assert game.chance == pytest.approx(60 / 80)


def test_a_flat_map_does_not_hit() -> None:
    assert not pointing.hit(np.ones((4, 4)), pointing.box_mask([[0, 0, 20, 20]], 40, 40))


def test_chance_is_what_random_maps_reach() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((2000, 8, 8))
    game = pointing.pointing_game(list(maps), [[[25, 25, 75, 75]]] * 2000, [(100, 100)] * 2000)
    assert game.chance == 0.25
    assert game.accuracy == pytest.approx(0.25, abs=0.04)  # four standard errors


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="covers no pixel"):
        pointing.box_mask([[200, 200, 220, 220]], 112, 112)
    with pytest.raises(ValueError, match="not finite"):
        pointing.hit(np.full((2, 2), np.nan), np.ones((4, 4), bool))
    empty = pointing.pointing_game([], [], [])
    assert (empty.accuracy, empty.chance, empty.n) == (None, None, 0)


def test_mass_contrast_and_overlap() -> None:
    """A made-up 4 x 4 map; its box is the two cells 0.8 and 0.6. The contrast has population variances."""
    attention = np.zeros((4, 4))
    attention[1, 1:3], attention[2, 1:3], attention[3, 3] = (0.8, 0.6), (0.4, 0.2), 0.1
    mask = np.zeros((4, 4), bool)
    mask[1, 1:3] = True
    score = pointing.map_score(attention, mask)
    assert score.contrast == pytest.approx(4.333333, abs=1e-6)
    assert score.mass == pytest.approx(0.666667, abs=1e-6)
    assert pointing.THRESHOLDS == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert score.iou == pytest.approx((0.5, 2 / 3, 2 / 3, 1, 1))
    assert score.mean_iou == pytest.approx(0.766667, abs=1e-6)
    assert pointing.hit(attention, mask)
    large = pointing.map_score(attention, np.kron(mask, np.ones((7, 7), bool)))
    assert (large.mass, *large.iou) == pytest.approx((score.mass, *score.iou))


def test_maps_and_masks_that_cannot_be_scored() -> None:
    mask = np.eye(2, dtype=bool)
    assert np.isnan(pointing.map_score(np.ones((2, 2)), mask).contrast)
    assert pointing.map_score(np.zeros((2, 2)), mask).mass == 0.0
    for attention, box in ((-np.ones((2, 2)), mask), (np.full((2, 2), np.nan), mask), (np.ones((2, 2)), mask | True)):
        with pytest.raises(ValueError, match=r"attention map|the boxes"):
            pointing.map_score(attention, box)


def point_at(row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """A map whose maximum is there, and the mask of that place."""
    attention = np.zeros((4, 4))
    attention[row, column] = 1.0
    return attention, attention > 0


def test_looking_beats_other_patients_maps() -> None:
    places = [(i % 4, i // 4 % 4) for i in range(32)]
    maps, masks = zip(*(point_at(*place) for place in places), strict=True)
    looks = pointing.against_shuffled(maps, masks, ["nodule"] * 32, list(range(32)))
    assert looks.accuracy == 1.0 and looks.n == 32
    assert looks.shuffled_accuracy is not None and looks.shuffled_accuracy < 0.3 and looks.p < 0.01


def test_knowing_the_usual_place_does_not() -> None:
    usual, mask = point_at(1, 1)
    knows = pointing.against_shuffled([usual] * 20, [mask] * 20, ["nodule"] * 20, list(range(20)))
    assert (knows.accuracy, knows.shuffled_accuracy, knows.p) == (1.0, 1.0, 1.0)


def test_partners_are_other_patients_with_the_same_finding() -> None:
    usual, mask = point_at(1, 1)
    alone = pointing.against_shuffled([usual] * 3, [mask] * 3, ["a", "a", "b"], ["p", "p", "q"])
    assert alone == pointing.Control(None, None, 0, 1.0, 1.0)
    two = pointing.against_shuffled([usual] * 3, [mask] * 3, ["a", "a", "b"], ["p", "r", "q"])
    assert (two.n, two.p_min) == (2, 0.5)
