"""Position tables for another image size."""

import math

import jax
import numpy as np


def resample(table: np.ndarray, size: int) -> np.ndarray:
    """A learned position table on another grid, as timm's `resample_abs_pos_embed` does it: bicubic, antialiased, in float32.

    Args:
        table: [1, (1 +) P, D], P a square number; with 1 + P the first row is the class token's and stays as it is.
        size: rows, and columns, of the new grid.

    Returns:
        [1, (1 +) size * size, D] in the table's dtype; the table itself where the grid stays the same.
    """
    _, rows, width = table.shape
    side = math.isqrt(rows)
    first = 0 if side * side == rows else 1  # no square number follows another
    side = math.isqrt(rows - first)
    if side * side + first != rows:
        raise ValueError(f"a position table of {rows} rows is no square grid")
    if side == size:
        return table
    grid = table[:, first:].astype(np.float32).reshape(side, side, width)
    # transformers interpolates without antialias; jax's form without it has another cubic constant than torch's.
    resized = np.asarray(jax.image.resize(grid, (size, size, width), "bicubic", antialias=True))
    return np.concatenate([table[:, :first], resized.reshape(1, size * size, width).astype(table.dtype)], axis=1)
