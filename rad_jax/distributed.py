"""Several processes as one job: how a process joins it, waits for the others, and ends when another has ended."""

import faulthandler
import os
import re
import sys
import time
import traceback

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


def told_to_stop(step: int) -> bool:
    """Whether all processes are to save and stop after this step, since one of them got SIGTERM.

    For jobs alone: a single process dies of SIGTERM. Every process must ask after every step, with the same numbers.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def end(error: BaseException) -> None:
    """Ends one of several processes on an error: in one sentence and with status RESTART when the error is that another has ended.

    Returns where this process is not one of a job.
    """
    if not _joined():
        return
    if _says_lost(error):
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
    os._exit(status)


def _joined() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _says_lost(error: BaseException) -> bool:
    """Whether an error, or the one behind it, comes of a process that is gone."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError) and _LOST.search(str(seen)):  # JaxRuntimeError is one
            return True
        seen = seen.__cause__ or seen.__context__
    return False
