"""A run on disk: its `config.json` and its Orbax checkpoints. One checkpoint is one unit: weights that train, optimizer, step, rng, data position.

Frozen weights are not copied: a run records the runs its base weights came from, with a hash of their content, and finds them there again.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
    "config.checkpoint_minutes",
    "config.evaluate",
    "config.keep_checkpoints",
    "config.data.num_threads",
    *(
        f"config.model.{part}.{how}"
        for part in ("vision", "text", "llm")
        for how in ("attention", "remat", "rope", "flat_adapters")
    ),
)


@dataclasses.dataclass
class _Keep(ocp.checkpoint_managers.PreservationPolicy):
    """The newest checkpoints, and the best one."""

    latest: int
    best: int | None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        oldest = len(checkpoints) - self.latest
        return [place >= oldest or found.step == self.best for place, found in enumerate(checkpoints)]


class Checkpointer:
    """Saves and restores one run's `TrainState` and data position under WORKDIR/checkpoints; saving does not hold up the step.

    Attributes:
        best: the row of best.json, with "step" and "value"; None before the first evaluation.
    """

    def __init__(self, workdir: Path, keep: int):
        self._workdir = workdir
        self.best = read_best(workdir)
        self._keep = _Keep(keep, self.best["step"] if self.best else None)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint, once the one before is written.

        Raises:
            OSError: it would not fit on the disk. Looked at before, because a disk that fills up under Orbax ends in its tracebacks.
        """
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
        if shutil.disk_usage(self._manager.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._manager.directory))
        rest = {"step": state.step, "rng": state.rng, "opt_state": state.opt_state}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                rest=ocp.args.StandardSave(rest),
                data=ocp.args.JsonSave({**data, "sums": sums(state)}),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, placed as `like` is (its values are not read), and the data position.

        Those that cannot be read are moved to WORKDIR/damaged once another one could, and said. None when there are no checkpoints.

        Raises:
            UserError: there are some, and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                found = self._read(step, like)
            except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
                if distributed.says_lost(error) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # a process that is gone, or too little memory: the checkpoint may be sound
                damaged[step] = str(error).strip().split("\n")[0][:200]
                if jax.process_count() > 1:  # the others may be waiting for what this one could not read
                    self._leave_for(step, steps, damaged)
                continue
            self._put_aside(damaged, step)
            return found
        if not steps:
            return None
        raise UserError(
            f"none of the checkpoints in {self._manager.directory} can be read ({steps[0]}: {damaged[steps[0]]}): restore one from a copy, "
            "or start in another --workdir."
        )

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Raises ValueError, besides what Orbax raises, where arrays are not what was saved."""
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
        state, data = TrainState(trainable=found["trainable"], **found["rest"]), found["data"]
        if "sums" in data and data.pop("sums") != sums(state):  # checkpoints of older versions have none
            raise ValueError("its arrays are not those that were saved")
        return state, data

    def _put_aside(self, damaged: Mapping[int, str], step: int) -> None:
        """Moves what could not be read out of the way; `step` could be."""
        for bad, why in damaged.items():
            if distributed.first():
                self._move(bad, why, f"the run goes on from step {step}")
        if damaged:
            self._manager.reload()

    def _leave_for(self, step: int, steps: Sequence[int], damaged: Mapping[int, str]) -> None:
        """Of a job: moves a damaged checkpoint if there is another one, and ends all processes, to be started again."""
        if step != steps[-1]:
            self._move(step, damaged[step], "start again to go on from the one before")
            distributed.leave(distributed.RESTART, grace=0)

    def _move(self, step: int, why: str, then: str) -> None:
        aside = self._workdir / "damaged" / f"{step}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was first
            (self._manager.directory / str(step)).rename(aside)
        print(
            f"note: checkpoint {step} of {self._workdir} cannot be read ({why}): it is moved to {aside}; {then}.",
            file=sys.stderr,
            flush=True,
        )

    def keep_best(self, row: Mapping[str, Any]) -> None:
        """Keeps the checkpoint of `row["step"]`, which exists, until a better one is named; WORKDIR/best.json says which it is."""
        self.best = dict(row)
        self._keep.best = row["step"]
        if distributed.first():
            _write_whole(self._workdir / "best.json", json.dumps(self.best) + "\n")

    def wait(self) -> None:
        """Returns when the save under way is whole."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way."""
        self.wait()
        self._manager.close()


def sums(state: TrainState) -> list[int]:
    """A number per array of its bits, whatever mesh it lies on: the sum of its elements' bits modulo 2^32. One flipped bit changes it."""
    return [int(found) for found in jax.device_get(_sums(jax.tree.leaves(state)))]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def bits(leaf: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))

    return [bits(leaf).sum(dtype=jnp.uint32) for leaf in leaves]


def read_best(workdir: Path) -> dict[str, Any] | None:
    """The row of WORKDIR/best.json."""
    file = workdir / "best.json"
    return json.loads(file.read_text()) if file.exists() else None


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
        return _named(self.path)[0] / self.tokenizer["file"]


def open_workdir(
    workdir: Path, config: Mapping[str, Any], corpus: Mapping[str, Any], tokenizer: Path, bases: Sequence[Run]
) -> None:
    """Makes a run's folder with `config.json` and the tokenizer; in a folder that has them, checks that it is the same run.

    Of several processes, the first makes it; all of them check. A base is what its weights are: one that lies elsewhere now is noted there.

    Raises:
        UserError: the folder is of another config, corpus or base, or cannot be written, or not every process sees it.
    """
    record: dict[str, Any] = {
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
    moved = _moved(found["bases"], record["bases"])
    if moved:
        found["bases"] = record["bases"]
    old, new = _flat(found), _flat(json.loads(json.dumps(record)))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    other = [key for key in changed if not key.startswith(OPERATIONAL)]
    if other:
        shown = ", ".join(f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)" for key in other[:4])
        raise UserError(
            f"{workdir} belongs to another run; {len(other)} settings differ: {shown}. "
            "Choose another --workdir, or give the same config, data and base to go on."
        )
    if moved and jax.process_index() == 0:
        print(f"note: {workdir} finds its bases in new places now; their weights are the same.", file=sys.stderr)
        write_config(workdir, found)


def _moved(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> bool:
    """Whether bases lie elsewhere than before, and are the same by the hashes of their content."""
    return list(old) != list(new) and [base["sha256"] for base in old] == [base["sha256"] for base in new]


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
    _write_whole(folder / "config.json", json.dumps(record, indent=2, sort_keys=True) + "\n")


def _write_whole(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(file)


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

    Args:
        path: of the run; RUN@best is its best checkpoint by evaluation, RUN@300 that of step 300.

    Raises:
        UserError: no such checkpoint, damaged weights, or a base that is missing or is no longer the one the run was trained on.
    """
    path, wanted = _named(path)
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
    step = _chosen(path, wanted)
    own = read_trainable(path / "checkpoints" / str(step))
    variables = join(*(under.variables for under in bases), own)
    named = path.resolve()
    if wanted:
        named = named.with_name(f"{named.name}@{wanted}")
    found = named, record["config"], record["tokenizer"], step, content_hash(own), variables
    return Run(*found, bases=tuple(bases))


def _named(path: Path) -> tuple[Path, str]:
    """A run's folder and which of its checkpoints is meant: "" for the newest."""
    name, at, wanted = path.name.rpartition("@")
    return (path.with_name(name), wanted) if at and name and not path.exists() else (path, "")


def _chosen(path: Path, wanted: str) -> int:
    """The step of a run's checkpoint: the newest, the best, or one by its number."""
    steps = ocp.utils.checkpoint_steps(path / "checkpoints") if (path / "checkpoints").is_dir() else []
    if not steps:
        raise UserError(f"{path} has no finished checkpoint yet: run its training first.")
    if not wanted:
        return max(steps)
    best = read_best(path)
    step = best["step"] if wanted == "best" and best else int(wanted) if wanted.isdecimal() else -1
    if step not in steps:
        there = ", ".join(map(str, sorted(steps))) + (f", best ({best['step']})" if best else "")
        raise UserError(f"{path} has no checkpoint {wanted!r}: there are {there}.")
    return step


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
