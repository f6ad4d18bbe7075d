"""Which heads show where a model looks: chosen where boxes are known, and read against what they look at in every film."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import pointing

MOST = 8  # heads that are averaged


@dataclass(frozen=True)
class Heads:
    """Attributes:
    chosen: (layer, head) of those whose maps are averaged, the best first.
    mean: float32 [h, w], their average map over the targets that they were chosen on.
    share: of those targets, how many the average hits.
    """

    chosen: tuple[tuple[int, int], ...]
    mean: np.ndarray
    share: float

    def read(self, maps: np.ndarray) -> np.ndarray:
        """float32 [n, h, w] of maps [n, L, N, h, w]: how much more the chosen heads look at a place than they do on average.

        Heads keep some of their attention on the same patches whatever the film, which says nothing about this one.
        """
        return _averaged(maps, self.chosen) - self.mean


def choose(maps: np.ndarray, masks: Sequence[np.ndarray], candidates: Sequence[tuple[int, int]]) -> Heads:
    """The heads, at most `MOST`, whose average, less its mean over all n maps, hits most masks; the fewest and first of equals.

    Args:
        maps: [n, L, N, h, w], as `looking.Looker.maps` gives them.
        masks: bool [Y, X] of each of the n targets.
        candidates: (layer, head) to choose from.
    """

    def share(chosen: Sequence[tuple[int, int]]) -> float:
        read = _averaged(maps, chosen)
        read = read - read.mean(axis=0)
        return float(np.mean([pointing.hit(map_, mask) for map_, mask in zip(read, masks, strict=True)]))

    ranked = sorted(candidates, key=lambda candidate: -share([candidate]))
    count = max(range(1, min(MOST, len(ranked)) + 1), key=lambda k: share(ranked[:k]))
    chosen = tuple(ranked[:count])
    return Heads(chosen, _averaged(maps, chosen).mean(axis=0), share(chosen))


def _averaged(maps: np.ndarray, chosen: Sequence[tuple[int, int]]) -> np.ndarray:
    layers, heads = np.array(chosen).T
    return maps[:, layers, heads].mean(axis=1)
