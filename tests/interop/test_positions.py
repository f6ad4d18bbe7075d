"""Position tables on another grid, against timm."""

import ml_dtypes
import numpy as np
import pytest

from rad_jax.interop import positions


@pytest.mark.parity
@pytest.mark.parametrize("class_row", [True, False])
@pytest.mark.parametrize("size", [16, 24, 48])
def test_resampling_equals_timm(size, class_row):
    torch = pytest.importorskip("torch")
    pos_embed = pytest.importorskip("timm.layers.pos_embed")
    table = np.random.default_rng(0).normal(size=(1, class_row + 37 * 37, 8)).astype(np.float32)
    theirs = pos_embed.resample_abs_pos_embed(
        torch.from_numpy(table), [size, size], num_prefix_tokens=int(class_row), interpolation="bicubic", antialias=True
    )
    ours = positions.resample(table, size)
    assert ours.dtype == np.float32 and ours.shape == (1, class_row + size * size, 8)
    # Values up to 4; weights of the filter summed in another order. Measured 2e-6.
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours[:, :class_row], table[:, :class_row])


def test_the_same_grid_stays_as_it_is_and_a_dtype_is_kept():
    table = np.random.default_rng(0).normal(size=(1, 17, 4)).astype(ml_dtypes.bfloat16)
    assert positions.resample(table, 4) is table
    assert positions.resample(table, 3).dtype == table.dtype and positions.resample(table, 3).shape == (1, 10, 4)


def test_a_table_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="7 rows"):
        positions.resample(np.zeros((1, 7, 4), np.float32), 3)
