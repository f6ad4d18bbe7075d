"""Several processes as one job: how a process joins, and what they do together."""

from typing import Any

import numpy as np

from rad_jax.errors import UserError

# A process that is silent for so long has ended; the others then end too.
HEARTBEAT_SECONDS = 60


def define_flags() -> None:
    """--multihost, and what it needs where nothing tells the processes of each other."""
    from absl import flags

    flags.DEFINE_boolean(
        "multihost",
        False,
        "One of several processes of a job; start the same command in each. On Cloud TPU, and under SLURM or Open MPI with "
        "a process per GPU, that is all; elsewhere also --coordinator, --num_processes and --process_id.",
    )
    flags.DEFINE_string("coordinator", None, "With --multihost: HOST:PORT of process 0, any free port.")
    flags.DEFINE_integer("num_processes", None, "With --multihost: how many processes.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "With --multihost: which one this is, from 0.", lower_bound=0)


def join() -> None:
    """Makes this process one of its job, as the flags say; to be called before anything touches a device.

    Raises:
        UserError: the flags do not fit each other, or the other processes are not found.
    """
    import jax
    from absl import flags

    options = flags.FLAGS
    given = {"coordinator_address": options.coordinator} | {n: options[n].value for n in ("num_processes", "process_id")}
    if not options.multihost:
        if any(value is not None for value in given.values()):
            raise UserError("--coordinator, --num_processes and --process_id go with --multihost: add it.")
        if jax.process_count() > 1:
            raise UserError(f"this is one of {jax.process_count()} processes of a pod: add --multihost in each.")
        return
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
