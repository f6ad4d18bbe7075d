"""Findings for a list of films: CSV in, JSON lines out, and on again after whatever stopped it."""

import collections
import contextlib
import csv
import dataclasses
import fcntl
import hashlib
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
from rad_jax.serving.audit import Audit, film_fields
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


def run(
    engine: Engine, source: Path, out: Path, *, dicom: str, max_new_tokens: int, audit: Audit | None = None
) -> tuple[int, int]:
    """Writes a line {id, image, findings, finish_reason, warnings, model, version, bundle, asked} to `out` for each row of `source`.

    Lines come in the order of the rows, each whole and on the disk before the next is begun. The same command after a kill goes on
    with the rows that are not there. Rows that could not be answered are listed in OUT.bad.jsonl, anew each time, and are tried again.
    `asked` tells what a text was written for: a hash of the indication and of all settings that change it.

    Args:
        engine: stays open.
        source: CSV with the columns image and, if given, indication and id (else the row's number). Files are looked for beside it.
        out: JSON lines.
        dicom: how a DICOM's grey values are made.
        max_new_tokens: longest text.
        audit: gets a line for each row that is answered or refused.

    Returns:
        How many rows `out` has, and how many are bad.

    Raises:
        UserError: the list cannot be used, `out` was made of another list, by another model or with other settings, another process is
            writing it, the audit log cannot be written, or the engine has failed for good.
    """
    rows = read(source)
    info = engine.info
    settings = {"dicom": dicom, "weights": info.weights, "dtype": info.dtype, "max_new_tokens": max_new_tokens}
    asked = {row.id: hashed(row.indication, settings) for row in rows}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(opened(out))
        done = repair(file, out, {row.id: row for row in rows}, info.bundle_sha256, asked)
        bad = stack.enter_context(emptied(bad_path(out)))
        films = stack.enter_context(contextlib.closing(Films()))
        engine.others = films.busy
        todo = [row for row in rows if row.id not in done]
        writer = _Writer(engine, films, source.parent, dicom, max_new_tokens)
        wrong = 0
        with tqdm(total=len(rows), initial=len(done), desc="findings", unit="film") as bar:
            for row, answer, record in writer.answers(todo):
                if engine.failed:
                    raise UserError(
                        f"{engine.failed}: run the same command again, which goes on with the rows that are missing."
                    )
                if audit:
                    audit.write(route="batch", **record)
                    if audit.broken:
                        raise UserError(
                            "the audit log cannot be written: make room for it, and run the same command again."
                        )
                if isinstance(answer, BadRow):
                    wrong += 1
                    append(bad, {"id": row.id, "image": row.image, "error": str(answer)})
                else:
                    append(file, {"id": row.id, "image": row.image, **answer, "asked": asked[row.id]})
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


def emptied(path: Path) -> BinaryIO:
    """A new file, or an old one without its contents, that its owner alone can read: ids and names of files may name patients."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o600)
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, "wb")


def hashed(indication: str | None, settings: dict[str, Any]) -> str:
    """What a row is asked, as 64 bits of SHA-256: the text itself is not to be told by it."""
    return hashlib.sha256(json.dumps([indication, settings], sort_keys=True).encode()).hexdigest()[:16]


def repair(file: BinaryIO, out: Path, rows: dict[str, Row], bundle: str, asked: dict[str, str]) -> set[str]:
    """Cuts off a line that a kill left torn, and tells the ids that are there.

    Args:
        file, out: the lines.
        rows: of the list, by id.
        bundle: hash of the bundle that writes now.
        asked: `hashed` of each id.

    Raises:
        UserError: a line is of another list, of another model, of another indication or other settings, or damaged.
    """
    file.seek(0)
    done, whole = set(), 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        try:
            found = json.loads(line)
            id, image, by, for_ = found["id"], found["image"], found["bundle"], found["asked"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out}: line {number} is not one of ours: choose another file.") from error
        if by != bundle:
            raise UserError(f"{out}: line {number} was written by another model: choose another file.")
        if id in done or id not in rows or rows[id].image != image:
            raise UserError(f"{out}: line {number} is not of this list: choose another file.")
        if for_ != asked[id]:
            raise UserError(
                f"{out}: line {number} was written for another indication, or with other --dicom, --weights, --dtype or --max_new_tokens: "
                "go on with those, or choose another file."
            )
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

    def answers(self, rows: list[Row]) -> Iterator[tuple[Row, dict[str, Any] | BadRow, dict[str, Any]]]:
        """Each row, what it got, and what an audit log may know of it."""
        waiting: collections.deque[tuple[Row, dict[str, Any], Future[dict[str, Any] | BadRow]]] = collections.deque()
        with ThreadPoolExecutor(self._ahead) as threads:
            for row in rows:
                record: dict[str, Any] = {}
                waiting.append((row, record, threads.submit(self._answer, row, record)))
                if len(waiting) == self._ahead:
                    first, told, future = waiting.popleft()
                    yield first, future.result(), told
            while waiting:
                first, told, future = waiting.popleft()
                yield first, future.result(), told

    def _answer(self, row: Row, record: dict[str, Any]) -> dict[str, Any] | BadRow:
        began = time.monotonic()
        try:
            found: dict[str, Any] | BadRow = self._findings(row, record)
            record["status"] = 200
        except (UserError, Broken) as error:
            found = BadRow(str(error))
            record["status"] = 400 if isinstance(error, UserError) else 500
        record["seconds"] = round(time.monotonic() - began, 4)
        return found

    def _findings(self, row: Row, record: dict[str, Any]) -> dict[str, Any]:
        if self._engine.failed:
            raise Broken(self._engine.failed)
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
        record.update(film_fields(film.sha256, film.pixels.shape, data), max_new_tokens=self._max_new_tokens)
        stream = self._submit(Request(film.pixels, prompts.question(row.indication), self._max_new_tokens))
        text = "".join(piece.text for piece in stream).strip()
        record.update(finish=stream.finish_reason, prompt_tokens=stream.prompt_tokens)
        record.update(completion_tokens=stream.completion_tokens)
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
