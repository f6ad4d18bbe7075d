"""The training loop, one for all stages: what is learned is decided by the task and by which variables train, both from the config."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh

from rad_jax import distributed, metrics, optim, quantise, sharding
from rad_jax.checkpoint import Checkpointer
from rad_jax.errors import UserError
from rad_jax.state import TrainState, Tree, select, split, table

Batch = Mapping[str, Any]


# ----------------------------------------------------------------------------------------------------------------------- the train step


def make_step(task: Any, optimizer: optax.GradientTransformation, num_micro: int) -> Callable[..., Any]:
    """The train step: (state, frozen, batch) -> (state, metrics). Frozen weights are an argument and nothing more: no gradient is taken."""

    def step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        result = task.value_and_grad(state.trainable, frozen, batch, rng, num_micro)
        weight = jnp.maximum(result.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, result.grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        new = TrainState(
            step=state.step + 1,
            rng=state.rng,
            trainable=optax.apply_updates(state.trainable, updates),
            opt_state=opt_state,
        )
        numbers = {name: value / weight for name, value in result.metrics.items()}
        numbers |= {"loss": result.loss_sum / weight, "grad_norm": optax.tree.norm(grads)}
        return new, numbers

    return step


def jitted_step(config: Any, task: Any, optimizer: optax.GradientTransformation, state: TrainState) -> Any:
    """The train step for a state that lies, or will lie (abstract arrays), where the step is to leave it; the old state's memory is reused."""
    where = jax.tree.map(lambda x: x.sharding, state)
    step, options = make_step(task, optimizer, config.num_micro), dict(config.compiler_options)
    return jax.jit(step, out_shardings=(where, None), donate_argnums=0, compiler_options=options)


# ----------------------------------------------------------------------------------------------------------------------- the loop


def run(config: Any, task: Any, base: Tree, batches: Any, corpus_fingerprint: str, workdir: Path, mesh: Mesh) -> bool:
    """Trains until `config.steps`; run again, it goes on from the newest checkpoint.

    When a process of the job is told to stop (SIGTERM), all of them save and return.

    Args:
        config: the experiment.
        task: an objective of `tasks`.
        base: weights to start from (numpy), by path; may be empty.
        batches: endless iterator over this process's batches, with get_state and set_state.
        corpus_fingerprint: of the data; a checkpoint made with other data is refused.
        workdir: where metrics.jsonl, checkpoints/ and loss.png go.
        mesh: the devices.

    Returns:
        Whether the run is finished.
    """
    optimizer = optim.optimizer(config.optimizer, config.steps)
    rate = optim.schedule(config.optimizer.peak_lr, config.steps, config.optimizer.warmup_ratio)
    # All rates at once: asked for step by step, they would queue behind the steps.
    rates = np.asarray(rate(np.arange(config.steps)))
    with jax.set_mesh(mesh), contextlib.closing(Checkpointer(workdir, config.keep_checkpoints)) as checkpoints:
        state, frozen = initial(config, task, optimizer, base, mesh)
        state = resume(checkpoints, state, batches, corpus_fingerprint, workdir)
        first = int(state.step)
        if jax.process_index() == 0:
            print(table(state.trainable, frozen))
            begins = f"resumed at step {first}" if first else "starting at step 0"
            print(f"{begins} on {dict(mesh.shape)}, processes: {jax.process_count()}", flush=True)
        step = jitted_step(config, task, optimizer, state)
        progress = metrics.Progress(workdir, config.steps, first, workdir.name, jax.process_index() == 0)
        meter = Meter(task.model.config.image_tokens)
        logged: tuple[int, Any, Span] | None = None
        stops = False
        with nn.logical_axis_rules(sharding.RULES):
            for number in range(first + 1, config.steps + 1):
                batch = sharding.place_batch(meter.next(batches), mesh)
                state, numbers = step(state, frozen, batch)
                meter.count(batch)
                progress.step()
                if logged is not None:  # read one step late: the device has the next one to do meanwhile
                    log(progress, meter, rates, *logged)
                stops = distributed.told_to_stop(number)
                saves = stops or number % config.checkpoint_every == 0 or number == config.steps
                logs = saves or number % config.log_every == 0 or number == 1
                logged = (number, numbers, meter.take()) if logs else None
                if saves and logged is not None:
                    # Read before saving, so that no checkpoint holds weights that are no numbers.
                    log(progress, meter, rates, *logged)
                    logged = None
                    checkpoints.save(state, {"batches": batches.get_state(), "fingerprint": corpus_fingerprint})
                if stops:
                    break
        progress.close()
    if jax.process_index() == 0:
        metrics.plot(workdir)
    return not stops


def resume(
    checkpoints: Checkpointer, state: TrainState, batches: Any, corpus_fingerprint: str, workdir: Path
) -> TrainState:
    """The newest checkpoint's state, and `batches` set to go on where it was; `state` itself where there is none.

    Raises:
        UserError: the checkpoint was made with other data.
    """
    restored = checkpoints.restore(state)
    if restored is None:
        return state
    state, position = restored
    if position["fingerprint"] != corpus_fingerprint:
        raise UserError(f"{workdir} was trained on another corpus: give that one in --data, or another --workdir.")
    batches.set_state(position["batches"])
    return state


def log(
    progress: metrics.Progress, meter: "Meter", rates: np.ndarray, number: int, numbers: Mapping[str, Any], span: "Span"
) -> None:
    """Waits for the numbers of a step and writes them.

    Raises:
        UserError: the loss or its gradient is no number.
    """
    values = {name: float(value) for name, value in jax.device_get(numbers).items()}
    if not np.isfinite([values["loss"], values["grad_norm"]]).all():
        raise UserError(f"the loss is {values['loss']} at step {number}: lower optimizer.peak_lr.")
    progress.log({"step": number, "lr": float(rates[number - 1]), **values, **meter.read(span)})


def initial(
    config: Any, task: Any, optimizer: optax.GradientTransformation, base: Tree, mesh: Mesh
) -> tuple[TrainState, Tree]:
    """State at step 0 and the frozen variables, placed on the mesh: from `base` where it has them, else freshly drawn.

    Raises:
        UserError: a frozen variable is not in `base`, or one has another shape there; one that learns would be int8.
    """
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    shapes, places = nn.unbox(boxed), sharding.variable_shardings(boxed, mesh)
    trains, stays = (flatten_dict(tree, sep="/") for tree in split(shapes, config.trainable))
    where, given = flatten_dict(places, sep="/"), flatten_dict(select(base, shapes), sep="/")
    missing = sorted(path for path in stays.keys() - given.keys() if not path.startswith("scales/"))
    if missing:
        raise UserError(
            f"the config freezes {len(missing)} variables that no --base gives, {missing[0]} the first: "
            "name the run (or runs, with commas) that trained them in --base."
        )
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
    trainable = unflatten_dict({path: made[path] for path in trains}, sep="/")
    frozen = unflatten_dict({path: made[path] for path in stays}, sep="/")
    return start(trainable, optimizer, config.seed, mesh), frozen


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


class Span(NamedTuple):
    """Some steps: how many, seconds waited for their data, what was counted in their batches (still on the device)."""

    steps: int
    waited: float
    counts: list[dict[str, jax.Array]]


class Meter:
    """Counts what is in the batches, over all processes, and the time between two readings."""

    def __init__(self, image_tokens: int):
        self._count = jax.jit(functools.partial(count, image_tokens))
        self._bad_rows = self._truncated = 0
        self._since = time.perf_counter()
        self._restart()

    def next(self, batches: Iterator[Batch]) -> Batch:
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    def count(self, batch: Batch) -> None:
        """Counts a global batch; does not wait for the device."""
        self._counts.append(self._count(dict(batch)))

    def take(self) -> Span:
        """The steps since it was last called."""
        span = Span(len(self._counts), self._waited, self._counts)
        self._restart()
        return span

    def read(self, span: Span) -> dict[str, float]:
        """Seconds, seconds waited for data, tokens per second, each per step of the span; rows without weight, and rows cut, so far."""
        counts = jax.device_get(span.counts)
        self._bad_rows += sum(int(found["bad_rows"]) for found in counts)
        self._truncated += sum(int(found["truncated_rows"]) for found in counts)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return {
            "step_time_s": seconds / span.steps,
            "data_wait_s": span.waited / span.steps,
            "tokens_per_s": sum(int(found["tokens"]) for found in counts) / seconds,
            "bad_rows": self._bad_rows,
            "truncated_rows": self._truncated,
        }

    def _restart(self) -> None:
        self._waited = 0.0
        self._counts: list[dict[str, jax.Array]] = []


def count(image_tokens: int, batch: Batch) -> dict[str, jax.Array]:
    """Tokens without padding, rows without weight and rows that were cut, of a batch."""
    images = image_tokens * len(batch["length"]) * ("image" in batch)
    return {
        "tokens": batch["length"].sum() + images,
        "bad_rows": (batch["weight"] == 0).sum(),
        "truncated_rows": batch["truncated"].sum(),
    }
