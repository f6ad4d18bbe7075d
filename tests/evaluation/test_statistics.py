"""The bootstrap against the closed form and against itself."""

import numpy as np
import pytest

from evaluation import statistics


def test_clusters_are_summed() -> None:
    rows = np.array([[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(statistics.sum_by_cluster(rows, ["b", "a", "b"]), [[6, 8], [3, 4]])
    with pytest.raises(ValueError, match="3 rows but 2"):
        statistics.sum_by_cluster(rows, ["a", "b"])


def test_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(size=400)
    rows = np.stack([values, np.ones(400)], axis=1)
    samples = statistics.resample(rows, range(400))
    interval = statistics.percentile_interval(samples[:, 0] / samples[:, 1])
    assert interval is not None
    half = 1.96 * values.std() / 20
    # 2,000 draws give each end to a few percent of the half width; 15% is five times that.
    np.testing.assert_allclose(interval, [values.mean() - half, values.mean() + half], atol=0.15 * half)


def test_blocks_do_not_change_the_number_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.ones((7, 1))
    monkeypatch.setattr(statistics, "_BLOCK_ELEMENTS", 21)
    samples = statistics.resample(rows, range(7), draws=100)
    assert samples.shape == (100, 1)
    np.testing.assert_array_equal(samples, 7)


def test_same_seed_same_draws() -> None:
    rows = np.arange(10.0)[:, None]
    first, again = (statistics.resample(rows, range(10), draws=50) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, statistics.resample(rows, range(10), draws=50, seed=1))


def test_nothing_counted_has_no_interval() -> None:
    assert statistics.percentile_interval(np.full(5, np.nan)) is None
    assert statistics.resample(np.zeros((0, 3)), [], draws=4).shape == (4, 3)
