"""The training loop, one for all stages: what is learned is decided by the task and by which variables train, both from the config."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh

from rad_jax import distributed, goodput, guards, metrics, optim, quantise, sharding, telemetry
from rad_jax.checkpoint import Checkpointer
from rad_jax.errors import UserError
from rad_jax.runlog import Row, RunLog
from rad_jax.state import TrainState, Tree, select, split, table

Batch = Mapping[str, Any]
_now = time.monotonic
# What must be the same in two rows of an evaluation for their values to be compared.
MEASURED = ("metric", "signature", "slice", "studies")


# ----------------------------------------------------------------------------------------------------------------------- the train step


def make_step(task: Any, optimizer: optax.GradientTransformation, num_micro: int) -> Callable[..., Any]:
    """The train step: (state, frozen, batch) -> (state, metrics). Frozen weights are an argument and nothing more: no gradient is taken.

    Where the loss or a gradient is no number, weights and optimizer stay as they are, and the metric `skipped` is true.
    """

    def step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        result = task.value_and_grad(state.trainable, frozen, batch, rng, num_micro)
        weight = jnp.maximum(result.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, result.grads)
        loss, norm = result.loss_sum / weight, optax.tree.norm(grads)
        sound = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        changed = optax.apply_updates(state.trainable, updates), opt_state
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), changed, (state.trainable, state.opt_state)
        )
        new = TrainState(step=state.step + 1, rng=state.rng, trainable=trainable, opt_state=opt_state)
        numbers = {name: value / weight for name, value in result.metrics.items()}
        return new, numbers | {"loss": loss, "grad_norm": norm, "skipped": ~sound}

    return step


def jitted_step(config: Any, task: Any, optimizer: optax.GradientTransformation, state: TrainState) -> Any:
    """The train step for a state that lies, or will lie (abstract arrays), where the step is to leave it; the old state's memory is reused."""
    where = jax.tree.map(lambda x: x.sharding, state)
    step, options = make_step(task, optimizer, config.num_micro), dict(config.compiler_options)
    return jax.jit(step, out_shardings=(where, None), donate_argnums=0, compiler_options=options)


# ----------------------------------------------------------------------------------------------------------------------- the loop


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a run does beside learning; none of it changes what is learned.

    Attributes:
        stop: whether to save and stop.
        evaluate: gets the trained weights, the frozen ones, and what to ask between batches whether to break off. Gives a row with
            "metric", its "value", the ends "low" and "high" of its interval, and whatever else; None when broken off. Rows are compared
            where they agree in `MEASURED`.
        names: ids of records by their row numbers.
        writers: get every row of metrics.jsonl, in process 0.
        profile: first and last step to trace.
        stall_seconds: without any movement, after which stacks are dumped; after twice as long the process ends.
        bad_rows: share of the rows that may have no weight; with more the run ends.
    """

    stop: distributed.Stop = dataclasses.field(default_factory=distributed.Stop)
    evaluate: Callable[[Tree, Tree, Callable[[], bool]], Row | None] | None = None
    names: Callable[[Sequence[int]], list[str]] = lambda numbers: [str(number) for number in numbers]
    writers: Sequence[Callable[[Row], None]] = ()
    profile: tuple[int, int] | None = None
    stall_seconds: float = 600.0
    bad_rows: float = 0.05


def run(
    config: Any,
    task: Any,
    base: Tree,
    batches: Any,
    corpus_fingerprint: str,
    workdir: Path,
    mesh: Mesh,
    beside: Beside | None = None,
) -> bool:
    """Trains until `config.steps`; run again, it goes on from the newest checkpoint.

    When a process of the job is told to stop (SIGTERM), all of them save and return.

    Args:
        config: the experiment.
        task: an objective of `tasks`.
        base: weights to start from (numpy), by path; may be empty.
        batches: endless iterator over this process's batches, with get_state and set_state.
        corpus_fingerprint: of the data; a checkpoint made with other data is refused.
        workdir: where metrics.jsonl, starts.jsonl, checkpoints/ and loss.png go.
        mesh: the devices.
        beside: what else it does.

    Returns:
        Whether the run is finished.

    Raises:
        UserError: another job has the folder, no checkpoint there can be used, too many steps had to be skipped, or too many rows are bad.
    """
    beside = beside or Beside()
    optimizer = optim.optimizer(config.optimizer, config.steps)
    with contextlib.ExitStack() as stack:
        with beside.stop.at_once():
            stack.enter_context(guards.lock(workdir))
            guards.check_clock(workdir)
        stack.enter_context(jax.set_mesh(mesh))
        around = surrounded(config, workdir, mesh, corpus_fingerprint, beside, stack)
        with around.phases("start"), beside.stop.at_once():
            state, frozen = initial(config, task, optimizer, base, mesh, around.watchdog.beat)
            state = resume(around.checkpoints, state, batches, corpus_fingerprint, workdir)
            started(workdir, state, frozen, mesh)
        step = jitted_step(config, task, optimizer, state)
        updates = int(optax.tree.get_all_with_path(state.opt_state, "count")[0][1])
        log = RunLog(
            config,
            task.model.config,
            workdir,
            int(state.step),
            updates,
            around.phases,
            beside.names,
            beside.writers,
            beside.bad_rows,
        )
        with contextlib.closing(log), nn.logical_axis_rules(sharding.RULES):
            last = loop(config, step, state, frozen, batches, log, around)
        around.checkpoints.wait()
        finished = last >= config.steps and not owes_score(config, last, around)
        if distributed.first():
            record = {"event": "end", "step": last, "finished": finished, "phases": around.phases.seconds()}
            metrics.event(workdir, record)
    if distributed.first() and finished:
        metrics.plot(workdir)
    return finished


class Around(NamedTuple):
    """What a run has around its steps."""

    workdir: Path
    mesh: Mesh
    fingerprint: str
    checkpoints: Checkpointer
    phases: goodput.Phases
    watchdog: guards.Watchdog
    beside: Beside


def surrounded(
    config: Any, workdir: Path, mesh: Mesh, fingerprint: str, beside: Beside, stack: contextlib.ExitStack
) -> Around:
    """Checkpoints, phases and a watchdog that hears of every change of phase; `stack` closes them."""
    phases = goodput.Phases()
    watchdog = stack.enter_context(contextlib.closing(guards.Watchdog(beside.stall_seconds, phases.doing)))
    phases.moved = watchdog.beat
    checkpoints = stack.enter_context(contextlib.closing(Checkpointer(workdir, config.keep_checkpoints)))
    return Around(workdir, mesh, fingerprint, checkpoints, phases, watchdog, beside)


def loop(config: Any, step: Any, state: TrainState, frozen: Tree, batches: Any, log: RunLog, around: Around) -> int:
    """Steps from the state's until the last or until told to stop, and what belongs between them: rows, checkpoints, evaluations.

    Returns:
        The last step that was done; a checkpoint holds it.
    """
    beside, checkpoints = around.beside, around.checkpoints
    number = first = int(state.step)
    profile, saved = telemetry.Profile(around.workdir, beside.profile), _now()
    # An evaluation that was broken off, by a signal or a kill, is made up for.
    stops = first > 0 and owes_score(config, first, around) and not evaluate(first, state, frozen, log, around)
    for number in range(first + 1, config.steps + 1) if not stops else ():
        with beside.stop.at_once() if number == first + 1 else contextlib.nullcontext():
            batch = sharding.place_batch(log.fetch(batches), around.mesh)
        if number == first + 1:
            with around.phases("compile"), around.watchdog.patient(), beside.stop.at_once():
                step = step.lower(state, frozen, batch).compile()
        profile.before(number)
        state, numbers = step(state, frozen, batch)
        log.add(number, numbers, batch)
        log.read()  # the steps that ended before this one: the device has it to do meanwhile
        profile.after(number, numbers)
        stops = beside.stop.reached()
        last = number == config.steps
        evaluates = scores(config, number, around)
        logs = number % config.log_every == 0 or number == 1
        saves = stops or evaluates or last or number % config.checkpoint_every == 0
        if logs and config.checkpoint_minutes:  # all processes ask, and the first one's clock says
            saves |= distributed.of_first(_now() - saved) > 60 * config.checkpoint_minutes
        if saves or logs:
            log.due()
        if saves:
            log.read()  # before saving: too many skipped steps end the run here
            with log.aside("save"):
                checkpoints.save(state, {"batches": batches.get_state(), "fingerprint": around.fingerprint})
            saved, stops = _now(), stops or beside.stop.reached()
        if evaluates and not stops:
            stops = not evaluate(number, state, frozen, log, around)
        if stops:
            break
    profile.close()
    return number


def scores(config: Any, number: int, around: Around) -> bool:
    """Whether the weights of this step are scored."""
    due = number == config.steps or number % max(config.evaluate.every, 1) == 0
    return around.beside.evaluate is not None and due


def owes_score(config: Any, number: int, around: Around) -> bool:
    """Whether this step is done and its score is missing: the evaluation was broken off. Process 0 has the file."""
    if not scores(config, number, around):
        return False
    rows = metrics.lines(around.workdir / "evaluations.jsonl") if distributed.first() else []
    return not distributed.of_first(any(row["step"] == number for row in rows))


def evaluate(number: int, state: TrainState, frozen: Tree, log: RunLog, around: Around) -> bool:
    """Scores the weights of a step that is saved, and keeps its checkpoint if none before was better; False when told to stop meanwhile."""
    with log.aside("evaluate"), around.beside.stop.at_once(around.checkpoints.wait):
        return scored(number, state, frozen, around)


def scored(number: int, state: TrainState, frozen: Tree, around: Around) -> bool:
    beside, checkpoints = around.beside, around.checkpoints
    assert beside.evaluate is not None

    def stopped() -> bool:
        around.watchdog.beat()  # a batch is written
        return beside.stop.reached()

    row = beside.evaluate(state.trainable, frozen, stopped)
    if row is None:
        return False
    shown = f"{row['metric']} {row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}] at step {number}"
    best = checkpoints.best
    known = best or row
    other = [key for key in MEASURED if known.get(key, row.get(key)) != row.get(key)]
    if best and other:  # numbers of two measures cannot be compared
        guards.say(
            f"the best so far, of step {best['step']}, was measured otherwise ({', '.join(other)} differ): it counts no more."
        )
        best = None
    better = best is None or row["value"] > best["value"] or math.isnan(best["value"])
    if better:
        checkpoints.keep_best({"step": number, **row})
    if distributed.first():
        seconds = around.phases.seconds()
        share = seconds["evaluate"] / max(sum(seconds.values()), 1e-9)
        record = {"step": number, "time": time.time(), **row, "evaluate_share": share}
        metrics.append(around.workdir / "evaluations.jsonl", record)
        told = "the best so far"
        if best is not None and not better:
            told = f"the best is {best['value']:.4f} at step {best['step']}"
        if best is not None and row["low"] <= best["value"] <= row["high"]:
            told += ", within its interval"
        guards.say(f"{shown}; {told}. Evaluating takes {share:.1%} of this start's time so far.")
    return True


def started(workdir: Path, state: TrainState, frozen: Tree, mesh: Mesh) -> None:
    """Tells people, and starts.jsonl, where a run begins and on what."""
    first, device = int(state.step), mesh.devices.flat[0]
    if not distributed.first():
        return
    print(table(state.trainable, frozen))
    begins = f"resumed at step {first}" if first else "starting at step 0"
    print(f"{begins} on {dict(mesh.shape)}, processes: {jax.process_count()}", flush=True)
    where = {"devices": mesh.size, "kind": device.device_kind, "processes": jax.process_count()}
    metrics.event(workdir, {"event": "start", "step": first, **where})


def resume(
    checkpoints: Checkpointer, state: TrainState, batches: Any, corpus_fingerprint: str, workdir: Path
) -> TrainState:
    """The newest checkpoint's state that can be read, and `batches` set to go on where it was; `state` itself where there is none.

    Raises:
        UserError: the checkpoint was made with other data, or there are some and none can be read.
    """
    restored = checkpoints.restore(state)
    if restored is None:
        return state
    state, position = restored
    if position["fingerprint"] != corpus_fingerprint:
        raise UserError(f"{workdir} was trained on another corpus: give that one in --data, or another --workdir.")
    batches.set_state(position["batches"])
    return state


def initial(
    config: Any,
    task: Any,
    optimizer: optax.GradientTransformation,
    base: Tree,
    mesh: Mesh,
    moved: Callable[[], None] = lambda: None,
) -> tuple[TrainState, Tree]:
    """State at step 0 and the frozen variables, placed on the mesh: from `base` where it has them, else freshly drawn.

    `moved` is called after every variable of the base.

    Raises:
        UserError: a frozen variable is not in `base`, or one has another shape there; one that learns would be int8.
    """
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    shapes, places = nn.unbox(boxed), sharding.variable_shardings(boxed, mesh)
    trains, stays = (flatten_dict(tree, sep="/") for tree in split(shapes, config.trainable))
    where, given = flatten_dict(places, sep="/"), taken(base, shapes, stays)
    if any(leaf.dtype == jnp.int8 for leaf in trains.values()):
        raise UserError("config.frozen_dtype is int8 but the language model's layers learn: give bfloat16 or float32.")
    fresh = trains.keys() - given.keys()

    def draw() -> dict[str, jax.Array]:
        drawn = flatten_dict(nn.unbox(task.init(jax.random.key(config.seed))), sep="/")
        return {path: drawn[path] for path in fresh}

    made = jax.jit(draw, out_shardings={path: where[path] for path in fresh})()
    for path, leaf in given.items():
        dtype = quantise.stored_dtype(path, stays[path], config.frozen_dtype) if path in stays else jnp.float32
        if dtype == jnp.int8:
            scales = "scales/" + path.removeprefix("params/")
            made[path], made[scales] = quantise.place(leaf, where[path], where[scales], stays[scales].ndim)
        else:
            made[path] = sharding.place(leaf, dtype, where[path])
        moved()
    trainable = unflatten_dict({path: made[path] for path in trains}, sep="/")
    frozen = unflatten_dict({path: made[path] for path in stays}, sep="/")
    return start(trainable, optimizer, config.seed, mesh), frozen


def taken(base: Tree, shapes: Tree, stays: Tree) -> Tree:
    """What of `base` a model with `shapes` begins with, by path.

    Raises:
        UserError: one of those that stay as they are is not in `base`, or one has another shape there.
    """
    given = flatten_dict(select(base, shapes), sep="/")
    missing = sorted(path for path in stays.keys() - given.keys() if not path.startswith("scales/"))
    if missing:
        raise UserError(
            f"the config freezes {len(missing)} variables that no --base gives, {missing[0]} the first: "
            "name the run (or runs, with commas) that trained them in --base."
        )
    return given


def abstract(
    config: Any, task: Any, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> tuple[TrainState, Tree]:
    """What `initial` gives, as shapes, dtypes and places: no weight is read or drawn."""
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    places = flatten_dict(sharding.variable_shardings(boxed, mesh), sep="/")
    trains, stays = (flatten_dict(tree, sep="/") for tree in split(nn.unbox(boxed), config.trainable))

    def arrays(leaves: Tree, dtype: Callable[[str, Any], Any]) -> Tree:
        made = {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype(path, leaf), sharding=places[path])
            for path, leaf in leaves.items()
        }
        return unflatten_dict(made, sep="/")

    trainable = arrays(trains, lambda path, leaf: jnp.float32)
    frozen = arrays(stays, lambda path, leaf: quantise.stored_dtype(path, leaf, config.frozen_dtype))
    whole = sharding.replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    moments = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(optimizer.init, trainable),
        _moment_shardings(trainable, optimizer, mesh),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    rng: Any = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    return TrainState(step=step, rng=rng, trainable=trainable, opt_state=moments), frozen


def start(trainable: Tree, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """State at step 0 for weights that are already placed; moments live where their weights do."""
    whole, moments = sharding.replicated(mesh), _moment_shardings(trainable, optimizer, mesh)
    return TrainState(
        step=jax.device_put(np.zeros((), np.int32), whole),
        rng=jax.device_put(np.asarray(jax.random.key_data(jax.random.key(seed))), whole),
        trainable=trainable,
        opt_state=jax.jit(optimizer.init, out_shardings=moments)(trainable),
    )


def _moment_shardings(trainable: Tree, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh) -> Any:
    """Places for the optimizer's state: a moment lives where its weight does, the rest is everywhere."""
    shapes, whole = jax.eval_shape(optimizer.init, trainable), sharding.replicated(mesh)
    return optax.tree.map_params(
        optimizer, lambda _, leaf: leaf.sharding, shapes, trainable, transform_non_params=lambda _: whole
    )
