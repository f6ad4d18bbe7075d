"""Choice of heads on made-up maps of which it is known what they show."""

import numpy as np

from evaluation import heads


def drawn(n: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Maps [n, 2, 2, 4, 4] and masks: head (0, 0) looks at one corner always and a little at the truth; (0, 1) and (1, 0) each at a truth
    that noise hides half of the time; (1, 1) is noise."""
    rng = np.random.default_rng(seed)
    places = rng.integers(0, 16, n)
    truth = np.eye(16)[places].reshape(n, 4, 4)
    maps = rng.random((n, 2, 2, 4, 4))
    maps[:, 0, 0] = 0.1 * truth
    maps[:, 0, 0, 0, 0] += 5
    maps[:, 0, 1] += 0.7 * truth
    maps[:, 1, 0] += 0.7 * truth
    return maps, [mask > 0 for mask in truth]


EVERY = [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_what_a_head_always_looks_at_is_left_out() -> None:
    maps, masks = drawn(200, 0)
    found = heads.choose(maps, masks, EVERY)
    assert found.chosen == ((0, 0),) and found.share == 1.0  # never the largest cell, yet the only one that moves
    later, truth = drawn(50, 1)
    read = found.read(later)
    assert read.shape == (50, 4, 4)
    assert all(mask[np.unravel_index(map_.argmax(), (4, 4))] for map_, mask in zip(read, truth, strict=True))


def test_heads_that_agree_are_averaged() -> None:
    """Two noisy heads together hit more than either, and the one of noise alone is not taken in."""
    maps, masks = drawn(400, 2)
    alone = [heads.choose(maps, masks, [one]).share for one in EVERY[1:]]
    found = heads.choose(maps, masks, EVERY[1:])
    assert set(found.chosen) == {(0, 1), (1, 0)} and found.share > max(alone) + 0.05
    np.testing.assert_allclose(found.mean, (maps[:, 0, 1] + maps[:, 1, 0]).mean(0) / 2)


def test_heads_are_weighted_where_that_points_better() -> None:
    """One looks at the truth and, a little more, at a second place, which another one looks at alone: their difference shows the truth."""
    rng = np.random.default_rng(3)
    truth, other = (np.eye(16)[rng.integers(0, 16, 300)].reshape(300, 4, 4) for _ in range(2))
    maps = 0.2 * rng.random((300, 2, 2, 4, 4))
    maps[:, 0, 0] += truth + 1.2 * other
    maps[:, 1, 1] += other
    found = heads.choose(maps[:200], [mask > 0 for mask in truth[:200]], EVERY)
    assert not found.averaged and set(found.chosen[:2]) == {(0, 0), (1, 1)} and len(found.chosen) == 4
    assert found.weights[0, 0] > 0 > found.weights[1, 1] and found.share > 0.95
    read = found.read(maps[200:])
    hits = [mask[np.unravel_index(map_.argmax(), (4, 4))] > 0 for map_, mask in zip(read, truth[200:], strict=True)]
    assert np.mean(hits) > 0.95
    even = heads.choose(maps[:200], [mask > 0 for mask in truth[:200]], [(0, 0)])
    assert even.averaged and even.share < 0.5


def test_weights_are_those_of_ridge_regression() -> None:
    """Written out with numpy's least squares, on rows of one patch each, of maps scaled by their standard deviation."""
    maps, masks = drawn(60, 4)
    weights, strength = heads._fitted(maps, masks, EVERY)
    rows = (maps - maps.mean(0)).reshape(60, 4, 16).transpose(0, 2, 1).reshape(-1, 4)
    scale, wanted = rows.std(0), np.stack(masks).reshape(-1).astype(float)
    design = np.concatenate([rows / scale, np.sqrt(heads.RIDGE * len(rows)) * np.eye(4)])
    expected = np.linalg.lstsq(design, np.concatenate([wanted - wanted.mean(), np.zeros(4)]), rcond=None)[0]
    np.testing.assert_allclose(weights.ravel(), expected / scale, rtol=1e-4)
    np.testing.assert_allclose(strength.ravel(), np.abs(expected), rtol=1e-6)
