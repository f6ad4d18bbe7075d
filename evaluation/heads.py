"""Which heads show where a model looks: chosen where boxes are known, and read against what they look at in every film."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import pointing

MOST = 8  # heads that are averaged, or named of those that are weighted
RIDGE = 1.0  # of weights, in variances of a head's map

Candidates = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Heads:
    """Attributes:
    chosen: (layer, head) of those whose maps are averaged, the best first; or of those that weigh most.
    weights: float32 [L, N], of every head's map in the sum of all.
    mean: float32 [h, w], the mean of that sum over the targets that the heads were chosen on.
    share: of those targets, how many the sum hits.
    averaged: whether the chosen ones weigh the same and the others nothing.
    """

    chosen: tuple[tuple[int, int], ...]
    weights: np.ndarray
    mean: np.ndarray
    share: float
    averaged: bool

    def read(self, maps: np.ndarray) -> np.ndarray:
        """float32 [n, h, w] of maps [n, L, N, h, w]: how much more the heads look at a place than they do on average.

        Heads keep some of their attention on the same patches whatever the film, which says nothing about this one.
        """
        return weighted(maps, self.weights) - self.mean


def choose(maps: np.ndarray, masks: Sequence[np.ndarray], candidates: Candidates) -> Heads:
    """Heads whose maps, less their mean over all n, hit most masks: at most `MOST` averaged, the fewest and first of equals; or, where that
    hits more, all of them weighted as they tell patches in a box from others (ridge regression on the share of a patch in the mask).

    Args:
        maps: [n, L, N, h, w], as `looking.Looker.maps` gives them.
        masks: bool [Y, X] of each of the n targets.
        candidates: (layer, head) to choose from.
    """

    def share(weights: np.ndarray) -> float:
        read = weighted(maps, weights)
        read = read - read.mean(axis=0)
        return float(np.mean([pointing.hit(map_, mask) for map_, mask in zip(read, masks, strict=True)]))

    def evenly(chosen: Candidates) -> np.ndarray:
        weights = np.zeros(maps.shape[1:3], np.float32)
        for place in chosen:
            weights[place] = 1 / len(chosen)
        return weights

    ranked = sorted(candidates, key=lambda candidate: -share(evenly([candidate])))
    count = max(range(1, min(MOST, len(ranked)) + 1), key=lambda k: share(evenly(ranked[:k])))
    even, fitted, strength = evenly(ranked[:count]), *_fitted(maps, masks, candidates)
    averaged = share(even) >= share(fitted)
    weights = even if averaged else fitted
    heaviest = sorted(candidates, key=lambda place: -strength[place])
    chosen = tuple(ranked[:count] if averaged else heaviest[:MOST])
    return Heads(chosen, weights, weighted(maps, weights).mean(axis=0), share(weights), averaged)


def _fitted(maps: np.ndarray, masks: Sequence[np.ndarray], candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """Weights [L, N] of ridge regression, and how much each head moves the sum: its weight by its map's standard deviation."""
    layers, heads = np.array(candidates).T
    mean = maps.mean(axis=0)[layers, heads]
    products, along, squares = (np.zeros(shape) for shape in ((len(layers),) * 2, len(layers), len(layers)))
    inside = np.stack([_share_of_patches(mask, maps.shape[3], maps.shape[4]) for mask in masks])
    inside = inside - inside.mean()
    # One target after the other: of a large model all are gigabytes.
    for map_, wanted in zip(maps, inside, strict=True):
        own = (map_[layers, heads] - mean).reshape(len(layers), -1).astype(np.float64)
        products += own @ own.T
        along += own @ wanted.ravel()
        squares += (own**2).sum(1)
    scale = np.sqrt(squares / inside.size) + 1e-12
    system = products / np.outer(scale, scale) / inside.size + RIDGE * np.eye(len(layers))
    found = np.linalg.solve(system, along / scale / inside.size)
    weights, strength = np.zeros(maps.shape[1:3], np.float32), np.zeros(maps.shape[1:3])
    weights[layers, heads], strength[layers, heads] = found / scale, np.abs(found)
    return weights, strength


def _share_of_patches(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """float64 [rows, columns]: of each patch of the mask [Y, X], how much is in it."""
    height, width = mask.shape
    return mask.astype(float).reshape(rows, height // rows, columns, width // columns).mean((1, 3))


def weighted(maps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 [n, h, w]: the sum of maps [n, L, N, h, w] by weights [L, N]."""
    layers, heads = np.nonzero(weights)
    return np.einsum("nkhw,k->nhw", maps[:, layers, heads], weights[layers, heads])
