"""Findings for a list of films: CSV in, JSON lines out, and on again after whatever stopped it."""

import collections
import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from rad_jax import prompts
from rad_jax.errors import UserError
from rad_jax.serving import limits
from rad_jax.serving.engine import Broken, Engine, Full, Request
from rad_jax.serving.films import Films


@dataclasses.dataclass(frozen=True)
class Row:
    """One film of the list: its id, the file as the list names it, and the reason for the exam."""

    id: str
    image: str
    indication: str | None


class BadRow(Exception):
    """A film that cannot be read or answered; the message says why."""


def run(engine: Engine, source: Path, out: Path, *, dicom: str, max_new_tokens: int) -> tuple[int, int]:
    """Writes a line {id, image, findings, finish_reason, warnings, model, version, bundle} to `out` for each row of `source`.

    Lines come in the order of the rows, each whole and on the disk before the next is begun. The same command after a kill goes on
    with the rows that are not there. Rows that could not be answered are listed in OUT.bad.jsonl, anew each time, and are tried again.

    Args:
        engine: stays open.
        source: CSV with the columns image and, if given, indication and id (else the row's number). Files are looked for beside it.
        out: JSON lines.
        dicom: how a DICOM's grey values are made.
        max_new_tokens: longest text.

    Returns:
        How many rows `out` has, and how many are bad.

    Raises:
        UserError: the list cannot be used, `out` was made of another list or by another model, or another process is writing it.
    """
    rows = read(source)
    with opened(out) as file, open(bad_path(out), "wb") as bad, contextlib.closing(Films()) as films:
        done = repair(file, out, {row.id: row for row in rows}, engine.info.bundle_sha256)
        todo = [row for row in rows if row.id not in done]
        writer = _Writer(engine, films, source.parent, dicom, max_new_tokens)
        wrong = 0
        with tqdm(total=len(rows), initial=len(done), desc="findings", unit="film") as bar:
            for row, answer in writer.answers(todo):
                if isinstance(answer, BadRow):
                    wrong += 1
                    append(bad, {"id": row.id, "image": row.image, "error": str(answer)})
                else:
                    append(file, {"id": row.id, "image": row.image, **answer})
                bar.update()
    if not wrong:
        bad_path(out).unlink()
    return len(rows) - wrong, wrong


def bad_path(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.bad.jsonl")


def read(source: Path) -> list[Row]:
    """The rows of a list.

    Raises:
        UserError: it cannot be read, lacks the column image, or has an id twice.
    """
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if "image" not in (table.fieldnames or []):
                raise UserError(f"{source} has no column named image: the first line must name the columns.")
            found = list(table)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source} is not a CSV in UTF-8.") from error
    rows = []
    for number, line in enumerate(found, 1):
        rows.append(Row(line.get("id") or str(number), line["image"] or "", line.get("indication") or None))
    twice = [id for id, count in collections.Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise UserError(f"{source} has {len(twice)} ids more than once: an id must name one row.")
    return rows


@contextlib.contextmanager
def opened(out: Path) -> Iterator[BinaryIO]:
    """The file, to read and add to, for this process alone."""
    try:
        descriptor = os.open(out, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}).") from error
    with os.fdopen(descriptor, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{out} is being written by another process: let it end first.") from error
        yield file


def repair(file: BinaryIO, out: Path, rows: dict[str, Row], bundle: str) -> set[str]:
    """Cuts off a line that a kill left torn, and tells the ids that are there.

    Raises:
        UserError: a line is of another list, of another model, or damaged.
    """
    file.seek(0)
    done, whole = set(), 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        try:
            found = json.loads(line)
            id, image, by = found["id"], found["image"], found["bundle"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out}: line {number} is not one of ours: choose another file.") from error
        if by != bundle:
            raise UserError(f"{out}: line {number} was written by another model: choose another file.")
        if id in done or id not in rows or rows[id].image != image:
            raise UserError(f"{out}: line {number} is not of this list: choose another file.")
        done.add(id)
        whole += len(line)
    file.truncate(whole)
    return done


def append(file: BinaryIO, value: dict[str, Any]) -> None:
    """Adds a line and waits until the disk has it."""
    file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


class _Writer:
    """Keeps the engine's slots busy, and gives the answers in the order of the rows."""

    def __init__(self, engine: Engine, films: Films, folder: Path, dicom: str, max_new_tokens: int):
        self._engine, self._films, self._folder = engine, films, folder
        self._dicom, self._max_new_tokens = dicom, max_new_tokens
        self._ahead = 2 * engine.info.slots  # the more, the more is done again after a kill

    def answers(self, rows: list[Row]) -> Iterator[tuple[Row, dict[str, Any] | BadRow]]:
        waiting: collections.deque[tuple[Row, Future[dict[str, Any] | BadRow]]] = collections.deque()
        with ThreadPoolExecutor(self._ahead) as threads:
            for row in rows:
                waiting.append((row, threads.submit(self._answer, row)))
                if len(waiting) == self._ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()

    def _answer(self, row: Row) -> dict[str, Any] | BadRow:
        try:
            return self._findings(row)
        except (UserError, Broken) as error:
            return BadRow(str(error))

    def _findings(self, row: Row) -> dict[str, Any]:
        if len(row.indication or "") > limits.REASON:
            raise UserError(f"the indication has more than {limits.REASON} characters.")
        path = self._folder / row.image
        try:
            if path.stat().st_size > limits.BODY:
                raise UserError(f"the file is larger than {limits.megabytes(limits.BODY)}.")
            data = path.read_bytes()
        except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
            reason = error.strerror if isinstance(error, OSError) else "no name of a file"
            raise UserError(f"the file cannot be read ({reason}).") from error
        film = self._films.decode(data, self._dicom)
        stream = self._submit(Request(film.pixels, prompts.question(row.indication), self._max_new_tokens))
        text = "".join(piece.text for piece in stream).strip()
        info = self._engine.info
        cut = ["cut_off"] if stream.finish_reason == "length" else []
        return {
            "findings": text,
            "finish_reason": stream.finish_reason,
            "warnings": [*film.warnings, *cut],
            "model": info.name,
            "version": info.version,
            "bundle": info.bundle_sha256,
        }

    def _submit(self, request: Request) -> Any:
        while True:
            try:
                return self._engine.submit(request)
            except Full as error:
                time.sleep(error.retry_after)
