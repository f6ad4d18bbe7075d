"""The loop: what a step changes and what it leaves alone, starting weights, schedule and optimizer, numbers it logs."""

import math
import re
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from launch import status
from rad_jax import checkpoint, goodput, guards, history, metrics, optim, runlog, sharding, tasks, train
from rad_jax.errors import UserError
from rad_jax.state import join


def begin(training, config, base):
    task = tasks.make_task(config)
    optimizer = optim.optimizer(config.optimizer, config.steps)
    mesh = training.mesh()
    with jax.set_mesh(mesh):
        return task, optimizer, mesh, train.initial(config, task, optimizer, base, mesh)


def flat(tree):
    return flatten_dict(jax.tree.map(np.array, tree), sep="/")


@pytest.fixture(scope="module")
def stepped(training):
    """Stage 3 before and after one step: (trainable, frozen, state) each, weights as numpy by path; and the compiled step."""
    config = training.config("stage3")
    config.optimizer.warmup_ratio = 0.0
    task, optimizer, mesh, (old, frozen) = begin(training, config, training.variables(config))
    before = flat(old.trainable), flat(frozen), old
    with jax.set_mesh(mesh):
        batch = sharding.place_batch(training.batch(config), mesh)
        compiled = train.jitted_step(config, task, optimizer, old).lower(old, frozen, batch).compile()
        state, _ = compiled(old, frozen, batch)
    return before, (flat(state.trainable), flat(frozen), state), compiled


def test_step_changes_what_trains(stepped):
    (before, _, _), (after, _, _), _ = stepped
    assert before.keys() == after.keys()
    assert {path.split("/")[1] for path in before} == {"projector", "llm"}
    assert {path.split("/")[0] for path in before if "/llm/" in path} == {"lora"}
    assert [path for path in before if (before[path] == after[path]).all()] == []


def test_step_leaves_frozen_weights_to_the_bit(stepped):
    (_, before, _), (_, after, _), _ = stepped
    assert {path.split("/")[1] for path in before} == {"vision", "llm"}
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)


def test_optimizer_state_for_what_trains_and_nothing_else(stepped):
    (trainable, _, _), (_, _, state), _ = stepped
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(moments) == 2 * sum(leaf.size for leaf in trainable.values())
    assert state.step == 1


def test_step_reuses_the_memory_of_the_old_state(stepped):
    """All of it: no second copy of weights and moments. Frozen weights are there for the next step (`flat` has read them)."""
    (_, _, old), (_, _, new), compiled = stepped
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert compiled.memory_analysis().alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(new))


class Number:
    """A step's output that says when it is read, as a scalar on a device that is still computing would make the reader wait."""

    def __init__(self, read):
        self._read = read

    def __array__(self, dtype=None, copy=None):
        self._read()
        return np.zeros((), dtype)

    def is_ready(self):
        return False


@pytest.mark.parametrize("log_every", [1, 3])
def test_loop_reads_no_step_before_the_next_is_dispatched(training, tmp_path, log_every):
    """But for a save, which the last step has: the device is never idle while the host looks at numbers."""
    config = training.config("lm", steps=7, log_every=log_every, checkpoint_every=100)
    dispatched: list[int] = []
    reads: dict[int, int] = {}

    class Step:
        def lower(self, *_):
            return self

        def compile(self):
            return self

        def __call__(self, state, frozen, batch):
            number = len(dispatched) + 1
            dispatched.append(number)
            names = ("loss", "grad_norm", "accuracy", "skipped")
            return state, {name: Number(lambda: reads.setdefault(number, len(dispatched))) for name in names}

    phases, saved = goodput.Phases(), []
    checkpoints: Any = SimpleNamespace(save=lambda state, data: saved.append(len(dispatched)))
    watchdog = guards.Watchdog(3600, phases.doing)
    around = train.Around(tmp_path, training.mesh(), "", checkpoints, phases, watchdog, train.Beside())
    model, nothing = tasks.make_task(config).model.config, around.beside
    log = runlog.RunLog(config, model, tmp_path, 0, 0, phases, nothing.names, nothing.writers, nothing.bad_rows)
    state: Any = SimpleNamespace(step=0)
    assert train.loop(config, Step(), state, {}, training.batches(config), log, around) == 7
    log.close()
    watchdog.close()
    assert saved == [7]
    # Read with the step after the one that ends their row: rows end at steps 1, 3 and 6 for every third.
    ends = {1: range(1, 8), 3: (1, 3, 3, 6, 6, 6, 7)}[log_every]
    assert reads == {number: min(end + 1, 7) for number, end in enumerate(ends, start=1)}
    assert [row["step"] for row in metrics.read(tmp_path)] == sorted(set(ends))


def test_frozen_weights_of_a_whole_run_are_those_of_its_bases(chain):
    """Stages 2 and 3 save only what they train."""
    own = {stage: flat(checkpoint.load_run(chain / stage).variables) for stage in ("stage2", "stage3")}
    saved = flat(checkpoint.read_trainable(chain / "stage3" / "checkpoints" / "4"))
    assert all(path.startswith(("params/projector/", "lora/")) for path in saved)
    for path, leaf in own["stage2"].items():
        if path not in saved:
            np.testing.assert_array_equal(own["stage3"][path], leaf, err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_are_stored_in_their_dtype(training, dtype):
    config = training.config("stage2", frozen_dtype=dtype)
    _, _, _, (state, frozen) = begin(training, config, training.variables(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}


def test_weights_come_from_the_base_and_the_rest_is_drawn(training):
    config = training.config("stage3")
    base = training.variables(config)
    del base["lora"]
    _, _, _, (state, frozen) = begin(training, config, base)
    found = flat(join(state.trainable, frozen))
    for path, leaf in flat(base).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    assert (found["lora/llm/layers/attn/q/b"] == 0).all()  # an adapter begins as no change
    assert found["lora/llm/layers/attn/q/a"].std() > 0


def test_tower_with_more_blocks_is_cut(training):
    """Stage 1 trains three blocks, stages 2 and 3 use two."""
    config = training.config("stage2")
    tower = training.variables(training.config("stage1"))["params"]["vision"]
    base = training.variables(config)
    base["params"]["vision"] = tower
    _, _, _, (_, frozen) = begin(training, config, base)
    found = frozen["params"]["vision"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert tower["blocks"]["mlp"]["fc1"]["kernel"].shape[0] == 3
    np.testing.assert_array_equal(found, tower["blocks"]["mlp"]["fc1"]["kernel"][:2])
    assert "norm" not in frozen["params"]["vision"]


def test_base_of_another_shape(training):
    config = training.config("stage2")
    base = training.variables(config)
    base["params"]["llm"]["norm"]["scale"] = np.zeros(33, np.float32)
    with pytest.raises(UserError, match=r"params/llm/norm/scale is \(33,\) in the base but \(32,\) in this config"):
        begin(training, config, base)


def test_frozen_weights_that_no_base_gives(training):
    config = training.config("stage2")
    base = training.variables(config)
    del base["params"]["vision"]
    with pytest.raises(
        UserError, match=r"freezes 20 variables that no --base gives, params/vision/blocks/.* name the run"
    ):
        begin(training, config, base)


def test_run_refuses_a_checkpoint_of_other_data(training, chain):
    config = training.config("lm")
    with pytest.raises(UserError, match="was trained on another corpus"):
        train.run(config, tasks.make_task(config), {}, training.batches(config), "other", chain / "lm", training.mesh())


def test_loss_that_is_no_number_ends_the_run(training, tmp_path, capsys):
    """After five steps in a row; and no checkpoint keeps weights that are none, also where the gradient goes before the loss."""
    config = training.config("lm", steps=10, checkpoint_every=1)
    config.optimizer.update(peak_lr=1e38, warmup_ratio=0.0)
    with pytest.raises(
        UserError, match=r"the loss is .* at step \d: lower optimizer.peak_lr, or look at the records of"
    ):
        training.run(config, tmp_path / "run")
    run = checkpoint.load_run(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in flat(run.variables).values())
    assert "note: step 2 is skipped: its loss is" in capsys.readouterr().err
    listed = metrics.lines(tmp_path / "run" / "skipped.jsonl")
    assert len(listed) == 5
    assert all(len(row["rows"]) == config.batch_size for row in listed)
    assert listed[0]["ids"] == [str(number) for number in listed[0]["rows"]]


@pytest.fixture(scope="module")
def poisoned(training):
    """Stage 3, one step with the loss of a token weighted by what is no number: state before and after, and the metrics."""
    config = training.config("stage3")
    config.optimizer.update(warmup_ratio=0.0, clip=1.0)
    task, optimizer, mesh, (state, frozen) = begin(training, config, training.variables(config))
    before = jax.tree.map(np.array, state)
    batch = training.batch(config)
    batch["target_weights"][0, 0] = np.nan
    with jax.set_mesh(mesh):
        after, numbers = jax.jit(train.make_step(task, optimizer, 1))(state, frozen, sharding.place_batch(batch, mesh))
    return before, after, numbers


def test_step_whose_loss_is_no_number_changes_nothing(poisoned):
    before, after, numbers = poisoned
    assert bool(numbers["skipped"]) and not np.isfinite(numbers["loss"])
    assert after.step == before.step + 1
    for old, new in zip(
        jax.tree.leaves((before.trainable, before.opt_state)),
        jax.tree.leaves((after.trainable, after.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, np.asarray(new))


class Spoiled:
    """An iterator whose fourth batch weights a token by what is no number, and whose tenth has targets that no text has.

    `rows` are the row numbers of every batch.
    """

    def __init__(self, batches):
        self._batches, self.rows = batches, []

    def __next__(self):
        batch = dict(next(self._batches))
        self.rows.append(batch["index"].tolist())
        if len(self.rows) == 4:
            batch["target_weights"] = batch["target_weights"].copy()
            batch["target_weights"][0, 0] = np.nan
        if len(self.rows) == 10:
            batch["targets"] = np.ones_like(batch["targets"])
        return batch

    def __getattr__(self, name):
        return getattr(self._batches, name)


def test_run_goes_on_after_one_bad_batch_and_one_odd_one(training, tmp_path, monkeypatch, capsys):
    """One step is skipped, one is a spike; each is said, counted and listed with its records, and the run gets to its end."""
    batches, made = type(training).batches, list[Spoiled]()

    def spoiled(self, config):
        made.append(Spoiled(batches(self, config)))
        return made[-1]

    monkeypatch.setattr(type(training), "batches", spoiled)
    monkeypatch.setattr(guards, "_SPIKE", 1.0)
    monkeypatch.setattr(guards, "_SPIKE_LEAST", 6)
    config, run = training.config("lm", steps=12, checkpoint_every=6), tmp_path / "run"
    config.optimizer.update(peak_lr=3e-3, warmup_ratio=0.0)
    training.run(config, run, beside=train.Beside(names=lambda rows: [f"film{row}" for row in rows]))
    rows, err = metrics.read(run), capsys.readouterr().err
    assert [row["skipped"] for row in rows] == [0] * 3 + [1] * 9
    assert [row["spikes"] for row in rows] == [0] * 9 + [1] * 3
    for file, step in (("skipped.jsonl", 4), ("spikes.jsonl", 10)):
        (listed,) = metrics.lines(run / file)
        assert listed["step"] == step and listed["rows"] == made[0].rows[step - 1]
        assert listed["ids"] == [f"film{row}" for row in listed["rows"]]
        assert str(run / file) in err
    assert "note: step 4 is skipped: its loss is nan" in err and "note: the loss jumps to " in err
    assert metrics.lines(run / "starts.jsonl")[-1]["event"] == "end"
    found = checkpoint.load_run(run)
    assert found.step == 12 and all(np.isfinite(leaf).all() for leaf in flat(found.variables).values())
    assert "noted       1 skipped steps, 1 loss spikes, 0 recompiles" in status.page(history.read(run), None)


def test_programs_compiled_between_steps_are_counted(training, tmp_path, monkeypatch):
    """What the third batch has compiled stays in the count of every row after it."""
    batches, seen = type(training).batches, list[Any]()

    class Compiling(Spoiled):
        def __next__(self):
            batch = next(self._batches)
            seen.append(batch)
            if len(seen) == 3:
                jax.jit(lambda x: x * 3 + 1)(np.ones(5))
            return batch

    monkeypatch.setattr(type(training), "batches", lambda self, config: Compiling(batches(self, config)))
    training.run(training.config("lm", steps=6), tmp_path / "run")
    found = [row["recompiles"] for row in metrics.read(tmp_path / "run")]
    assert found[0] == 0 and found[-1] == 1 and found == sorted(found) and found.index(1) in (1, 2), found
    assert "1 recompiles" in status.page(history.read(tmp_path / "run"), None)


class Slow:
    """An iterator that takes so long for every batch."""

    def __init__(self, batches, seconds):
        self._batches, self._seconds = batches, seconds

    def __next__(self):
        time.sleep(self._seconds)
        return next(self._batches)

    def __getattr__(self, name):
        return getattr(self._batches, name)


@pytest.mark.slow
def test_slow_data_is_said_and_measured(training, tmp_path, capsys, monkeypatch):
    batches = type(training).batches
    monkeypatch.setattr(type(training), "batches", lambda self, config: Slow(batches(self, config), 3.0))
    training.run(training.config("lm", steps=4), tmp_path / "run")
    assert re.search(
        r"note: \d+% of the time is waiting for data: raise --config.data.num_threads", capsys.readouterr().err
    )
    # A wait counts where the device has nothing left to do by its end: on a busy machine not every one.
    assert max(row["data_wait_s"] for row in metrics.read(tmp_path / "run")) > 2.5
    assert metrics.lines(tmp_path / "run" / "starts.jsonl")[-1]["phases"]["data"] > 2.5


class Blank:
    """An iterator whose batches lose the weight of two rows each; `bad` are the rows without weight of every batch."""

    def __init__(self, batches):
        self._batches, self.bad = batches, []

    def __next__(self):
        batch = dict(next(self._batches))
        batch["weight"] = batch["weight"].copy()
        batch["weight"][:2] = 0
        self.bad.append(batch["index"][batch["weight"] == 0].tolist())
        return batch

    def __getattr__(self, name):
        return getattr(self._batches, name)


def test_bad_rows_are_counted_listed_and_end_a_run_that_may_have_none(training, tmp_path, monkeypatch):
    batches, made = type(training).batches, list[Blank]()

    def blank(self, config):
        made.append(Blank(batches(self, config)))
        return made[-1]

    monkeypatch.setattr(type(training), "batches", blank)
    training.run(training.config("stage1", steps=3), tmp_path / "run")
    bad = made[0].bad[:3]
    assert [row["bad_rows"] for row in metrics.read(tmp_path / "run")] == np.cumsum(
        [len(rows) for rows in bad]
    ).tolist()
    listed = metrics.lines(tmp_path / "run" / "bad_rows.jsonl")
    assert sorted(row["row"] for row in listed) == sorted({row for rows in bad for row in rows})
    assert all(row["row"] in bad[row["step"] - 1] for row in listed)
    with pytest.raises(
        UserError, match=r"of \d+ rows up to step \d could not be learned from, more than --bad_rows=0.001"
    ):
        training.run(training.config("stage1", steps=3), tmp_path / "strict", beside=train.Beside(bad_rows=0.001))


LEARNED = {"step", "lr", "loss", "accuracy", "grad_norm", "skipped", "spikes"}
TIMED = {"steps", "step_time_s", "data_wait_s", "save_s", "evaluate_s", "goodput", "time", "recompiles"}
COUNTED = {"tokens_per_s", "tokens_per_s_per_chip", "bad_rows", "truncated_rows"}


def test_run_logs_what_people_read(chain):
    rows = metrics.read(chain / "stage3")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(
        row.keys() == LEARNED | TIMED | COUNTED for row in rows
    )  # a CPU has no known peak, and does not tell its memory
    np.testing.assert_allclose([row["lr"] for row in rows[:2]], [0, 1e-3])
    assert all(row["recompiles"] == 0 and row["skipped"] == 0 for row in rows)
    assert (chain / "stage3" / "loss.png").stat().st_size > 1000
    events = metrics.lines(chain / "stage3" / "starts.jsonl")
    assert [(row["event"], row["step"]) for row in events] == [("start", 0), ("end", 4)]
    assert events[0]["devices"] == 1


def test_counts_of_a_batch():
    batch = {
        "length": np.array([3, 5]),
        "weight": np.array([1.0, 0.0]),
        "truncated": np.array([1, 1]),
        "image": np.zeros((2, 4, 4)),
        "target_weights": np.array([[1.0, 1.0], [0.0, 0.0]]),
    }
    found = {name: int(value) for name, value in runlog.count(10, batch).items()}
    assert found == {"rows": 2, "tokens": 28, "text": 8, "targets": 2, "bad_rows": 1, "truncated_rows": 2}
    del batch["image"], batch["target_weights"]
    assert runlog.count(10, batch)["tokens"] == 8


@pytest.mark.parametrize(("steps", "ratio"), [(100, 0.03), (1563, 0.03), (17, 0.1), (10, 0.0), (1, 0.03)])
def test_schedule_against_transformers(steps, ratio):
    import torch
    from transformers.optimization import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    warmup = math.ceil(steps * ratio)  # as its Trainer rounds
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    ours = optim.schedule(1e-3, steps, ratio)
    for step in range(steps):
        # Rounding of float32, in which the cosine is taken here.
        np.testing.assert_allclose(float(ours(step)), theirs.get_last_lr()[0], atol=1e-3 * 1e-6, err_msg=f"{step}")
        optimizer.step()
        theirs.step()


def test_adamw_against_torch():
    """Five steps; kernels, embeddings and adapters decay, norms, biases and scalars do not."""
    import torch

    rng = np.random.default_rng(0)
    decaying = {"fc/kernel": (4, 3), "word/embedding": (5, 4), "q/a": (4, 2), "q/b": (2, 4)}
    others = {"fc/bias": (3,), "norm/scale": (4,), "norm/bias": (4,), "vision/cls_token": (1, 1, 4), "logit_scale": ()}
    weights = {path: rng.normal(size=shape).astype(np.float32) for path, shape in {**decaying, **others}.items()}
    grads = [{path: rng.normal(size=w.shape).astype(np.float32) for path, w in weights.items()} for _ in range(5)]

    config = ConfigDict(
        {"peak_lr": 1e-2, "warmup_ratio": 0.2, "b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.3, "clip": 0.0}
    )
    ours = unflatten_dict(weights, sep="/")
    adamw = optim.optimizer(config, 10)
    state = adamw.init(ours)
    theirs = {path: torch.nn.Parameter(torch.tensor(w)) for path, w in weights.items()}
    groups = [
        {"params": [theirs[path] for path in decaying], "weight_decay": 0.3},
        {"params": [theirs[path] for path in others], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    rate = optim.schedule(1e-2, 10, 0.2)
    for step, grad in enumerate(grads):
        updates, state = adamw.update(unflatten_dict(grad, sep="/"), state, ours)
        ours = optax.apply_updates(ours, updates)
        for group in reference.param_groups:
            group["lr"] = float(rate(step))
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(grad[path])
        reference.step()
    for path, leaf in flat(ours).items():
        # float32 rounding over five steps; a step moves a weight by about 1e-2.
        np.testing.assert_allclose(leaf, theirs[path].detach().numpy(), atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("clip", "largest"), [(0.0, 5.0), (1.0, 1.0), (9.0, 5.0)])
def test_clip(clip, largest):
    config = ConfigDict(
        {"peak_lr": 1.0, "warmup_ratio": 0.0, "b1": 0.0, "b2": 0.0, "eps": 1e3, "weight_decay": 0.0, "clip": clip}
    )
    adamw = optim.optimizer(config, 10)
    weights = {"kernel": np.zeros(2, np.float32)}
    updates, _ = adamw.update({"kernel": np.array([3.0, 4.0], np.float32)}, adamw.init(weights), weights)
    # With such an eps the update is the gradient over eps, but for the gradient's own size beside eps.
    np.testing.assert_allclose(np.linalg.norm(updates["kernel"]) * 1e3, largest, rtol=1e-2)
