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

When a process ends, the others end within two minutes, with exit status 42, or 134 where JAX notices first. When one gets SIGTERM, as
before a machine is taken away, all of them save and end with 42. Either way, start all of them again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from rad_jax import distributed, errors

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
flags.mark_flag_as_required("config")
distributed.define_flags()


def main(_: Sequence[str]) -> int:
    from rad_jax import checkpoint, input_pipeline, sharding, state, tasks, train

    distributed.join()
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    bases = [checkpoint.load_run(Path(path)) for path in _BASE.value]
    tasks.adopt(config, bases)
    task = tasks.make_task(config)
    corpus = input_pipeline.Corpus.open(_DATA.value, _DAMAGED.value)
    if distributed.first():
        for sentence in corpus.lost:
            print(f"warning: {sentence}; its rows count as bad rows", file=sys.stderr)
    tokenizer = corpus.tokenizer()
    tasks.check_vocabulary(task.model.config, tokenizer.vocab_size, tokenizer.path)
    if config.task == "generative":
        checkpoint.check_tokenizer(tokenizer.path, bases)
    mesh = sharding.make_mesh(**config.mesh)
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
    base = state.join(*(run.variables for run in bases))
    finished = train.run(config, task, base, batches, data["fingerprint"], workdir, mesh)
    if not finished and distributed.first():
        print(
            "saved and stopped, as a process was told to (SIGTERM): start all of them again to go on.", file=sys.stderr
        )
    return 0 if finished else distributed.RESTART


if __name__ == "__main__":
    errors.run(main)
