"""Slices by name."""

import pytest

from rad_jax import chips
from rad_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "count", "arrangement", "wrap"),
    [
        ("v5e-16", 16, "4x4", (False, False, False)),
        ("v5e-256", 256, "16x16", (True, True, False)),
        ("v6e-8", 8, "2x4", (False, False, False)),
        ("v5p-8", 4, "2x2x1", (False, False, False)),  # a size of v5p and v4 counts cores, two to a chip
        ("v4-32", 16, "2x2x4", (False, False, False)),
        ("v5p-128", 64, "4x4x4", (True, True, True)),
    ],
)
def test_slice(name, count, arrangement, wrap):
    found = chips.find(name)
    assert (found.chips, found.arrangement, found.wrap) == (count, arrangement, wrap)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-8", "topology 'v9-8' is unknown: write GENERATION-SIZE"),
        ("v5e", "topology 'v5e' is unknown"),
        ("v5e-12", "there is no v5e-12: v5e has slices of 1, 4, 8, 16, 32, 64, 128, 256."),
        ("v5p-7", "there is no v5p-7: v5p has slices of 8, 16, 32"),
    ],
)
def test_no_such_slice(name, message):
    with pytest.raises(UserError, match=message):
        chips.find(name)


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=list(chips.CHIPS))
def test_facts_agree(chip):
    """Peak is 2 FLOPs per multiplier and cycle, a whole number of 128 x 128 arrays: the clock and the published peak fit each other."""
    arrays = chip.peak / (2 * 128 * 128 * chip.clock)
    assert arrays == pytest.approx(round(arrays), rel=0.005)
