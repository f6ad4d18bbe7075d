"""What looks after a run while nobody does: one job per folder, steps that are skipped, spikes, standstill, slow data, wrong clocks."""

import collections
import contextlib
import faulthandler
import fcntl
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from rad_jax import distributed, metrics
from rad_jax.errors import UserError

SKIPS = 5  # steps skipped one after another, after which a run ends
SLOW = 0.2  # share of its time that a run may wait for data before it says so
_SKEW_SECONDS = 10.0
_BAD_LEAST = 1000  # rows of which the share of bad ones is judged, so that the first bad one does not end a run
# A loss is a spike when it is so many times the usual distance from the median of the losses before it.
_SPIKE, _SPIKE_WINDOW, _SPIKE_LEAST = 12.0, 100, 20


def say(message: str) -> None:
    """One line on stderr, from process 0."""
    if distributed.first():
        tqdm.write(f"note: {message}", file=sys.stderr)  # beside the progress bar
        sys.stderr.flush()


# ----------------------------------------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds WORKDIR/lock, so that no second job writes there; the file says who has it. The kernel lets go of it when the process ends.

    Of several processes the first holds it. File systems without locks are said so.

    Raises:
        UserError: another process has it.
    """
    if not distributed.first():
        yield
        return
    with (workdir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{workdir} is in use by {holder(workdir)}: wait for it to end, or give another --workdir."
            ) from None
        except OSError as error:
            say(f"{workdir}: files cannot be locked here ({error.strerror}); see that no other job writes there.")
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}) + "\n")
        file.flush()
        yield


def holder(workdir: Path) -> str | None:
    """Who holds WORKDIR/lock: "process 17 on HOST"; None when nobody does."""
    try:
        with (workdir / "lock").open() as file:
            text = file.read()
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        with contextlib.suppress(ValueError, KeyError):
            found = json.loads(text)
            return f"process {found['pid']} on {found['host']}"
        return "another process"


def check_clock(workdir: Path) -> None:
    """Says when this machine's clock is not the one of the machine that keeps the folder: times of several machines are compared."""
    file = workdir / f".clock-{os.getpid()}-{socket.gethostname()}"
    file.touch()
    skew = time.time() - file.stat().st_mtime
    file.unlink()
    if abs(skew) > _SKEW_SECONDS:
        print(
            f"note: the clock of {socket.gethostname()} is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of {workdir}: "
            "times, rates over restarts and costs will be wrong by as much; set it (NTP).",
            file=sys.stderr,
            flush=True,
        )


# ----------------------------------------------------------------------------------------------------------------------- the numbers


class Skips:
    """Steps whose loss or gradient was no number: the step left everything as it was. Listed in WORKDIR/skipped.jsonl.

    Args:
        names: gives the ids of records by their row numbers.
        before: steps of the run that were skipped before.
    """

    def __init__(self, workdir: Path, names: Callable[[Sequence[int]], list[str]], before: int = 0):
        self._file, self._names = workdir / "skipped.jsonl", names
        self._row, self.total = 0, before

    def see(self, step: int, loss: float, grad_norm: float, skipped: bool, rows: Callable[[], Any]) -> None:
        """Judges one step; `rows` gives the global batch's row numbers, and is asked on every process.

        Raises:
            UserError: `SKIPS` steps were skipped one after another.
        """
        if not skipped:
            self._row = 0
            return
        self._row += 1
        self.total += 1
        numbers = [int(number) for number in rows()]
        if distributed.first():
            record = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": numbers}
            metrics.append(self._file, {**record, "ids": self._names(numbers)})
        say(
            f"step {step} is skipped: its loss is {loss} and its gradient's norm {grad_norm}; its records are in {self._file}."
        )
        if self._row == SKIPS:
            raise UserError(
                f"the loss is {loss} at step {step}: lower optimizer.peak_lr, or look at the records of the {SKIPS} steps skipped in a row "
                f"in {self._file}."
            )


class BadRows:
    """Rows that teach nothing: damaged records, images that cannot be decoded, no text. Listed once in WORKDIR/bad_rows.jsonl.

    Args:
        names: gives the ids of records by their row numbers.
        limit: share of the rows, of at least `_BAD_LEAST`, that may be bad.
    """

    def __init__(self, workdir: Path, names: Callable[[Sequence[int]], list[str]], limit: float):
        self._file, self._names, self._limit = workdir / "bad_rows.jsonl", names, limit
        self._listed: set[int] = set()
        if self._file.is_file():
            self._listed.update(json.loads(line)["row"] for line in self._file.read_text().splitlines())
        self.total = self._rows = 0

    def see(self, step: int, rows: int, bad: int, which: Callable[[], Sequence[int]]) -> None:
        """Counts one step's `rows`, of which `bad` are; `which` gives the numbers of these, and is asked on every process.

        Raises:
            UserError: there are too many by now.
        """
        self._rows += rows
        if not bad:
            return
        self.total += bad
        new = sorted(set(which()) - self._listed)
        self._listed.update(new)
        if distributed.first():
            for number, name in zip(new, self._names(new), strict=True):
                metrics.append(self._file, {"step": step, "row": number, "id": name})
        if self.total > self._limit * max(self._rows, _BAD_LEAST):
            raise UserError(
                f"{self.total} of {self._rows} rows up to step {step} could not be learned from, more than --bad_rows={self._limit:g} allows: "
                f"they are in {self._file}; mend or pack the corpus again, or raise the limit."
            )


class Spikes:
    """Losses that stand out from those before them. Listed in WORKDIR/spikes.jsonl.

    Args:
        names: gives the ids of records by their row numbers.
        before: steps of the run done before; those listed up to there still count.
    """

    def __init__(self, workdir: Path, names: Callable[[Sequence[int]], list[str]], before: int = 0):
        self._file, self._names = workdir / "spikes.jsonl", names
        self._seen: collections.deque[float] = collections.deque(maxlen=_SPIKE_WINDOW)
        self._steps = {row["step"] for row in metrics.lines(self._file) if row["step"] <= before}

    @property
    def total(self) -> int:
        """Spikes of the run."""
        return len(self._steps)

    def see(self, step: int, loss: float, rows: Callable[[], Any]) -> bool:
        """Whether it is a spike, which is said: over the median by `_SPIKE` times the median distance from it.

        `rows` gives the global batch's row numbers, and is asked on every process: all have seen the same losses.
        """
        found = False
        if len(self._seen) >= _SPIKE_LEAST:
            middle = statistics.median(self._seen)
            usual = statistics.median(abs(value - middle) for value in self._seen)
            found = loss > middle + _SPIKE * max(usual, 1e-3 * abs(middle))
        if found:
            self._steps.add(step)
            numbers = [int(number) for number in rows()]
            if distributed.first():
                record = {"step": step, "loss": loss, "median": middle, "rows": numbers}
                metrics.append(self._file, {**record, "ids": self._names(numbers)})
            say(
                f"the loss jumps to {loss:.4f} at step {step}; the median of the last {len(self._seen)} is {middle:.4f}; "
                f"its records are in {self._file}."
            )
        self._seen.append(loss)
        return found


class SlowData:
    """Says, once each time it begins, that a run waits for its data."""

    def __init__(self) -> None:
        self._slow = False

    def see(self, share: float) -> None:
        """`share` of the time between two logs that was waited."""
        if share > SLOW and not self._slow:
            say(
                f"{share:.0%} of the time is waiting for data: raise --config.data.num_threads, or put the corpus on a faster disk."
            )
        self._slow = share > SLOW


# ----------------------------------------------------------------------------------------------------------------------- standstill


class Watchdog:
    """A thread that says when nothing has moved for `seconds`, with the stacks of all threads, and after as long again ends the process.

    Args:
        seconds: of standstill.
        doing: tells what the run is doing, for people.
        end: ends the process; with RESTART, so that whoever started it starts it again.
    """

    def __init__(
        self,
        seconds: float,
        doing: Callable[[], str],
        end: Callable[[int], Any] = os._exit,
        file: IO[str] | None = None,
    ):
        self._seconds, self._doing, self._end, self._file = seconds, doing, end, file or sys.__stderr__ or sys.stderr
        self._moved = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Something has moved."""
        self._moved = time.monotonic()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        said = 0.0
        while not self._stopped.wait(self._seconds / 20):
            moved = self._moved
            still = time.monotonic() - moved
            if still > 2 * self._seconds:
                self._tell(f"error: nothing has moved for {still:.0f} s while {self._doing()}: ending, start again.")
                self._end(distributed.RESTART)
                return
            if still > self._seconds and said != moved:
                said = moved
                self._tell(f"note: nothing has moved for {still:.0f} s while {self._doing()}; all threads:")
                faulthandler.dump_traceback(self._file, all_threads=True)

    def _tell(self, message: str) -> None:
        print(message, file=self._file, flush=True)
