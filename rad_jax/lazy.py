"""Arrays that are read, or made, one layer at a time: what stands in a tree of weights where the array itself would not fit in memory."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array of which only the asked-for part comes into memory; indexed as numpy's.

    Attributes:
        shape: [L, ...] where it is stacked over layers.
        dtype: of what `read` gives.
        read: gives layer l, of shape `shape[1:]`; of an array that is not stacked, the whole, whatever l.
        stacked: whether the first axis is the layers'.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], np.ndarray]
    stacked: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        if not self.stacked:
            return self.read(0)[index]
        first, rest = (index[0], index[1:]) if index else (slice(None), ())
        if not isinstance(first, slice):
            return self.read(int(first))[rest]
        layers = [self.read(layer)[rest] for layer in range(*first.indices(self.shape[0]))]
        return np.stack(layers) if layers else np.empty((0, *self.shape[1:]), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # A stack is always made; numpy may copy what is not.
        return np.asarray(self[()], dtype)


def first_layers(array: Any, count: int) -> Any:
    """The first layers of a stacked array, without reading them where it is lazy."""
    if isinstance(array, LazyArray):
        return dataclasses.replace(array, shape=(count, *array.shape[1:]))
    return array[:count]


def chained(first: Any, second: Any) -> LazyArray:
    """Two stacked arrays one after the other, in the first one's dtype."""
    count, dtype = first.shape[0], np.dtype(first.dtype)

    def read(layer: int) -> np.ndarray:
        return np.asarray(first[layer] if layer < count else second[layer - count], dtype)

    return LazyArray((count + second.shape[0], *first.shape[1:]), dtype, read, stacked=True)


STRIP = 32  # elements; 16-bit strips of this width are one cache line


def contiguous(x: np.ndarray) -> np.ndarray:
    """The same array in C order. A transposed matrix is copied in strips, which takes a third of numpy's own time."""
    if x.flags.c_contiguous or x.ndim < 2 or x.nbytes < 2**20:
        return np.asarray(x, order="C")
    flat = x.reshape(x.shape[0], -1)
    out = np.empty(flat.shape, x.dtype)
    for start, stop in itertools.pairwise([*range(0, flat.shape[1], STRIP), flat.shape[1]]):
        out[:, start:stop] = flat[:, start:stop]
    return out.reshape(x.shape)
