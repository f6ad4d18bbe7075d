"""Several processes as one job: how a process joins it, waits for the others, is told to stop, and ends when another has ended."""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from rad_jax.errors import UserError

# Of exit statuses this one says: start the job again, it goes on from its newest checkpoint.
RESTART = 42

# A process that is silent for so long counts as dead. A collective may not notice it; JAX then says so and aborts the others.
_HEARTBEAT_SECONDS = 60
# A process that fails stays for so long, so that others that fail alike can say so before they lose it.
_GRACE_SECONDS = 5.0

# What JAX, its CPU collectives (Gloo) and Orbax say when a process they wait for is gone.
_LOST = re.compile(r"gloo|connection (closed|reset|refused)|heartbeat|barrier|coordination service|socket closed", re.I)


def define_flags() -> None:
    """--multihost, and what it needs where nothing tells the processes of each other."""
    from absl import flags

    flags.DEFINE_boolean(
        "multihost",
        False,
        "This is one of several processes of a job: give all of them the same command. On Cloud TPU, and under SLURM or Open MPI "
        "with a process per GPU, they find each other; elsewhere give --coordinator, --num_processes and --process_id too.",
    )
    flags.DEFINE_string("coordinator", None, "With --multihost: HOST:PORT for process 0 to listen on, any free port.")
    flags.DEFINE_integer("num_processes", None, "With --multihost: how many processes.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "With --multihost: which of them this is, from 0.", lower_bound=0)


def join() -> None:
    """Makes this process one of its job, as the flags say; before anything else touches a device.

    Raises:
        UserError: the flags do not fit each other, or the other processes are not found.
    """
    import jax
    from absl import flags

    options = flags.FLAGS
    given = {
        "coordinator_address": options.coordinator,
        "num_processes": options.num_processes,
        "process_id": options.process_id,
    }
    if options.multihost:
        faulthandler.disable()  # absl's: where JAX aborts, it would bury what JAX says under the stacks of all threads
        try:
            jax.distributed.initialize(**given, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"this process cannot join its job ({str(error).splitlines()[0]}): "
                "give --coordinator, --num_processes and --process_id, and start all processes."
            ) from error
    elif any(value is not None for value in given.values()):
        raise UserError("--coordinator, --num_processes and --process_id belong to --multihost: add it.")
    elif jax.process_count() > 1:
        raise UserError(f"this is one of {jax.process_count()} processes of a pod: give all of them --multihost.")


def first() -> bool:
    """Whether this is process 0, which writes what the job writes and tells what it tells."""
    import jax

    return jax.process_index() == 0


def agree(found: str) -> None:
    """Returns when every process of the job has come to this point and has found the same, in a folder that all see.

    Raises:
        UserError: one has found something else.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        try:
            multihost_utils.sync_global_devices(found)
        except AssertionError:
            raise UserError(
                f"process {jax.process_index()} finds {found}, another does not: name folders that all machines share."
            ) from None


def before_listening() -> None:
    """SIGTERM from now on ends this process with RESTART, until a `Stop` or JAX listens: it has done nothing that could be saved."""
    _on_sigterm(_go)


def _on_sigterm(act: Callable[[], None]) -> None:
    """Has a thread call `act` at every SIGTERM, in place of what was there; in the main thread.

    Python's own handlers wait until the main thread is back from C++, which may be minutes away when it compiles or waits for the other
    processes of a job; this does not. JAX, once it has joined a job, puts its own handler in C++ over this one.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGTERM:
                act()

    threading.Thread(target=wait, name="stop", daemon=True).start()


def _go() -> NoReturn:
    os.write(2, b"told to stop (SIGTERM): start again to go on.\n")  # the thread that prints may be the one that hangs
    exit_now(RESTART)


# What is done when this process ends in the middle of something.
_at_exit: list[Callable[[], None]] = []


@contextlib.contextmanager
def at_exit(last: Callable[[], None]) -> Iterator[None]:
    """Has `last` called at the end of this stretch, or before this process ends within it by `exit_now`."""
    _at_exit.append(last)
    try:
        yield
    finally:
        _at_exit.remove(last)
        last()


def exit_now(status: int) -> NoReturn:
    """Ends this process, whatever its threads are doing; what `at_exit` was given comes first."""
    for last in _at_exit:
        with contextlib.suppress(Exception):
            last()
    os._exit(status)


class Stop:
    """Whether this job was told to stop, by SIGTERM to any of its processes, as before a machine is taken away.

    Of several processes JAX notes the signal, and has all of them learn of it at the same question. A process alone notes it itself, once
    it listens; until then see `before_listening`.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._told = threading.Event()
        self._leaving = threading.Lock()
        self._before: Callable[[], None] | None = None

    def listen(self) -> None:
        """Notes SIGTERM from now on; in the main thread. Of a job, nothing is to be done: JAX listens."""
        if _joined():
            return
        _on_sigterm(self._tell)

    def reached(self) -> bool:
        """Whether to save and stop now. Every process of a job must ask equally often, at the same points."""
        from jax.experimental import multihost_utils

        if not _joined():
            return self._told.is_set()
        self._asked += 1
        return self._told.is_set() or multihost_utils.reached_preemption_sync_point(self._asked)

    @contextlib.contextmanager
    def at_once(self, before: Callable[[], None] = lambda: None) -> Iterator[None]:
        """A stretch in which nothing is lost by stopping: a process alone that is told to ends right there, after `before`, with RESTART."""
        self._before = before
        try:
            if self._told.is_set() and not _joined():
                self._leave()
            yield
        finally:
            with self._leaving:  # once it leaves, it does not go on
                self._before = None

    def _tell(self) -> None:
        self._told.set()
        self._leave()

    def _leave(self) -> None:
        with self._leaving:
            if self._before is not None:
                self._before()
                _go()


def of_first(value: float) -> float:
    """Process 0's number, in every process: what depends on its clock must not be decided by each for itself."""
    import jax
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(value)) if jax.process_count() > 1 else value


def end(error: BaseException) -> None:
    """Ends one of several processes on an error: in one sentence and with status RESTART when the error is that another has ended.

    Returns where this process is not one of a job.
    """
    if not _joined():
        return
    if says_lost(error):
        print(
            "error: another process of this job has ended: see what it wrote, and start all of them again.",
            file=sys.stderr,
        )
        leave(RESTART, grace=0)
    traceback.print_exception(error)
    leave(1)


def leave(status: int, grace: float = _GRACE_SECONDS) -> None:
    """Ends one of several processes without waiting for the others, who may be waiting for it: that it is gone ends them too.

    Returns where this process is not one of a job.
    """
    if not _joined():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(grace)
    exit_now(status)


def _joined() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def says_lost(error: BaseException) -> bool:
    """Whether an error, or the one behind it, comes of a process that is gone."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError) and _LOST.search(str(seen)):  # JaxRuntimeError is one
            return True
        # As JAX raises it where a program fails while it is begun.
        if isinstance(seen, ValueError) and "Gloo" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
