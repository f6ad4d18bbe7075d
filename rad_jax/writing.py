"""Findings for a whole corpus: prompts of like length go together, and what is written is kept when the run is killed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax.chat import access
from rad_jax.errors import UserError

_MULTIPLE = 64  # tokens that a length is rounded up to; each rounded length is compiled once


def by_length(lengths: np.ndarray, batch_size: int, multiple: int = _MULTIPLE) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts rows into batches of like length, the longest first, so that what does not fit in memory does not fit at once.

    Args:
        lengths: int [n], tokens of each row.
        batch_size: rows of a batch.
        multiple: a batch is padded to a multiple of it, but not past the longest row of all, rounded up to 8.

    Yields:
        A padded length T, and the places of all rows that go in batches of it: whole batches, but for the very last.
    """
    order = np.argsort(-lengths, kind="stable")
    longest = -(-int(lengths.max(initial=0)) // 8) * 8
    groups: dict[int, list[np.ndarray]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        padded = -(-int(lengths[rows[0]]) // multiple) * multiple
        groups.setdefault(min(padded, longest), []).append(rows)
    for length, batches in groups.items():
        yield length, np.concatenate(batches)


class Unfinished:
    """OUT.partial: rows as they come, each on disk when its batch is done; a later start with the same settings goes on from there.

    Both files are for their owner's eyes unless `level` is public. The first line holds the settings, every other one a row with the number it is sorted by in the end.

    Attributes:
        rows: what is written so far, by number.

    Raises:
        UserError: the file is of other settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], level: str = access.PRIVATE):
        self._out, self._path, self._level = out, out.with_name(out.name + ".partial"), level
        self._head = json.dumps(settings, sort_keys=True).encode()
        self.rows: dict[int, dict[str, str]] = {}
        # A killed process may leave half a line, which has no end.
        *lines, _ = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        if lines and lines[0] != self._head:
            raise UserError(f"{self._path} was begun with other settings: remove it, or choose another --out.")
        for line in lines[1:]:
            number, row = json.loads(line)
            self.rows[number] = row
        self._size = sum(len(line) + 1 for line in lines)

    def add(self, found: Mapping[int, dict[str, str]]) -> None:
        """Rows of one batch."""
        lines = [json.dumps([*item], ensure_ascii=False).encode() for item in found.items()]
        if not self._size:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            access.create(self._path, self._level)
            lines = [self._head, *lines]
        with self._path.open("r+b") as file:
            file.truncate(self._size)
            file.seek(self._size)
            self._size += file.write(b"".join(line + b"\n" for line in lines))
        self.rows.update(found)

    def finish(self, count: int) -> None:
        """Makes OUT, whole or not at all: the rows with numbers below `count`, in order."""
        rows = (self.rows[number] for number in sorted(self.rows) if number < count)
        whole = self._out.with_name(self._out.name + ".whole")
        access.create(whole, self._level).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        whole.replace(self._out)
        self._path.unlink(missing_ok=True)
