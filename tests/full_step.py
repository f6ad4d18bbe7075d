"""`launch.train` with random frozen weights: what a step of a full-size config takes on the devices that are here.

    python -m tests.full_step --config=configs/stage3.py:h100-8 --config.mesh.fsdp=1 --config.batch_size=16 --config.steps=12 \\
        --config.log_every=1 --config.checkpoint_every=1000 --data=CORPUS --workdir=RUN

All flags are those of launch.train but --base. The rows of RUN/metrics.jsonl have step_time_s, lora_mfu and hbm_peak_gib.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import train as command
from rad_jax import distributed, errors, train
from tests import random_weights


def main(_: Sequence[str]) -> int:
    stop = distributed.Stop()
    given = flags.FLAGS
    config, task, _, *others = command.prepared(given.config, Path(given.workdir), stop, None)
    base = {"params": random_weights.tree(random_weights.shapes(task))}
    return 0 if train.run(config, task, base, *others) else distributed.RESTART


if __name__ == "__main__":
    errors.run(main)
