"""Image-text retrieval scores: does an image find its own report among N, and the report its image?

Row i of both matrices belongs to the same study; similarity is the cosine. Ties are counted against the model: a pair's
rank is one plus the number of OTHER candidates that score at least as high, so a tower that maps everything to one
point gets the last rank and not the first.
"""

from dataclasses import dataclass

import numpy as np

_TIE = 1e-6  # cosines closer than this are equal: identical texts need not give bit-identical products
_BLOCK = 1024


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


def ranks(query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Rank (1 = first), int64 [N], of candidate i for query i; both float [N, E]. Computed in blocks of rows.

    Raises ValueError on different shapes, an empty pool, or numbers that are not finite (a NaN would win every
    comparison).
    """
    if query.shape != candidates.shape or query.ndim != 2 or len(query) == 0:
        raise ValueError(
            f"embeddings must be two equal [N, E] matrices with N >= 1, got {query.shape}, {candidates.shape}"
        )
    if not (np.isfinite(query).all() and np.isfinite(candidates).all()):
        raise ValueError("embeddings contain numbers that are not finite")
    query, candidates = _unit(query), _unit(candidates)
    out = np.empty(len(query), np.int64)
    for start in range(0, len(query), _BLOCK):
        scores = query[start : start + _BLOCK] @ candidates.T
        own = scores[np.arange(len(scores)), start + np.arange(len(scores))]
        out[start : start + _BLOCK] = (scores >= own[:, None] - _TIE).sum(axis=1)  # the pair itself gives the one
    return out


def retrieval(image: np.ndarray, text: np.ndarray) -> dict[str, Retrieval]:
    """Scores of both directions, keys "image_to_text" and "text_to_image", from embeddings float [N, E]."""
    return {"image_to_text": _summary(ranks(image, text)), "text_to_image": _summary(ranks(text, image))}


def _summary(rank: np.ndarray) -> Retrieval:
    r1, r5, r10 = (float((rank <= k).mean()) for k in (1, 5, 10))
    return Retrieval(r1, r5, r10, float(np.median(rank)), float(rank.mean()), len(rank))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
