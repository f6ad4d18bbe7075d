"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): their specification and how they fold into the weights.

Adapters live in a variable collection of their own, `lora`, with the tree of the kernels they adapt; `models.layers.Dense` adds them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

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
    """Kernels with their adapters folded in: W + (alpha / R) A B, computed in float32 and stored in the kernel's dtype.

    Args:
        params: tree whose adapted nodes hold `kernel` [L, *in, *out].
        adapters: the same tree, with `a` [L, *in, R] and `b` [L, R, *out] in place of `kernel`.
        spec: the adapters' rank and scale.

    Returns:
        A tree like `params`.
    """
    merged = dict(params)
    for name, node in adapters.items():
        if "a" in node:
            kernel, a, b = params[name]["kernel"], node["a"], node["b"]
            layers, rank = a.shape[0], a.shape[-1]
            a = jnp.asarray(a, jnp.float32).reshape(layers, -1, rank)
            b = jnp.asarray(b, jnp.float32).reshape(layers, rank, -1)
            delta = spec.scale * jnp.einsum("lir,lro->lio", a, b, precision="highest")
            merged[name] = {**params[name], "kernel": (kernel + delta.reshape(kernel.shape)).astype(kernel.dtype)}
        else:
            merged[name] = merge(params[name], node, spec)
    return merged
