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
# A sign of life in WORKDIR/lock so often; after a silence of so long it counts for nothing. A mounted bucket may show what is a minute old.
_BEAT_SECONDS, _SILENT_SECONDS, _SIGN_BYTES = 20.0, 180.0, 255
_BAD_LEAST = 1000  # rows of which the share of bad ones is judged, so that the first bad one does not end a run
# A loss is a spike when it is so many times the usual distance from the median of the losses before it.
_SPIKE, _SPIKE_WINDOW, _SPIKE_LEAST = 12.0, 100, 20

Sign = dict[str, Any]


def say(message: str) -> None:
    """One line on stderr, from process 0."""
    if distributed.first():
        _write(f"note: {message}")


def _write(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # beside the progress bar
    sys.stderr.flush()


# ----------------------------------------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds WORKDIR/lock, so that no second job writes there. The kernel lets go of it when the process ends.

    The kernel knows of this machine alone where the folder is an object store. So the file says too who has it, with a sign of life every
    `_BEAT_SECONDS`, and is empty when it ends: whoever finds the sign of another machine waits whether there comes another one.

    Of several processes the first holds it. File systems without locks are said so.

    Raises:
        UserError: another process has it.
    """
    if not distributed.first():
        yield
        return
    path, locks = workdir / "lock", True
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(workdir, holder(workdir)) from None
        except OSError as error:
            locks = False
            say(f"{workdir}: files cannot be locked here ({error.strerror}); see that no other job writes there.")
        _await_silence(workdir, locks)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        _sign(path, me)
        stopped = threading.Event()
        thread = threading.Thread(target=_beat, args=(path, me, stopped), name="lock", daemon=True)
        thread.start()

        def release() -> None:
            stopped.set()
            thread.join()
            path.write_text("")

        with distributed.at_exit(release):
            yield


def holder(workdir: Path) -> str | None:
    """Who holds WORKDIR/lock: "process 17 on HOST"; None when nobody does."""
    path, locks = workdir / "lock", True
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return _named(_read_sign(path))
    except OSError:
        locks = False
    found = _read_sign(path)
    fresh = found is not None and abs(time.time() - found.get("time", 0.0)) < _SILENT_SECONDS
    return _named(found) if fresh and _beyond(found, locks) else None


def _in_use(workdir: Path, who: str | None) -> UserError:
    return UserError(
        f"{workdir} is in use by {who or 'another process'}: wait for it to end, or give another --workdir."
    )


def _named(found: Sign | None) -> str:
    return f"process {found['pid']} on {found['host']}" if found else "another process"


def _beyond(found: Sign | None, locks: bool) -> bool:
    """Whether a sign may be that of a living process although the kernel knows of no lock."""
    if not found or "time" not in found:
        return False
    if found["host"] != socket.gethostname():
        return True
    return not locks and Path(f"/proc/{found['pid']}").exists()


def _await_silence(workdir: Path, locks: bool) -> None:
    """Returns when no process of another machine gives signs of life.

    Raises:
        UserError: one does.
    """
    path = workdir / "lock"
    found = _read_sign(path)
    if (
        not found
        or not _beyond(found, locks)
        or (found["pid"] == os.getpid() and found["host"] == socket.gethostname())
    ):
        return
    if abs(time.time() - found["time"]) > 10 * _SILENT_SECONDS:
        return
    say(f"{_named(found)} has not let go of {workdir}: waiting {_SILENT_SECONDS:.0f} s for another sign of it.")
    until = time.monotonic() + _SILENT_SECONDS
    while time.monotonic() < until:
        time.sleep(_SILENT_SECONDS / 30)
        again = _read_sign(path)
        if again == {}:  # it has ended
            return
        if again and again != found:
            raise _in_use(workdir, _named(again))


def _beat(path: Path, me: Sign, stopped: threading.Event) -> None:
    """Renews a sign, and says when there is one of another job."""
    said = False
    while not stopped.wait(_BEAT_SECONDS):
        found = _read_sign(path)
        if found and not said and any(found.get(key) != value for key, value in me.items()):
            said = True
            say(f"{_named(found)} writes to {path.parent} too: end one of the two.")
        with contextlib.suppress(OSError):  # a disk that is full is said by what needs the room
            _sign(path, me)


def _sign(path: Path, me: Sign) -> None:
    """Writes in place, and at once: others may read meanwhile, and the lock is on this very file. Closed, so that a bucket gets it."""
    with path.open("r+b") as file:
        file.write(json.dumps({**me, "time": time.time()}).ljust(_SIGN_BYTES).encode() + b"\n")
        file.truncate()


def _read_sign(path: Path) -> Sign | None:
    """What the file says; empty when nobody has it, None when it cannot be read just now."""
    try:
        text = path.read_text()
        return json.loads(text) if text.strip() else {}
    except (OSError, ValueError):
        return None


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
        self._listed: set[int] = {row["row"] for row in metrics.lines(self._file)}
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
    """Says, once each time it begins, that this process waits for its data, as each of a job may: the others then wait for it."""

    def __init__(self) -> None:
        self._slow = False

    def see(self, share: float) -> None:
        """`share` of the time between two logs that was waited."""
        if share > SLOW and not self._slow:
            import jax

            who = "" if distributed.first() else f" of process {jax.process_index()}"
            _write(
                f"note: {share:.0%} of the time{who} is waiting for data: raise --config.data.num_threads, or put the corpus on a faster disk."
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
        end: Callable[[int], Any] = distributed.exit_now,
        file: IO[str] | None = None,
    ):
        self._seconds, self._doing, self._end, self._file = seconds, doing, end, file or sys.__stderr__ or sys.stderr
        self._moved, self._patient = time.monotonic(), False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Something has moved."""
        self._moved = time.monotonic()

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """A stretch that gives no signs and that another start would go through again: it is said, and the process goes on."""
        self._patient = True
        try:
            yield
        finally:
            self.beat()
            self._patient = False

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        said = 0.0
        while not self._stopped.wait(self._seconds / 20):
            moved = self._moved
            still = time.monotonic() - moved
            if still > 2 * self._seconds and not self._patient:
                self._tell(f"error: nothing has moved for {still:.0f} s while {self._doing()}: ending, start again.")
                self._end(distributed.RESTART)
                return
            if still > self._seconds and said != moved:
                said = moved
                self._tell(f"note: nothing has moved for {still:.0f} s while {self._doing()}; all threads:")
                faulthandler.dump_traceback(self._file, all_threads=True)

    def _tell(self, message: str) -> None:
        print(message, file=self._file, flush=True)
