import io

import numpy as np
import pytest
from PIL import Image

from evaluation.overlay import overlay


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_colour_only_where_attention_is() -> None:
    image = np.full((60, 40), 100, np.uint8)
    attention = np.zeros((6, 4))
    attention[0, 3] = 5.0
    out = decode(overlay(image, attention))
    assert out.shape == (60, 40, 3)
    np.testing.assert_array_equal(out[59, 0], [100, 100, 100])
    assert out[2, 37, 0] - out[2, 37, 2] > 40  # warm in the corner that is attended: top right


def test_flat_map_leaves_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    np.testing.assert_array_equal(decode(overlay(image, np.full((2, 2), 0.3)))[..., 1], image)


def test_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        overlay(np.zeros((4, 4), np.uint8), np.array([[np.nan]]))
