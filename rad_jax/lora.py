"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): their specification and how they fold into the weights.

Adapters live in a variable collection of their own, `lora`, with the tree of the kernels they adapt; `models.layers.Dense` adds them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rad_jax.lazy import LazyArray

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Rank R, scale alpha / R, dropout on the adapter's input, and the projections that get an adapter."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(TARGETS)
        if unknown:
            raise ValueError(f"unknown LoRA targets {sorted(unknown)}; choose from {TARGETS}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], spec: LoraSpec) -> dict[str, Any]:
    """Kernels with their adapters folded in: W + (alpha / R) A B, in float32, a layer at a time when it is asked for.

    Args:
        params: tree whose adapted nodes hold `kernel` [L, *in, *out].
        adapters: the same tree, with `a` [L, *in, R] and `b` [L, R, *out] in place of `kernel`.
        spec: the adapters' rank and scale.

    Returns:
        A tree like `params`, lazy where there are adapters.
    """
    merged = dict(params)
    for name, node in adapters.items():
        if "a" in node:
            merged[name] = {**params[name], "kernel": _folded(params[name]["kernel"], node["a"], node["b"], spec)}
        else:
            merged[name] = merge(params[name], node, spec)
    return merged


def _folded(kernel: Any, a: Any, b: Any, spec: LoraSpec) -> LazyArray:
    def read(layer: int) -> np.ndarray:
        left = np.asarray(a[layer], np.float32).reshape(-1, spec.rank)
        right = np.asarray(b[layer], np.float32).reshape(spec.rank, -1)
        folded = left @ right
        folded *= np.float32(spec.scale)
        folded += np.asarray(kernel[layer]).reshape(folded.shape)
        return folded.reshape(kernel.shape[1:])

    return LazyArray(tuple(kernel.shape), np.dtype(np.float32), read, stacked=True)
