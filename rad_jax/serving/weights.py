"""Matrices of the decoder as they lie in memory: as they are, in 8-bit whole numbers, or in 4-bit NormalFloat."""

from typing import Any, Protocol, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor
KINDS = ("int8", "nf4")
BLOCK = 64  # entries that share a scale in NF4, as in QLoRA
# The 16 values of 4-bit NormalFloat (Dettmers et al. 2023, QLoRA, appendix E): quantiles of a normal distribution, zero among them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ROWS = 2048  # of a matrix in NF4 that are spread out at once


class Matrix(Protocol):
    """Weights [out, in] of one linear map; `turned` is [in, out], in the dtype that is computed in."""

    @property
    def turned(self) -> Tensor: ...

    def put(self, row: int, weights: Tensor) -> None:
        """Stores `weights` [n, in] as the rows from `row` on."""


class Dense:
    """As it is. In float32 on a CPU it lies in memory as [in, out], which a product with few rows reads up to twice as fast."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: Any):
        rows, columns = shape
        if dtype == torch.float32 and torch.device(device).type == "cpu":
            self.turned = torch.empty((columns, rows), dtype=dtype, device=device)
        else:
            self.turned = torch.empty(shape, dtype=dtype, device=device).t()

    def put(self, row: int, weights: Tensor) -> None:
        self.turned[:, row : row + len(weights)].copy_(weights.t())


class Scratch:
    """Room for one matrix spread out, shared by all: a matrix is used before the next one is spread out."""

    def __init__(self, dtype: torch.dtype, device: Any):
        self._dtype, self._device = dtype, device
        self._room = torch.empty(0, dtype=dtype, device=device)

    def grow(self, size: int) -> None:
        if size > len(self._room):
            self._room = torch.empty(size, dtype=self._dtype, device=self._device)

    def take(self, shape: tuple[int, int]) -> Tensor:
        return self._room[: shape[0] * shape[1]].view(shape)


class Int8:
    """round(w / s) with one s = max |w| / 127 for each output: an entry is off by s / 2 at most."""

    def __init__(self, shape: tuple[int, int], scratch: Scratch, device: Any):
        self._stored = torch.empty(shape, dtype=torch.int8, device=device)
        self._scale = torch.empty((shape[0], 1), dtype=torch.float32, device=device)
        self._scratch = scratch
        scratch.grow(self._stored.numel())

    def put(self, row: int, weights: Tensor) -> None:
        weights = weights.to(self._stored.device).float()
        scale = (weights.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self._stored[row : row + len(weights)] = (weights / scale).round_().to(torch.int8)
        self._scale[row : row + len(weights)] = scale

    @property
    def turned(self) -> Tensor:
        dense = self._scratch.take(tuple(self._stored.shape))
        return torch.mul(self._stored, self._scale.to(dense.dtype), out=dense).t()


class Nf4:
    """Blocks of 64 entries divided by their largest absolute value, each entry the nearest of the 16 values of NF4."""

    def __init__(self, shape: tuple[int, int], scratch: Scratch, device: Any):
        rows, columns = shape
        self._shape = shape
        self._pairs = torch.empty((rows, columns // 2), dtype=torch.uint8, device=device)
        self._scale = torch.empty((rows, columns // BLOCK), dtype=torch.float32, device=device)
        self._values = torch.tensor(NF4, dtype=torch.float32, device=device)
        first, second = torch.meshgrid(self._values, self._values, indexing="ij")
        self._table = torch.stack([first, second], -1).view(256, 2)  # a byte's two entries
        self._scratch = scratch
        scratch.grow(rows * columns)

    def put(self, row: int, weights: Tensor) -> None:
        blocks = weights.to(self._scale.device).float().reshape(len(weights), -1, BLOCK)
        scale = blocks.abs().amax(2).clamp_min(torch.finfo(torch.float32).tiny)
        edges = (self._values[1:] + self._values[:-1]) / 2
        codes = torch.bucketize(blocks / scale[..., None], edges).to(torch.uint8).view(len(weights), -1)
        self._pairs[row : row + len(weights)] = codes[:, ::2] * 16 + codes[:, 1::2]
        self._scale[row : row + len(weights)] = scale

    @property
    def turned(self) -> Tensor:
        dense = self._scratch.take(self._shape)
        table = self._table.to(dense.dtype)
        for start in range(0, self._shape[0], _ROWS):
            part = slice(start, start + _ROWS)
            entries = torch.nn.functional.embedding(self._pairs[part].int(), table)
            scale = self._scale[part].to(dense.dtype)
            blocks = entries.view(*scale.shape, BLOCK)
            torch.mul(blocks, scale[..., None], out=dense[part].view(blocks.shape))
        return dense.t()
