"""A run on disk: its `config.json` and its Orbax checkpoints. One checkpoint is one unit: weights that train, optimizer, step, rng, data position.

Frozen weights are not copied: a run records the runs its base weights came from, with a hash of their content, and finds them there again.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from rad_jax import FORMAT_VERSION, __version__, base, distributed
from rad_jax.errors import UserError, check_format
from rad_jax.state import TrainState, Tree, join

# Bytes of a checkpoint beside its arrays: names, shapes, places.
_OVERHEAD = 2**20


# What may change between two starts of one run: it does not change what is learned.
OPERATIONAL = (
    "rad_jax",
    "config.mesh",
    "config.compiler_options",
    "config.num_micro",
    "config.log_every",
    "config.checkpoint_every",
    "config.keep_checkpoints",
    "config.data.num_threads",
    *(
        f"config.model.{part}.{how}"
        for part in ("vision", "text", "llm")
        for how in ("attention", "remat", "rope", "flat_adapters")
    ),
)


class Checkpointer:
    """Saves and restores one run's `TrainState` and data position under WORKDIR/checkpoints; saving does not hold up the step."""

    def __init__(self, workdir: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep), enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint, once the one before is written.

        Raises:
            OSError: it would not fit on the disk. Looked at before, because a disk that fills up under Orbax ends in its tracebacks.
        """
        self._manager.wait_until_finished()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
        if shutil.disk_usage(self._manager.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._manager.directory))
        rest = {"step": state.step, "rng": state.rng, "opt_state": state.opt_state}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                rest=ocp.args.StandardSave(rest),
                data=ocp.args.JsonSave(dict(data)),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint placed as `like` is (its values are not read), and the data position; None when there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes: TrainState = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        rest = {"step": shapes.step, "rng": shapes.rng, "opt_state": shapes.opt_state}
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(shapes.trainable),
                rest=ocp.args.StandardRestore(rest),
                data=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(trainable=found["trainable"], **found["rest"]), found["data"]

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()


@dataclasses.dataclass(frozen=True)
class Run:
    """A run or a converted base read back: its own weights laid over those of its bases, as numpy or lazy arrays, and its config.

    Attributes:
        tokenizer: file and sha256; None for a base that was converted without one.
        step: of the checkpoint; 0 for a base.
        sha256: stands for the content of its own weights.
        source: of a base, the foreign format and configuration files it was made from.
        carried: of a base, foreign tensors that the model never uses.
        bases: the runs and bases under it.
    """

    path: Path
    config: dict[str, Any]
    tokenizer: dict[str, str] | None
    step: int
    sha256: str
    variables: Tree
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    carried: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    bases: tuple["Run", ...] = ()

    def chain(self) -> list["Run"]:
        """All runs and bases that the weights come from, the lowest first, itself last."""
        return [run for base in self.bases for run in base.chain()] + [self]

    @property
    def tokenizer_file(self) -> Path:
        """Raises UserError where there is none."""
        if self.tokenizer is None:
            raise UserError(f"{self.path} has no tokenizer: convert it again with --tokenizer=FOLDER_OR_FILE.")
        return self.path / self.tokenizer["file"]


def open_workdir(
    workdir: Path, config: Mapping[str, Any], corpus: Mapping[str, Any], tokenizer: Path, bases: Sequence[Run]
) -> None:
    """Makes a run's folder with `config.json` and the tokenizer; in a folder that has them, checks that it is the same run.

    Of several processes, the first makes it; all of them check.

    Raises:
        UserError: the folder is of another config, corpus or base, or cannot be written, or not every process sees it.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "rad_jax": __version__,
        "config": config,
        "corpus": dict(corpus),
        "tokenizer": {"file": tokenizer.name, "sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest()},
        "bases": [
            {"path": os.path.relpath(b.path, workdir.resolve()), "step": b.step, "sha256": b.sha256} for b in bases
        ],
    }
    file = workdir / "config.json"
    if jax.process_index() == 0 and not file.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tokenizer, workdir / tokenizer.name)
        write_config(workdir, record)
    distributed.agree(f"--workdir={workdir}")
    if not file.exists():
        raise UserError(
            f"process {jax.process_index()} does not see {file}, which process 0 has made: "
            "choose a --workdir that all machines share."
        )
    found = read_config(workdir)
    old, new = _flat(found), _flat(json.loads(json.dumps(record)))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    other = [key for key in changed if not key.startswith(OPERATIONAL)]
    if other:
        shown = ", ".join(f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)" for key in other[:4])
        raise UserError(
            f"{workdir} belongs to another run; {len(other)} settings differ: {shown}. "
            "Choose another --workdir, or give the same config, data and base to go on."
        )


def check_tokenizer(tokenizer: Path, bases: Sequence[Run]) -> None:
    """Refuses to go on from a language model that learned other pieces than the corpus has.

    Raises:
        UserError: a base with a language model has another tokenizer.
    """
    found = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    for run in bases:
        if "llm" in run.variables.get("params", {}) and run.tokenizer and run.tokenizer["sha256"] != found:
            raise UserError(
                f"{tokenizer} is not the tokenizer that {run.path} learned with: "
                f"pack the corpus again with --tokenizer={run.tokenizer_file}."
            )


def write_config(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `config.json`, whole or not at all."""
    temporary = folder / "config.tmp"
    temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    temporary.rename(folder / "config.json")


def read_config(workdir: Path) -> dict[str, Any]:
    """A run's `config.json`.

    Raises:
        UserError: there is none, or it is of another format version.
    """
    file = workdir / "config.json"
    try:
        record = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{workdir} is neither a run of launch.train nor a base of launch.convert: it has no config.json."
        ) from None
    except ValueError:
        raise UserError(f"{file} is not valid JSON: restore it, or start the run in a new folder.") from None
    check_format(record.get("format_version"), file)
    return record


def load_run(path: Path) -> Run:
    """Reads a run's newest checkpoint, or a base, and under it the runs and bases it was made on.

    Raises:
        UserError: no checkpoint, damaged weights, or a base that is missing or is no longer the one the run was trained on.
    """
    record = read_config(path)
    bases = []
    for reference in record["bases"]:
        under = load_run((path / reference["path"]).resolve())
        if under.sha256 != reference["sha256"]:
            raise UserError(
                f"{under.path} has changed since {path} was trained on it (its weights' hash differs): "
                "train again on the new base, or restore the old one."
            )
        bases.append(under)
    if "weights" in record:
        own, carried = base.read_weights(path, record["weights"])
        variables = join(*(under.variables for under in bases), own)
        content = base.manifest_hash(record["weights"])
        found = path.resolve(), record["config"], record["tokenizer"], 0, content, variables
        return Run(*found, source=record["source"], carried=carried, bases=tuple(bases))
    steps = ocp.utils.checkpoint_steps(path / "checkpoints") if (path / "checkpoints").is_dir() else []
    if not steps:
        raise UserError(f"{path} has no finished checkpoint yet: run its training first.")
    own = read_trainable(path / "checkpoints" / str(max(steps)))
    variables = join(*(under.variables for under in bases), own)
    found = path.resolve(), record["config"], record["tokenizer"], max(steps), content_hash(own), variables
    return Run(*found, bases=tuple(bases))


def read_trainable(checkpoint: Path) -> Tree:
    """The trained weights of one checkpoint as numpy arrays, whatever mesh wrote them."""
    standard = ocp.StandardCheckpointHandler
    handlers = {"trainable": standard(), "rest": standard(), "data": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(checkpoint.parent.absolute(), item_handlers=handlers) as manager:
        step = int(checkpoint.name)
        tree = manager.item_metadata(step)["trainable"].tree
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)
        return manager.restore(step, args=ocp.args.Composite(trainable=ocp.args.StandardRestore(like)))["trainable"]


def content_hash(tree: Mapping[str, Any]) -> str:
    """sha256 over paths, shapes, dtypes and bytes of a tree of numpy arrays."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(tree, sep="/").items()):
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    return dict(flatten_dict(dict(record), sep=".", keep_empty_nodes=True))
