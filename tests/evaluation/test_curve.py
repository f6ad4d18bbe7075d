import math
import xml.etree.ElementTree as ElementTree

import pytest

from evaluation import curve


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.93, 6.9, [2, 4, 6]),
        (0, 895, [0, 200, 400, 600, 800]),
        (3.0, 3.0, [3.0]),
        (-0.1, 0.11, [-0.1, -0.05, 0, 0.05, 0.1]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert curve.ticks(low, high) == pytest.approx(expected)


def test_gaps_where_the_loss_is_not_finite() -> None:
    points = [(0, 3.0), (10, 2.0), (20, math.nan), (30, 1.5), (40, math.inf), (50, 1.0)]
    root = ElementTree.fromstring(curve.svg(points, "loss <1> & more"))
    raw = next(path for path in root.iter("path") if path.get("class") == "raw")
    assert str(raw.get("d")).count("M") == 3
    assert root.get("aria-label") == "loss <1> & more"
    assert "nan" not in ElementTree.tostring(root, encoding="unicode")
    assert curve.last_finite(points[:5]) == (30, 1.5)
    assert curve.last_finite([(0, math.nan)]) is None


@pytest.mark.parametrize("points", [[(5, 2.0)], [(0, 1.0), (1, 1.0)], [(0, 0.0)]])
def test_one_point_or_a_flat_curve_still_draws(points: list[tuple[float, float]]) -> None:
    ElementTree.fromstring(curve.svg(points, "x"))


def test_the_running_mean_does_not_lag() -> None:
    import numpy as np

    line = np.linspace(5.0, 1.0, 101)
    np.testing.assert_allclose(curve._running_mean(line), line, atol=1e-9)


def test_long_curves_are_thinned() -> None:
    text = curve.svg([(i, 1.0 + 1 / (i + 1)) for i in range(50_000)], "x")
    assert len(text) < 20_000
