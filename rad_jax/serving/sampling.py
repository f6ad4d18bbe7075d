"""One request's choice of the next token, whatever else is in the batch."""

import numpy as np


class Sampler:
    """Draws tokens at a temperature from the smallest set whose probabilities reach `top_p` (Holtzman et al. 2020).

    Each request has random numbers of its own, so that the same request with the same seed gets the same text in any company.
    """

    def __init__(self, temperature: float, top_p: float, seed: int):
        self._temperature, self._top_p, self._rng = temperature, top_p, np.random.default_rng(seed)

    def choose(self, logits: np.ndarray) -> int:
        """A token of logits float32 [V]."""
        below = logits.astype(np.float64) - logits.max()
        # The largest is 0 at any temperature, however small, and the others at worst minus infinity.
        with np.errstate(over="ignore"):
            weights = np.exp(below / self._temperature)
        if self._top_p < 1:
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            weights[order[1:][before[1:] >= self._top_p * weights.sum()]] = 0
        ends = np.cumsum(weights)
        return int(np.searchsorted(ends, self._rng.random() * ends[-1], side="right"))
