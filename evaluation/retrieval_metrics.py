"""Image-text retrieval scores: does an image find its own report among N, and the report its image?

Row i of both matrices belongs to the same study; similarity is the cosine. Ties are counted against the model: a pair's rank is one plus
the number of OTHER candidates that score at least as high, so a tower that maps everything to one point gets the last rank and not the
first; `Ranks` also has the ranks that count ties for the model. Candidates of the same group (reports of the same words) can be left out
of the count, for they are right answers too. Similarities are computed in blocks on the device: 100,000 pairs of width 512 stay within 2 GB.
"""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_TIE = 1e-6  # cosines closer than this are equal: identical texts need not give bit-identical products
_BLOCK = 4096


@dataclass(frozen=True)
class Retrieval:
    """One direction: recall at 1, 5 and 10 (in [0, 1]), median and mean rank (from 1), over a pool of n pairs."""

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float
    n: int

    def chance(self, k: int) -> float:
        """Expected recall at k of a random order."""
        return min(1.0, k / self.n)


@dataclass(frozen=True)
class Ranks:
    """Ranks from 1 of the own candidate, int64 [N]: `last` counts ties against it, `first` for it."""

    last: np.ndarray
    first: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """Mean rank over random orders of the tied, float64 [N]."""
        return (self.last + self.first) / 2.0


def both_ranks(image: np.ndarray, text: np.ndarray, groups: Sequence[Hashable] | None = None) -> tuple[Ranks, Ranks]:
    """Ranks of image to text and of text to image, from embeddings float [N, E], in one pass over the similarities.

    groups: of every pair, the name of what it may be confused with rightly; other candidates of the own group are not counted.

    Raises ValueError on different shapes, an empty pool, or numbers that are not finite (a NaN would win every comparison).
    """
    if image.shape != text.shape or image.ndim != 2 or len(image) == 0:
        raise ValueError(f"embeddings must be two equal [N, E] matrices with N >= 1, got {image.shape}, {text.shape}")
    if not (np.isfinite(image).all() and np.isfinite(text).all()):
        raise ValueError("embeddings contain numbers that are not finite")
    count = len(image)
    numbers: dict[Hashable, int] = {}
    names = range(count) if groups is None else groups
    group = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
    if len(group) != count:
        raise ValueError(f"{count} pairs but {len(group)} groups")
    own = np.concatenate([_own(image[i : i + _BLOCK], text[i : i + _BLOCK]) for i in range(0, count, _BLOCK)])
    size = min(_BLOCK, count)
    # [direction, ties counted against or for, pair]: how many others score at least as high, or higher
    above = np.zeros((2, 2, count), np.int64)
    for row in range(0, count, size):
        rows = _block(image, own, group, row, size)
        for column in range(0, count, size):
            columns = _block(text, own, group, column, size)
            of_rows, of_columns = (np.asarray(counts) for counts in _compare()(*rows, *columns))
            above[0, :, row : row + size] += of_rows[:, : count - row]
            above[1, :, column : column + size] += of_columns[:, : count - column]
    return Ranks(above[0, 0] + 1, above[0, 1] + 1), Ranks(above[1, 0] + 1, above[1, 1] + 1)


def ranks(query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Rank (1 = first), int64 [N], of candidate i for query i, ties against it; both float [N, E]. Errors as `both_ranks`."""
    return both_ranks(query, candidates)[0].last


def retrieval(image: np.ndarray, text: np.ndarray, groups: Sequence[Hashable] | None = None) -> dict[str, Retrieval]:
    """Scores of both directions, keys "image_to_text" and "text_to_image", from embeddings float [N, E]."""
    forth, back = both_ranks(image, text, groups)
    return {"image_to_text": _summary(forth.last), "text_to_image": _summary(back.last)}


def precision_at(image: np.ndarray, text: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Mean share of an image's k nearest texts [N, E] that have exactly its labels [N, c]: right answers that are not its own report.

    Of equally near texts the first are taken. Raises ValueError when k is more than there are texts.
    """
    if not 1 <= k <= len(text):
        raise ValueError(f"k must lie between 1 and {len(text)}, got {k}")
    _, same = np.unique(labels, axis=0, return_inverse=True)
    found, block = 0, max(1, 2**25 // len(text))
    unit = _unit(text).astype(np.float32)
    for start in range(0, len(image), block):
        scores = _unit(image[start : start + block]).astype(np.float32) @ unit.T
        nearest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        found += int((same[nearest] == same[start : start + block, None]).sum())
    return found / (k * len(image))


def _summary(rank: np.ndarray) -> Retrieval:
    r1, r5, r10 = (float((rank <= k).mean()) for k in (1, 5, 10))
    return Retrieval(r1, r5, r10, float(np.median(rank)), float(rank.mean()), len(rank))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _own(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Cosine of every pair, float32 [n]."""
    return (_unit(image) * _unit(text)).sum(axis=1).astype(np.float32)


def _block(rows: np.ndarray, own: np.ndarray, group: np.ndarray, start: int, size: int) -> tuple[np.ndarray, ...]:
    """Unit rows, cosines of the pairs and groups of a block, filled up to `size`; what fills is of group -1."""
    part = slice(start, start + size)
    missing = size - len(rows[part])
    unit = np.pad(_unit(rows[part]).astype(np.float32), ((0, missing), (0, 0)))
    return unit, np.pad(own[part], (0, missing)), np.pad(group[part], (0, missing), constant_values=-1)


@functools.cache
def _compare() -> Any:
    """The compiled comparison of a block of images with a block of texts; built late, for importing this must stay light."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def compare(image: Any, image_own: Any, image_group: Any, text: Any, text_own: Any, text_group: Any) -> Any:
        """How many others score at least as high and higher than the own one: int32 [2, images], [2, texts]."""
        scores = jnp.matmul(image, text.T, precision="highest")
        other = (image_group[:, None] != text_group) & (image_group[:, None] >= 0) & (text_group >= 0)

        def count(bound: Any, axis: int) -> Any:
            return jnp.stack([(other & beyond).sum(axis) for beyond in (scores >= bound - _TIE, scores > bound + _TIE)])

        return count(image_own[:, None], 1), count(text_own[None], 0)

    return compare
