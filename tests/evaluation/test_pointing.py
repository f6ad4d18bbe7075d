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
