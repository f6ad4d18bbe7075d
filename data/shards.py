"""Shards: the unit of packing. Each is written whole, with a receipt, by one process; what is finished is never made again.

A task is a stretch of a split's inputs and the file they go to. Tasks do not know of each other, so that any number of processes, on this
machine or on a cluster that Apache Beam reaches, can do them in any order and be killed at any time: the shards come out the same.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import tqdm

from rad_jax.errors import UserError

MOST, FEWEST, AIM = 1024, 64, 64  # inputs of a shard, and shards of a split if it has that many inputs
BROKEN = ("missing image", "unreadable image")  # reasons that speak of damage; the others are a choice
BAD_ROWS = 0.05  # share of the inputs that may be broken where nothing else is said
_BAD_LEAST = 100  # inputs of which that share is judged, so that one bad film does not refuse a small corpus
RESTARTS = 3  # of the worker processes, when one was killed and none has finished a shard since

Make = Callable[[Any], Any]


class Stopped(UserError):
    """Packing ended early; the shards that are finished stay for the next run."""


@dataclasses.dataclass(frozen=True)
class Skip:
    """An input that became no record, and why.

    `reason` is one of few phrases, so that it can be counted; `detail` is what the reader or decoder said, if any did: no place, which
    another machine would not have, and nothing of a report.
    """

    id: str
    image: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A shard to be written.

    Attributes:
        split: its split.
        path: the ArrayRecord file; the receipt lies beside it.
        jobs: the inputs in the order of the records.
        make: from an input to a record or a `Skip`; picklable.
        serialise: from a record to bytes; picklable.
    """

    split: str
    path: Path
    jobs: Sequence[Any]
    make: Make
    serialise: Callable[[dict[str, Any]], bytes]

    @property
    def receipt(self) -> Path:
        return self.path.with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What is in a finished shard: `wanted` inputs became `records` records and `skipped`, `views` counts the records' views."""

    wanted: int
    records: int
    bytes: int
    sha256: str
    views: dict[str, int]
    skipped: list[Skip]


def plan(count: int) -> list[slice]:
    """The inputs of each shard of a split of `count`: at most 1024, fewer where the split is small, so that processes can share it."""
    size = min(MOST, max(FEWEST, -(-count // AIM)))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def write(task: Task) -> Receipt:
    """Writes a shard and then its receipt, each under another name first; a shard that is finished is left alone."""
    from array_record.python.array_record_module import ArrayRecordWriter

    if known := finished(task):
        return known
    # A name of its own: a cluster may give the same task to two machines.
    part = task.path.with_suffix(f".{secrets.token_hex(4)}.part")
    skipped: list[Skip] = []
    views: dict[str, int] = {}
    try:
        # The images are compressed already.
        writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        for job in task.jobs:
            made = task.make(job)
            if isinstance(made, Skip):
                skipped.append(made)
                continue
            writer.write(task.serialise(made))
            view = made["view"] or "unknown"
            views[view] = views.get(view, 0) + 1
        writer.close()
        receipt = Receipt(
            wanted=len(task.jobs),
            records=sum(views.values()),
            bytes=part.stat().st_size,
            sha256=sha256(part),
            views=views,
            skipped=skipped,
        )
        part.replace(task.path)
        part.write_text(json.dumps(dataclasses.asdict(receipt)))
        part.replace(task.receipt)
    finally:
        part.unlink(missing_ok=True)
    return receipt


def finished(task: Task) -> Receipt | None:
    """The receipt of a shard that is whole; None where the shard or its receipt is missing, damaged, or of other inputs."""
    try:
        found = json.loads(task.receipt.read_text())
        receipt = Receipt(**found | {"skipped": [Skip(**skip) for skip in found["skipped"]]})
        whole = receipt.wanted == len(task.jobs) == receipt.records + len(receipt.skipped)
        whole = whole and task.path.stat().st_size == receipt.bytes and sha256(task.path) == receipt.sha256
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return receipt if whole else None


def run(
    tasks: Sequence[Task], workers: int, progress: bool, bad_rows: float, known: Sequence[Skip] = ()
) -> list[Receipt]:
    """Does the tasks that are not done, over processes.

    Args:
        tasks: of all splits.
        workers: processes; 1 works in this one.
        progress: whether to show a bar on stderr, with films per second and the time that is left.
        bad_rows: share of all inputs that may be missing or damaged.
        known: inputs that are no task's because they were seen to be unusable before.

    Returns:
        The receipts, in the order of the tasks.

    Raises:
        Stopped: worker processes were killed again and again, or more inputs than that are missing or damaged.
    """
    done = {task.path: receipt for task in tasks if (receipt := finished(task))}
    todo = [task for task in tasks if task.path not in done]
    total = sum(len(task.jobs) for task in tasks)
    check_broken(tasks, done, bad_rows, known)
    kept = sum(receipt.wanted for receipt in done.values())
    with tqdm.tqdm(total=total, initial=kept, desc="packing", unit="film", disable=not progress) as bar:
        for task, receipt in _each(todo, workers):
            done[task.path] = receipt
            bar.update(receipt.wanted)
            check_broken(tasks, done, bad_rows, known)
    for part in {part for folder in {task.path.parent for task in tasks} for part in folder.glob("*.part")}:
        part.unlink()  # of a process that was killed
    return [done[task.path] for task in tasks]


def run_on_beam(
    tasks: Sequence[Task], runner: str | None, options: Any, bad_rows: float, known: Sequence[Skip] = ()
) -> list[Receipt]:
    """The same on Apache Beam; every machine of the runner must see the folder of the shards and the films under the same paths.

    Args:
        tasks: of all splits.
        runner: a name that Beam knows; None leaves it to the options.
        options: Beam's `PipelineOptions`.
        bad_rows, known: as in `run`; what the tasks find is looked at when all are done.
    """
    import apache_beam as beam

    check_broken(tasks, {}, bad_rows, known)
    todo = [task for task in tasks if not finished(task)]
    with beam.Pipeline(runner=runner, options=options) as pipeline:
        shards = pipeline | "Shards" >> beam.Create(todo) | "Share" >> beam.Reshuffle()
        shards | "Write" >> beam.Map(write)
    receipts = [receipt for task in tasks if (receipt := finished(task))]
    if len(receipts) < len(tasks):
        raise Stopped(f"{len(tasks) - len(receipts)} of {len(tasks)} shards are missing: run the same command again.")
    check_broken(tasks, {task.path: receipt for task, receipt in zip(tasks, receipts, strict=True)}, bad_rows, known)
    return receipts


def check_broken(
    tasks: Sequence[Task], done: Mapping[Path, Receipt], bad_rows: float, known: Sequence[Skip] = ()
) -> None:
    """Raises Stopped when more than this share of the inputs is missing or damaged; names the first.

    Shards that lack such an input are then no longer finished, so that the next run finds it mended.

    Args:
        tasks: all of them.
        done: path -> receipt of those that are finished.
        bad_rows: the share, of at least `_BAD_LEAST` inputs.
        known: as in `run`; of these too only what is `BROKEN` counts, among the inputs and against the limit.
    """
    before = [skip for skip in known if skip.reason in BROKEN]
    found = before + [skip for receipt in done.values() for skip in receipt.skipped if skip.reason in BROKEN]
    total = len(before) + sum(len(task.jobs) for task in tasks)
    if len(found) <= bad_rows * max(total, _BAD_LEAST):
        return
    for task in tasks:
        if task.path in done and any(skip.reason in BROKEN for skip in done[task.path].skipped):
            task.receipt.unlink(missing_ok=True)
    first = found[0]
    raise Stopped(
        f"{len(found)} of {total} inputs cannot be used, more than --bad_rows={bad_rows:g} allows; the first is {first.image}, "
        f"{first.reason}: mend them, or allow more."
    )


def place(task: Task, path: Path) -> None:
    """Gives a finished shard its final name beside the first one, so that a run which is stopped now finds it still."""
    try:
        os.link(task.path, path)
    except OSError:  # a file system without links
        shutil.copyfile(task.path, path)


def sha256(path: Path) -> str:
    """Of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _each(todo: Sequence[Task], workers: int) -> Iterator[tuple[Task, Receipt]]:
    """Does tasks and gives them as they are finished."""
    if workers <= 1:
        for task in todo:
            yield task, write(task)
        return
    left, restarts = list(todo), 0
    while left:
        before = len(left)
        try:
            with pool(min(workers, len(left))) as processes:
                futures = {processes.submit(write, task): task for task in left}
                for future in concurrent.futures.as_completed(futures):
                    receipt = future.result()
                    left.remove(futures[future])
                    yield futures[future], receipt
        except BrokenProcessPool as error:
            restarts = restarts + 1 if len(left) == before else 1
            if restarts > RESTARTS:
                raise Stopped(
                    f"a worker process was killed {restarts} times, perhaps for want of memory; finished shards are kept: "
                    "run the same command again with fewer --workers."
                ) from error


@contextlib.contextmanager
def pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes that end with this one. They are spawned, because TFDS runs threads and forking those can hang."""
    made = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), functools.partial(_end_with, os.getpid())
    )
    try:
        yield made
    finally:
        made.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """Lets this process end when its parent has: one that was killed cannot tell its workers."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
