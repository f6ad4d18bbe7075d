"""The pointing game: does a map's maximum lie inside the box of the thing it should point at?

Zhang et al., Top-down Neural Attention by Excitation Backprop (2016), without their pixel margin. The maximum of a map
on the patch grid is the centre of its highest cell, in pixels of the image that the model saw. Tied maxima must all lie
inside, so a flat map does not hit. Several boxes of one finding count as their union. Chance is the share of the image
that they cover.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Box = Sequence[float]


@dataclass(frozen=True)
class Pointing:
    """accuracy = hits / n; chance = mean share of the image inside the boxes; both None when n is 0."""

    accuracy: float | None
    chance: float | None
    hits: int
    n: int


def box_mask(boxes: Sequence[Box], height: int, width: int) -> np.ndarray:
    """Bool [Y, X]: pixels whose centre lies in any box [x0, y0, x1, y1) of pixel coordinates.

    Raises ValueError when a box covers no pixel of the image: it belongs to another frame than the map.
    """
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    mask = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in boxes:
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        if not inside.any():
            raise ValueError(f"box {[x0, y0, x1, y1]} covers no pixel of a {height} x {width} image")
        mask |= inside
    return mask


def hit(attention: np.ndarray, mask: np.ndarray) -> bool:
    """Whether every maximal cell of `attention` [h, w] has its centre inside `mask` [Y, X]; ValueError for NaN."""
    if not np.isfinite(attention).all():
        raise ValueError("attention map contains numbers that are not finite")
    row, column = np.nonzero(attention == attention.max())
    (h, w), (height, width) = attention.shape, mask.shape
    y, x = (row + 0.5) * height / h, (column + 0.5) * width / w
    return bool(mask[y.astype(int), x.astype(int)].all())


def pointing_game(
    maps: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]], sizes: Sequence[tuple[int, int]]
) -> Pointing:
    """Scores n maps [h, w] against the boxes of each, in pixels of its image, whose (height, width) is in `sizes`."""
    masks = [box_mask(b, *size) for b, size in zip(boxes, sizes, strict=True)]
    hits = sum(hit(m, mask) for m, mask in zip(maps, masks, strict=True))
    n = len(masks)
    if n == 0:
        return Pointing(None, None, 0, 0)
    return Pointing(hits / n, float(np.mean([mask.mean() for mask in masks])), hits, n)
