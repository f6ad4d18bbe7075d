"""The pointing game: does a map's maximum lie inside the box of the thing it should point at?

Zhang et al., Top-down Neural Attention by Excitation Backprop (2016), without their pixel margin. The maximum of a map
on the patch grid is the centre of its highest cell, in pixels of the image that the model saw. Tied maxima must all lie
inside, so a flat map does not hit. Several boxes of one finding count as their union. Chance is the share of the image
that they cover.

Beside it: the share of the map's mass inside the boxes; the contrast-to-noise ratio |mean inside - mean outside| / sqrt(variance inside +
variance outside); and the mean intersection over union of the boxes with where the map exceeds 0.1, 0.2, ... 0.5. A model that only knows
where findings of a kind usually lie points as well with the map of another patient; `against_shuffled` tests that.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import statistics
from evaluation.metric import mean, mean_rows

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
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


@dataclass(frozen=True)
class MapScore:
    """One map: mass in [0, 1], contrast (NaN for a flat map), and iou in [0, 1] at each of `THRESHOLDS`."""

    mass: float
    contrast: float
    iou: tuple[float, ...]

    @property
    def mean_iou(self) -> float:
        """Mean over the thresholds."""
        return float(np.mean(self.iou))


def map_score(attention: np.ndarray, mask: np.ndarray) -> MapScore:
    """Scores a map [h, w] of numbers from 0 on against `mask` [Y, X]; every pixel has the value of the cell it lies in.

    The thresholds of iou are of the numbers as they are: scale the map to [0, 1] before. Raises ValueError for negative numbers or
    NaN, or when the mask covers nothing or everything.
    """
    if not (np.isfinite(attention).all() and attention.min() >= 0):
        raise ValueError("attention map contains numbers that are negative or not finite")
    if mask.all() or not mask.any():
        raise ValueError("the boxes cover nothing or the whole image")
    (h, w), (height, width) = attention.shape, mask.shape
    pixels = attention[np.arange(height)[:, None] * h // height, np.arange(width) * w // width].astype(np.float64)
    inside, outside = pixels[mask], pixels[~mask]
    noise = np.sqrt(inside.var() + outside.var())
    contrast = abs(inside.mean() - outside.mean()) / noise if noise > 0 else float("nan")
    iou = tuple(float(((pixels > t) & mask).sum() / ((pixels > t) | mask).sum()) for t in THRESHOLDS)
    total = pixels.sum()
    return MapScore(float(inside.sum() / total) if total > 0 else 0.0, float(contrast), iou)


@dataclass(frozen=True)
class Control:
    """Pointing accuracy of the own maps and of other studies' maps for the same finding, over n targets, and the two-sided p."""

    accuracy: float | None
    shuffled_accuracy: float | None
    n: int
    p: float
    p_min: float


def against_shuffled(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    findings: Sequence[str],
    patients: Sequence[Hashable],
    seed: int = 0,
) -> Control:
    """Are n targets hit better by their own map than by the map of the same finding in another patient? Paired, patients swapped whole.

    Targets whose finding no other patient has are left out.
    """
    other = _partners(findings, patients, seed)
    pairs = [(i, partner) for i, partner in enumerate(other) if partner is not None]
    if not pairs:
        return Control(None, None, 0, 1.0, 1.0)
    own = np.array([float(hit(maps[i], masks[i])) for i, _ in pairs])
    strange = np.array([float(hit(maps[j], masks[i])) for i, j in pairs])
    swapped = statistics.randomise(mean_rows(strange), mean_rows(own), [patients[i] for i, _ in pairs], seed=seed)
    test = statistics.significance(mean(swapped.second) - mean(swapped.first), own.mean() - strange.mean(), swapped)
    return Control(float(own.mean()), float(strange.mean()), len(pairs), test.p, test.p_min)


def _partners(findings: Sequence[str], patients: Sequence[Hashable], seed: int) -> list[int | None]:
    """For every target one of the same finding in another patient: the next such one in a random order; None where there is none."""
    order = np.random.default_rng(seed).permutation(len(findings)).tolist()
    out: list[int | None] = [None] * len(findings)
    for name in set(findings):
        group = [i for i in order if findings[i] == name]
        for place, i in enumerate(group):
            turned = group[place + 1 :] + group[:place]
            out[i] = next((j for j in turned if patients[j] != patients[i]), None)
    return out
