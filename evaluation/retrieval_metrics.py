"""Image-text retrieval scores: does an image find its own report among N, and the report its image?

Row i of both matrices belongs to the same study; similarity is the cosine. Ties are counted against the model: a pair's rank is one plus
the number of OTHER candidates that score at least as high, so a tower that maps everything to one point gets the last rank and not the
first; `summary` also counts them for the model, or as a random order of the tied would. Candidates of the same group (reports of the same
words) can be left out of the count, for they are right answers too. Similarities are computed in blocks on the device: 100,000 pairs of width
512 stay within 2 GB.
"""

import functools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation import statistics

Json = dict[str, Any]

DIRECTIONS = ("image_to_text", "text_to_image")
AT = (1, 5, 10)
_TIE = 1e-6  # cosines closer than this are equal: identical texts need not give bit-identical products
_BLOCK = 1024


@dataclass(frozen=True)
class Ranks:
    """Ranks from 1 of the own candidate, int64 [N]: `last` counts ties against it, `first` for it."""

    last: np.ndarray
    first: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """Mean rank over random orders of the tied, float64 [N]."""
        return (self.last + self.first) / 2.0


def summary(ranks: Ranks, ties: str, at: Sequence[int] = AT) -> dict[str, float]:
    """Recall r1, r5, r10 (in [0, 1]), median_rank and mean_rank, with ties counted "against" the model, "for" it, or as "expected" over random
    orders of the tied."""
    columns = _per_study(ranks, ties, at)
    out = {name: float(values.mean()) for name, values in columns.items()}
    return {**out, "median_rank": float(np.median(columns["mean_rank"]))}


def _per_study(ranks: Ranks, ties: str, at: Sequence[int]) -> dict[str, np.ndarray]:
    """What the means of `summary` are of: float64 [N] of every study."""
    ends = {
        "against": (ranks.last, ranks.last),
        "for": (ranks.first, ranks.first),
        "expected": (ranks.first, ranks.last),
    }
    low, high = ends[ties]
    # The own candidate is as likely at any rank from low to high.
    hits = {f"r{k}": np.clip((k + 1 - low) / (high + 1 - low), 0.0, 1.0) for k in at}
    return {**hits, "mean_rank": Ranks(high, low).expected}


def intervals(ranks: Ranks, ties: str, patients: Sequence[Hashable], at: Sequence[int] = AT) -> dict[str, Any]:
    """The 95% intervals of `summary`, under "ci": studies are drawn anew by patient, what they are ranked among stays."""
    columns = _per_study(ranks, ties, at)
    medians = statistics.resample_median(columns["mean_rank"], patients)
    ends = _of_means(columns, patients) | {"median_rank": statistics.percentile_interval(medians)}
    return {"ci": ends}


def _of_means(columns: dict[str, np.ndarray], patients: Sequence[Hashable]) -> dict[str, statistics.Interval | None]:
    rows = np.stack([*columns.values(), np.ones(len(patients))], axis=1)
    drawn = statistics.resample(rows, patients)
    return {name: statistics.percentile_interval(drawn[:, i] / drawn[:, -1]) for i, name in enumerate(columns)}


def retrieval(
    image: np.ndarray,
    text: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    how: str = "studies:all",
    patients: Sequence[Hashable] | None = None,
) -> dict[str, Json]:
    """Scores of both `DIRECTIONS` as plain JSON, from embeddings float [N, E].

    Args:
        image, text, groups: as in `both_ranks`, which also says what is refused.
        how: which studies these are and what was done about equal ones, for the signature.
        patients: of every pair, whom `intervals` draw; without them there are none.

    Returns:
        direction -> the `summary` with ties counted against the model, n, and chance, the recall of a random order; "ties_for" and
        "ties_expected" have the other summaries; each has a signature and, with patients, intervals under "ci".
    """
    both = both_ranks(image, text, groups)
    count = len(image)
    sizes = Counter(range(count) if groups is None else groups)
    pools = np.repeat([count - size + 1 for size in sizes.values()], list(sizes.values()))
    chance = {f"r{k}": float(np.minimum(1.0, k / pools).mean()) for k in AT}
    out = {}
    for direction, ranks in zip(DIRECTIONS, both, strict=True):
        against, hoped, expected = (
            summary(ranks, ties)
            | ({} if patients is None else intervals(ranks, ties, patients))
            | {
                "signature": f"retrieval|{direction}|score:cosine|ties:{ties}|{how}|pool:{count}|scale:0-1{_ci(patients)}"
            }
            for ties in ("against", "for", "expected")
        )
        out[direction] = {**against, "n": count, "chance": chance, "ties_for": hoped, "ties_expected": expected}
    return out


def both_ranks(image: np.ndarray, text: np.ndarray, groups: Sequence[Hashable] | None = None) -> tuple[Ranks, Ranks]:
    """Ranks of image to text and of text to image, from embeddings float [N, E], in one pass over the similarities.

    groups: of every pair, the name of what it may be confused with rightly; other candidates of the own group are not counted.

    Raises ValueError on different shapes, an empty pool, or numbers that are not finite (a NaN would win every comparison).
    """
    if image.shape != text.shape or image.ndim != 2 or len(image) == 0:
        raise ValueError(f"embeddings must be two equal [N, E] matrices with N >= 1, got {image.shape}, {text.shape}")
    _check_finite(image, text)
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


def nearest(query: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """Positions int32 [N, k] of the candidates [M, E] that are nearest to every query [N, E], the nearest first, equal ones in their order.

    Raises ValueError when k is more than there are candidates, or for numbers that are not finite.
    """
    total = len(candidates)
    if not 1 <= k <= total:
        raise ValueError(f"k must lie between 1 and {total}, got {k}")
    _check_finite(query, candidates)
    height, width = min(_BLOCK, len(query)), min(_BLOCK, total)
    out = []
    for row in range(0, len(query), height):
        rows = _filled(query, row, height)
        values, places = np.full((height, k), -np.inf, np.float32), np.zeros((height, k), np.int32)
        for column in range(0, total, width):
            values, places = _keep()(values, places, rows, _filled(candidates, column, width), column, total)
        out.append(np.asarray(places)[: len(query) - row])
    return np.concatenate(out)


def precision_at(query: np.ndarray, candidates: np.ndarray, labels: np.ndarray, at: Sequence[int]) -> list[float]:
    """For every k of `at` the mean share of a query's k nearest candidates [N, E] that have exactly its labels [N, c]: right answers that need
    not be its own pair. Of equally near ones the first are taken. Errors as `nearest`."""
    return [float(shares.mean()) for shares in _shares(query, candidates, labels, at)]


def _shares(query: np.ndarray, candidates: np.ndarray, labels: np.ndarray, at: Sequence[int]) -> list[np.ndarray]:
    """The shares of every query that `precision_at` means, [N] for every k."""
    _, same = np.unique(labels, axis=0, return_inverse=True)
    if min(at) < 1:
        raise ValueError(f"k must lie between 1 and {len(candidates)}, got {min(at)}")
    right = same[nearest(query, candidates, max(at))] == same[:, None]
    return [right[:, :k].mean(axis=1) for k in at]


def _ci(patients: Sequence[Hashable] | None) -> str:
    """The end of a signature: how the intervals are made, where there are any."""
    return "" if patients is None else f"|unit:patient|ci:percentile-{statistics.DRAWS}-seed{statistics.SEED}"


def label_precision(
    image: np.ndarray,
    text: np.ndarray,
    labels: np.ndarray,
    how: str = "studies:all",
    patients: Sequence[Hashable] | None = None,
) -> dict[str, Json]:
    """`precision_at` of both `DIRECTIONS` as plain JSON: precision_1, precision_5 and precision_10 (None where there are fewer candidates), chance,
    which is the mean share of all that have a query's labels, n and the signature, in which `how` says which studies these are. With the
    patients of the studies also 95% intervals under "ci", as `retrieval` has them."""
    count = len(image)
    at = [k for k in AT if k <= count]
    sizes = np.unique(labels, axis=0, return_counts=True)[1]
    chance = float((sizes.astype(np.float64) ** 2).sum()) / count**2
    out = {}
    for direction, pair in zip(DIRECTIONS, ((image, text), (text, image)), strict=True):
        shares = {f"precision_{k}": own for k, own in zip(at, _shares(*pair, labels, at), strict=True)}
        right = f"right:same-{labels.shape[1]}-labels|own:counted"
        signature = f"precision|{direction}|score:cosine|ties:first|{right}|{how}|pool:{count}|scale:0-1{_ci(patients)}"
        scores: Json = {f"precision_{k}": None for k in AT} | {name: float(own.mean()) for name, own in shares.items()}
        if patients is not None:
            scores["ci"] = _of_means(shares, patients)
        out[direction] = {**scores, "chance": chance, "n": count, "signature": signature}
    return out


def _check_finite(*rows: np.ndarray) -> None:
    if not all(np.isfinite(part).all() for part in rows):
        raise ValueError("embeddings contain numbers that are not finite")


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _own(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Cosine of every pair, float32 [n]."""
    return (_unit(image) * _unit(text)).sum(axis=1).astype(np.float32)


def _filled(rows: np.ndarray, start: int, size: int) -> np.ndarray:
    """Unit rows of a block, float32 [size, E], zeros after the last."""
    unit = _unit(rows[start : start + size]).astype(np.float32)
    return np.pad(unit, ((0, size - len(unit)), (0, 0)))


def _block(rows: np.ndarray, own: np.ndarray, group: np.ndarray, start: int, size: int) -> tuple[np.ndarray, ...]:
    """Unit rows, cosines of the pairs and groups of a block, filled up to `size`; what fills is of group -1."""
    part = slice(start, start + size)
    missing = size - len(own[part])
    return (
        _filled(rows, start, size),
        np.pad(own[part], (0, missing)),
        np.pad(group[part], (0, missing), constant_values=-1),
    )


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


@functools.cache
def _keep() -> Any:
    """The compiled step of `nearest`: the k best so far and a block of candidates to the k best of both."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def keep(values: Any, places: Any, query: Any, candidates: Any, start: Any, total: Any) -> Any:
        """float32 and int32 [queries, k] of what is kept; `start` is the place of the block's first candidate, of `total` real ones."""
        scores = jnp.matmul(query, candidates.T, precision="highest")
        place = start + jnp.arange(candidates.shape[0], dtype=jnp.int32)
        scores = jnp.where(place < total, scores, -jnp.inf)
        # Of equal values top_k takes the first, and what was kept before comes first.
        best, chosen = jax.lax.top_k(jnp.concatenate([values, scores], axis=1), values.shape[1])
        known = jnp.concatenate([places, jnp.broadcast_to(place, scores.shape)], axis=1)
        return best, jnp.take_along_axis(known, chosen, axis=1)

    return keep
