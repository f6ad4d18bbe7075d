"""Trains one stage: text pretraining, contrastive towers, projector, or LoRA; which one, the config says.

    python -m launch.train --config=configs/phantom.py:stage1 --data=out/demo/data --workdir=out/demo/stage1
    python -m launch.train --config=configs/stage3.py --data=CORPUS --base=RUN_OF_STAGE_2 --workdir=RUN --config.batch_size=128

The same command again goes on from the newest checkpoint. Every setting of the config can be given as a flag.

On several machines every process gets the same command, with --multihost; --data, --base and --workdir are folders that all of them see.
Two processes on one machine, with four fake devices each:

    export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4
    COMMAND="python -m launch.train --config=configs/phantom.py:lm --data=out/demo/data --workdir=RUN --config.mesh.fsdp=8"
    COMMAND="$COMMAND --multihost --coordinator=localhost:9876 --num_processes=2"
    $COMMAND --process_id=0 & $COMMAND --process_id=1

Exit status 42 says: start again, with the same command. A process that gets SIGTERM, as before a machine is taken away, saves and ends with
it, and so do all processes of its job; before the first step, and while evaluating, there is nothing to save. When a process of a job is
killed, the others end within two minutes, with 42, or 134 where JAX notices first. So does a run in which nothing moves any more
(--stall_minutes). Of what goes wrong, a run mends what it can and says so: a step whose loss is no number changes nothing and is listed in
skipped.jsonl, a checkpoint that cannot be read is put aside for the one before, a row whose record is damaged counts for nothing and is
listed in bad_rows.jsonl. More than a twentieth of such rows end the run (--bad_rows=0.001: a thousandth); the share is of at least 1,000 rows,
so that the first bad one does not.

WORKDIR has config.json, metrics.jsonl, starts.jsonl, evaluations.jsonl, checkpoints/ and loss.png; `python -m launch.status WORKDIR` reads them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from rad_jax import distributed, errors
from rad_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, as configs/FILE.py or configs/FILE.py:VARIANT.")
_DATA = flags.DEFINE_string("data", None, "Packed corpus (made by launch.pack).", required=True)
_BASE = flags.DEFINE_list(
    "base", [], "Runs, and bases of launch.convert, that give the weights to start from, with commas; later ones win."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of this run: config.json, metrics.jsonl, checkpoints/, loss.png.", required=True
)
_DAMAGED = flags.DEFINE_enum(
    "damaged_shards",
    "error",
    ["error", "count"],
    "Shards that are missing or damaged: stop, or count their rows as bad rows.",
)
_BAD_ROWS = flags.DEFINE_float(
    "bad_rows",
    0.05,
    "Share of the rows that may be damaged or without text before the run ends.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_TENSORBOARD = flags.DEFINE_boolean("tensorboard", False, "Write WORKDIR/tensorboard too (pip install tensorboardX).")
_WANDB = flags.DEFINE_string("wandb", None, "Send rows to this project of Weights & Biases too (pip install wandb).")
_PROFILE = flags.DEFINE_string(
    "profile", None, "Trace these steps, the first and the last: 10:12; into WORKDIR/profile."
)
_STALL = flags.DEFINE_float(
    "stall_minutes", 10.0, "End with 42 when nothing moves for twice as long.", lower_bound=0.01
)
flags.mark_flag_as_required("config")
distributed.define_flags()


def main(_: Sequence[str]) -> int:
    from rad_jax import telemetry, train

    distributed.join()
    stop, profile = distributed.Stop(), telemetry.steps_to_profile(_PROFILE.value)
    stop.listen()
    with stop.at_once():
        arguments = prepared(_CONFIG.value, Path(_WORKDIR.value), stop, profile)
    if train.run(*arguments):
        return 0
    if distributed.first():
        print("saved and stopped, as it was told to (SIGTERM): start again to go on.", file=sys.stderr)
    return distributed.RESTART


def prepared(config: Any, workdir: Path, stop: distributed.Stop, profile: tuple[int, int] | None) -> tuple[Any, ...]:
    """What `train.run` takes: everything is opened, and fits together."""
    from rad_jax import checkpoint, input_pipeline, sharding, state, tasks, train
    from rad_jax.corpus import Corpus

    bases = [checkpoint.load_run(Path(path)) for path in _BASE.value]
    tasks.adopt(config, bases)
    task = tasks.make_task(config)
    corpus = Corpus.open(_DATA.value, _DAMAGED.value)
    if distributed.first():
        for sentence in corpus.lost:
            print(f"warning: {sentence}; its rows count as bad rows", file=sys.stderr)
    tokenizer = corpus.tokenizer()
    tasks.check_vocabulary(task.model.config, tokenizer.vocab_size, tokenizer.path)
    if config.task == "generative":
        checkpoint.check_tokenizer(tokenizer.path, bases)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_size, mesh.shape["data"] * mesh.shape["fsdp"], config.num_micro)
    share, shares = sharding.process_share(mesh)
    data = corpus.identity(config.data.split, config.data.selection)
    checkpoint.open_workdir(workdir, config.to_dict(), data, tokenizer.path, bases)
    batches = input_pipeline.train_iterator(
        corpus,
        config.data.split,
        template=config.data.template,
        batch_size=config.batch_size,
        text_length=config.data.text_length,
        target_length=config.data.target_length,
        image_size=config.model.vision.image_size if "vision" in config.model else corpus.image_size,
        seed=config.seed,
        selection=config.data.selection,
        process_index=share,
        process_count=shares,
        num_threads=config.data.num_threads,
        crop=config.data.get("crop", "centre"),
    )
    source = corpus.source(config.data.split, config.data.selection)
    beside = train.Beside(
        stop=stop,
        evaluate=evaluator(config, task, corpus, mesh),
        names=lambda numbers: [named(source, number) for number in numbers],
        writers=writers(workdir),
        profile=profile,
        stall_seconds=60 * _STALL.value,
        bad_rows=_BAD_ROWS.value,
    )
    base = state.join(*(run.variables for run in bases))
    return config, task, base, batches, data["fingerprint"], workdir, mesh, beside


def evaluator(config: Any, task: Any, corpus: Any, mesh: Any) -> Any:
    """What scores the weights every `config.evaluate.every` steps; None for never."""
    if not config.evaluate.every:
        return None
    from data.phantom.parser import parse
    from evaluation.development import Development

    return Development(config.evaluate, task.model, corpus, mesh, parse)


def named(source: Any, number: int) -> str:
    """A record's id, or that it cannot be read."""
    try:
        return source[number]["id"]
    except UserError as error:
        return str(error)


def writers(workdir: Path) -> list[Callable[[Mapping[str, Any]], None]]:
    """Who gets the rows of metrics.jsonl beside it."""
    from rad_jax import metrics

    if not distributed.first():
        return []
    chosen = [metrics.tensorboard(workdir)] if _TENSORBOARD.value else []
    return [*chosen, metrics.wandb(workdir, _WANDB.value)] if _WANDB.value else chosen


if __name__ == "__main__":
    distributed.before_listening()
    errors.run(main)
