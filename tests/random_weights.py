"""Weights of any size that mean nothing, read a layer at a time."""

import re
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rad_jax.lazy import LazyArray

STACKED = re.compile(r"llm/layers/|vision/blocks/")
ONES = re.compile(r"/(scale|ls[12])$")
# A prime number, which no matrix has as a side: one that is cut out of repetitions of it has no two rows alike.
NOISE_SIZE = 15_485_863
END = 2  # Llama's end of sequence


def _drawn(path: str, shape: tuple[int, ...], noise: np.ndarray) -> LazyArray:
    """Matrices with the spread of Llama's own, 0.02, each a part of the noise; gains are one, biases zero.

    The head's column of the end of sequence is zero and so never the largest: texts are as long as is asked.
    """
    stacked = STACKED.match(path) is not None

    def read(layer: int) -> np.ndarray:
        own = shape[1:] if stacked else shape
        if path.endswith("bias"):
            return np.zeros(own, np.float32)
        if ONES.search(path):
            return np.ones(own, np.float32)
        weights = np.empty(own, np.float32)
        flat, done = weights.ravel(), 0
        start = zlib.crc32(f"{path}/{layer}".encode()) % len(noise)
        while done < len(flat):
            part = noise[start : start + len(flat) - done]
            flat[done : done + len(part)] = part
            start, done = 0, done + len(part)
        if path == "llm/head/kernel":
            weights[:, END] = 0
        return weights

    return LazyArray(shape, np.dtype(np.float32), read, stacked)


def shapes(task: Any) -> dict[str, Any]:
    """Of a task's parameters, without its adapters."""
    return dict(nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))["params"])


def tree(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of these shapes."""
    noise = np.random.default_rng(0).standard_normal(NOISE_SIZE, np.float32) * np.float32(0.02)
    return unflatten_dict(
        {path: _drawn(path, leaf.shape, noise) for path, leaf in flatten_dict(wanted, sep="/").items()}, sep="/"
    )
