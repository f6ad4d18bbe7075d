"""Films that look the same though their bytes differ: scaled, compressed or brightened anew.

A look is 256 bits: the film scaled to 17 x 16, each pixel compared with its right neighbour (a difference hash). Looks of one film differ in a
few bits, those of two films, even of one patient, in dozens.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

BITS, SIDE = 256, 16
NEAR = 7  # bits; with eight bands, two looks so near agree in one band at least
_BANDS = 8
# Neighbouring bits go along with each other, so each band takes its bits from all over the film.
_ORDER = np.random.default_rng(0).permutation(BITS)


def look(film: np.ndarray) -> np.ndarray:
    """The look of a film, uint8 [Y, X], as uint8 [32]."""
    small = np.asarray(Image.fromarray(film).resize((SIDE + 1, SIDE), Image.Resampling.BOX), np.int16)
    # A step of one grey value is noise, as in the black margin.
    return np.packbits(small[:, :-1] > small[:, 1:] + 1)


def earlier(looks: np.ndarray) -> np.ndarray:
    """For each film the number of an earlier one that looks like it, -1 where there is none.

    Args:
        looks: uint8 [n, 32].

    Returns:
        int64 [n].
    """
    if not len(looks):
        return np.zeros(0, np.int64)
    distinct, first, which = np.unique(looks, axis=0, return_index=True, return_inverse=True)
    found = first[which.reshape(-1)]
    found[first] = -1
    for a, b in np.sort(first[near_pairs(distinct)], axis=1).tolist():
        found[b] = a if found[b] < 0 else min(found[b], a)
    return found


def near_pairs(looks: np.ndarray) -> np.ndarray:
    """Pairs of looks at most NEAR bits apart.

    Args:
        looks: uint8 [n, 32], no two equal.

    Returns:
        int64 [pairs, 2], each pair once, the smaller number first, in order.
    """
    bits = np.unpackbits(looks, axis=1)[:, _ORDER]
    bands = np.packbits(bits, axis=1).reshape(len(looks), _BANDS, BITS // 8 // _BANDS)
    found: list[np.ndarray] = []
    for band in range(_BANDS):
        keys = np.ascontiguousarray(bands[:, band]).view(np.uint32)[:, 0]
        order = np.argsort(keys, kind="stable")
        alike = keys[order]
        for step in range(1, len(order)):
            # Those that are `step` apart in the sorted list and have the same key; none at a step, none further on.
            first, second = order[:-step], order[step:]
            same = alike[:-step] == alike[step:]
            if not same.any():
                break
            pairs = np.stack([first[same], second[same]], axis=1)
            apart = np.bitwise_count(looks[pairs[:, 0]] ^ looks[pairs[:, 1]]).sum(axis=1)
            found.append(np.sort(pairs[apart <= NEAR], axis=1))
    return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), np.int64)
