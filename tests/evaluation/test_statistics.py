"""The bootstrap against the closed form and against itself.

Not offered, so not here: Benjamini-Hochberg, the Wilcoxon and paired t tests, the basic bootstrap interval.
"""

import numpy as np
import pytest

from evaluation import statistics
from evaluation.metric import mean, mean_rows


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


def test_medians_are_of_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's median of the values written out as often as the rows are drawn; blocks of one draw make the same ones."""
    rng = np.random.default_rng(0)
    values, clusters = rng.integers(1, 6, 30).astype(float), rng.integers(0, 9, 30).tolist()
    drawn = statistics.resample(np.eye(30), clusters, draws=50).astype(int)  # how often each is in it
    expected = [np.median(np.repeat(values, weights)) for weights in drawn]
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(statistics.resample_median(values, clusters, draws=50), expected)
    monkeypatch.setattr(statistics, "_BLOCK_ELEMENTS", 30)
    np.testing.assert_array_equal(statistics.resample_median(values, clusters, draws=50), expected)


def test_same_seed_same_draws() -> None:
    rows = np.arange(10.0)[:, None]
    first, again = (statistics.resample(rows, range(10), draws=50) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, statistics.resample(rows, range(10), draws=50, seed=1))


def test_nothing_counted_has_no_interval() -> None:
    assert statistics.percentile_interval(np.full(5, np.nan)) is None
    assert statistics.resample(np.zeros((0, 3)), [], draws=4).shape == (4, 3)


# Ten made-up scores of two systems; the values beside them are SciPy 1.17's.
A = np.array([0.31, 0.42, 0.18, 0.55, 0.27, 0.60, 0.33, 0.48, 0.22, 0.39])
B = np.array([0.28, 0.47, 0.25, 0.58, 0.36, 0.57, 0.41, 0.52, 0.30, 0.38])


def test_bootstrap_intervals_of_scipy() -> None:
    """scipy.stats.bootstrap of the mean difference, 9,999 resamples, generator seed 0."""
    rows = mean_rows(B - A)
    samples = mean(statistics.resample(rows, range(10), draws=9999, seed=0))
    assert statistics.percentile_interval(samples) == pytest.approx((0.009, 0.063), abs=1e-9)
    left_out = statistics.leave_one_out(rows, range(10), mean)
    assert statistics.bca_interval(samples, 0.037, left_out) == pytest.approx((0.007, 0.062), abs=1e-9)


def test_bootstrap_draws_of_numpy() -> None:
    """default_rng(12345).choice, 1,000 x 10."""
    samples = mean(statistics.resample(mean_rows(B - A), range(10), draws=1000, seed=12345))
    np.testing.assert_allclose(np.percentile(samples, [2.5, 50, 97.5]), [0.009975, 0.037, 0.064], atol=1e-9)


def test_exact_sign_flip() -> None:
    """All 1,024 ways; scipy.stats.permutation_test agrees."""
    swapped = statistics.randomise(mean_rows(A), mean_rows(B), range(10))
    test = statistics.significance(mean(swapped.second) - mean(swapped.first), 0.037, swapped)
    assert test == statistics.Significance(p=44 / 1024, p_min=2 / 1024, exact=True)


def test_random_swaps_come_near_the_exact_p_and_never_reach_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "EXACT", 0)
    swapped = statistics.randomise(mean_rows(A), mean_rows(B), range(10), trials=20_000)
    test = statistics.significance(mean(swapped.second) - mean(swapped.first), 0.037, swapped)
    # Standard error of the share 0.043 over 20,000 trials is 0.0014; four of them.
    assert test.p == pytest.approx(44 / 1024, abs=0.006) and not test.exact
    first = mean_rows(np.tile(A, 4))
    far = statistics.randomise(first, first + np.array([10.0, 0.0]), range(40), trials=100)
    sure = statistics.significance(mean(far.second) - mean(far.first), 10.0, far)
    assert sure.p == sure.p_min == 1 / 101


def test_patients_are_swapped_whole() -> None:
    """Two patients allow four ways, so nothing below a half can come out, however many studies they have."""
    swapped = statistics.randomise(mean_rows(A), mean_rows(A + 1), ["a"] * 5 + ["b"] * 5)
    test = statistics.significance(mean(swapped.second) - mean(swapped.first), 1.0, swapped)
    assert (test.p, test.p_min) == (0.5, 0.5)


def test_equal_systems_have_p_one() -> None:
    swapped = statistics.randomise(mean_rows(A), mean_rows(A), range(10))
    assert statistics.significance(mean(swapped.second) - mean(swapped.first), 0.0, swapped).p == 1.0
    assert statistics.significance(np.array([1.0]), float("nan"), swapped).p == 1.0


def test_swaps_that_leave_nothing_to_count_are_no_evidence() -> None:
    """A rate that two reports of each system have: swaps that move all of a system's cases away have none, and count against the difference."""
    first = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    second = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    swapped = statistics.randomise(first, second, range(4))
    differences = mean(swapped.second) - mean(swapped.first)
    # Of 16 ways two put all four cases on one side, so that the other has no rate, and two are as far apart as what is seen.
    undefined = int(np.isnan(differences).sum())
    extreme = int((np.abs(differences) >= 1.0).sum())
    assert (undefined, extreme) == (2, 2)
    assert statistics.significance(differences, 1.0, swapped).p == (undefined + extreme) / 16


def test_holm() -> None:
    adjusted = statistics.holm([0.001, 0.012, 0.02, 0.04, 0.30])
    np.testing.assert_allclose(adjusted, [0.005, 0.048, 0.06, 0.08, 0.30])
    np.testing.assert_allclose(statistics.holm([0.30, 0.001]), [0.30, 0.002])
    assert statistics.holm([]) == []


def test_bca_falls_back_where_it_is_not_defined() -> None:
    samples = np.array([1.0, 2.0, 3.0])
    assert statistics.bca_interval(samples, 9.0, np.array([8.0, 9.0])) == statistics.percentile_interval(samples)
    assert statistics.bca_interval(samples, 2.0, np.array([2.0, 2.0])) == statistics.percentile_interval(samples)
    assert statistics.bca_interval(np.full(3, np.nan), 2.0, np.array([1.0, 2.0])) is None


def test_bca_of_a_skewed_statistic_is_scipys() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).exponential(size=40)
    found = bootstrap((values,), np.var, n_resamples=5000, method="BCa", rng=np.random.default_rng(7), vectorized=True)

    def variance(totals: np.ndarray) -> np.ndarray:
        return totals[:, 1] / totals[:, 2] - (totals[:, 0] / totals[:, 2]) ** 2

    rows = np.stack([values, values**2, np.ones(40)], axis=1)
    samples = variance(statistics.resample(rows, range(40), draws=5000, seed=7))
    ours = statistics.bca_interval(samples, float(values.var()), statistics.leave_one_out(rows, range(40), variance))
    assert ours == pytest.approx(tuple(found.confidence_interval), rel=1e-6)


def test_widths() -> None:
    assert statistics.half_width((0.25, 0.75)) == 0.25
    assert statistics.half_width(None) is None
