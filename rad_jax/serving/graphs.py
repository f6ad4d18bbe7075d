"""CUDA graphs of a decoding step: one launch in place of some hundred, which is what a small batch on a fast card waits for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

MULTIPLE = 256  # tokens that the longest row is rounded up to; each rounded length is captured once


class Graphs:
    """Captured steps, by rounded numbers of rows and tokens.

    Args:
        step: of (tokens [B], lengths [B], longest), gives logits [B, V]; touches the first B slots only.
        slots, max_tokens: of the cache.
        device: the card.
        say: told the reason once if capturing fails; then steps run without.
    """

    def __init__(
        self,
        step: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
        slots: int,
        max_tokens: int,
        device: Any,
        say: Callable[[str], object],
    ):
        self._step, self._slots, self._max_tokens, self._say = step, slots, max_tokens, say
        self._tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self._lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self._captured: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}
        # One pool of memory and one stream for all of them: cuBLAS takes a workspace for every stream, 8 MiB on Volta and 32 on Hopper.
        self._pool: Any = None
        self._stream: Any = None
        self.broken = False

    def run(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor | None:
        """Logits of one step, or None where capturing has failed. Rows beyond those asked for write into slots that are not in use."""
        rows, longest = rounded(len(tokens), max(lengths) + 1, self._slots, self._max_tokens)
        spare = [0] * (rows - len(tokens))
        self._tokens[:rows].copy_(torch.tensor([*tokens, *spare]))
        self._lengths[:rows].copy_(torch.tensor([*lengths, *spare]))
        if not self._has(rows, longest):
            return None
        graph, logits = self._captured[rows, longest]
        graph.replay()
        return logits[: len(tokens)]

    def prepare(self, longest: Sequence[int]) -> None:
        """Captures all numbers of rows with so many tokens. No slot may be in use: the first token of each is written over."""
        self._tokens.zero_()
        self._lengths.zero_()
        counts = {rounded(rows, 1, self._slots, self._max_tokens)[0] for rows in range(1, self._slots + 1)}
        for most in sorted({rounded(1, tokens, self._slots, self._max_tokens)[1] for tokens in longest}):
            for rows in sorted(
                counts, reverse=True
            ):  # the largest first: what the others need of memory is in its pool
                if self.broken or not self._has(rows, most):
                    return

    def _has(self, rows: int, longest: int) -> bool:
        """Whether the step is captured, now if not before."""
        if (rows, longest) not in self._captured:
            try:
                self._captured[rows, longest] = self._capture(rows, longest)
            except RuntimeError as error:
                self.broken = True
                self._say(f"CUDA graphs are not used: capturing a step failed ({str(error).splitlines()[0]}).")
                return False
        return True

    def _capture(self, rows: int, longest: int) -> tuple[Any, torch.Tensor]:
        given = self._tokens[:rows], self._lengths[:rows], longest
        self._stream = side = self._stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # Libraries set themselves up; the step writes the same keys and values every time.
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step(*given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            logits = self._step(*given)
        self._pool = self._pool or graph.pool()
        return graph, logits


def rounded(rows: int, longest: int, slots: int, max_tokens: int) -> tuple[int, int]:
    """Rows up to a power of two and tokens up to a MULTIPLE, within the cache."""
    return min(slots, 1 << (rows - 1).bit_length()), min(max_tokens, -(-longest // MULTIPLE) * MULTIPLE)
