"""The same training on one device and on eight fake ones, and where the arrays are meanwhile."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from rad_jax import optim, sharding, tasks, train
from rad_jax.errors import UserError

MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
# Every way to cut eight devices three ways. Compiling a step for eight devices takes seconds: short runs have the mesh with all axes.
MESHES = [
    {"data": data, "fsdp": fsdp, "tensor": 8 // data // fsdp}
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8
]
CASES = [
    pytest.param(stage, axes, 1, marks=[] if axes == MIXED and stage != "stage2" else pytest.mark.slow)
    for stage in ("stage1", "stage2", "stage3")
    for axes in MESHES
]
CASES += [
    pytest.param("lm", MIXED, 1, marks=pytest.mark.slow),  # word embeddings that learn
    pytest.param("stage1", MIXED, 2, marks=pytest.mark.slow),
    pytest.param("stage3", MIXED, 2, marks=pytest.mark.slow),
]


class Trained(NamedTuple):
    """What `trained` gives."""

    numbers: np.ndarray
    grads: dict[str, np.ndarray]
    change: dict[str, np.ndarray]
    state: Any
    compiled: Any


def flat(tree):
    return {path: np.array(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def trained(training):
    """(stage, mesh) -> losses and gradient norms of three steps, the first one's gradients and the change of the weights over all three
    (numpy by path), the state after them, the compiled step."""

    @functools.cache
    def go(stage, axes, num_micro):
        config = training.config(stage, steps=10)
        # Adam's updates are nearly the sign of the gradient, whose rounding they would blow up; with such an eps they are its multiple.
        config.optimizer.update(warmup_ratio=0.0, peak_lr=0.1, eps=1.0)
        task, mesh = tasks.make_task(config), training.mesh(**dict(axes))
        optimizer = optim.optimizer(config.optimizer, config.steps)
        numbers: list[list[float]] = []
        with jax.set_mesh(mesh):
            state, frozen = train.initial(config, task, optimizer, training.variables(config), mesh)
        where = jax.tree.map(lambda x: x.sharding, state)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            batches = [sharding.place_batch(training.batch(config, seed=seed, blank=(1,)), mesh) for seed in range(3)]
            # Compiling takes far longer than running, so it may do without polishing the code.
            options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
            made = train.make_step(task, optimizer, num_micro)
            step = jax.jit(made, out_shardings=(where, None), compiler_options=options)
            compiled = step.lower(state, frozen, batches[0]).compile()
            before = flat(state.trainable)
            for batch in batches:
                state, row = compiled(state, frozen, batch)
                if not numbers:
                    grads = {path: mu / (1 - config.optimizer.b1) for path, mu in flat(state.opt_state[0].mu).items()}
                numbers.append([float(row["loss"]), float(row["grad_norm"])])
        change = {path: leaf - before[path] for path, leaf in flat(state.trainable).items()}
        return Trained(np.array(numbers), grads, change, state, compiled)

    return lambda stage, num_micro=1, **axes: go(stage, tuple(axes.items()), num_micro)


def apart(found, expected):
    """The largest difference of each leaf relative to its largest entry, or to a hundredth of the largest anywhere: the greatest of these.

    The floor is for leaves that are all rounding, such as the gradients of key biases, which a softmax does not see.
    """
    assert found.keys() == expected.keys()
    floor = 1e-2 * max(np.abs(leaf).max() for leaf in expected.values())
    assert floor > 0
    return max(np.abs(found[path] - leaf).max() / max(np.abs(leaf).max(), floor) for path, leaf in expected.items())


@pytest.mark.parametrize(("stage", "axes", "num_micro"), CASES, ids=str)
def test_eight_devices_learn_what_one_learns(trained, stage, axes, num_micro):
    """Losses and gradient norms of three steps, gradients of the first, and how far the weights went; of one device without accumulation.

    float32 sums over devices come in another order: 1e-5 relative in a loss, 1e-4 in a gradient. The weights themselves are rounded too.
    """
    one, eight = trained(stage), trained(stage, num_micro, **axes)
    np.testing.assert_allclose(eight.numbers[:, 0], one.numbers[:, 0], rtol=1e-5)
    np.testing.assert_allclose(eight.numbers[:, 1], one.numbers[:, 1], rtol=1e-4)
    assert one.numbers[0, 0] != one.numbers[1, 0]
    assert apart(eight.grads, one.grads) < 1e-4
    assert apart(eight.change, one.change) < 2e-4


def test_step_shards_what_the_rules_say(trained):
    """Not only the first state: what the compiled step takes and gives, moments included, lies where the rules put it."""
    state, compiled = trained("stage3", **MIXED)[-2:]
    expected = {
        ("lora", "llm", "layers", "attn", "q", "a"): (None, "fsdp", None),
        ("lora", "llm", "layers", "attn", "q", "b"): (None, "fsdp", "tensor", None),
        ("lora", "llm", "layers", "attn", "o", "a"): (None, "tensor", None, "fsdp"),
        ("lora", "llm", "layers", "mlp", "down", "b"): (None, None, "fsdp"),
        ("params", "projector", "fc1", "kernel"): ("fsdp", "tensor"),
        ("params", "projector", "fc1", "bias"): ("tensor",),
    }
    mesh = state.step.sharding.mesh
    (given, frozen, _), _ = compiled.input_shardings
    moments = state.opt_state[0].mu
    for path, axes in expected.items():
        for tree in (state.trainable, moments):
            leaf = functools.reduce(lambda node, key: node[key], path, tree)
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*axes)), leaf.ndim), path
            smallest = leaf.size // np.prod([2 for axis in axes if axis])
            assert {shard.data.size for shard in leaf.addressable_shards} == {smallest}
        place = functools.reduce(lambda node, key: node[key], path, given.trainable)
        assert place.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*axes)), len(axes)), path
    kernel = frozen["params"]["llm"]["layers"]["attn"]["q"]["kernel"]
    assert kernel.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor", None)), 4)


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_jaxpr_of_the_step_has_sharding_constraints(training, stage):
    """linen drops its constraints without a word where there is no mesh or no rules."""
    config = training.config(stage)
    task, mesh = tasks.make_task(config), training.mesh(**MIXED)
    optimizer = optim.optimizer(config.optimizer, config.steps)

    def jaxpr():
        return str(jax.make_jaxpr(train.make_step(task, optimizer, 2))(state, frozen, training.batch(config)))

    with jax.set_mesh(mesh):
        state, frozen = train.initial(config, task, optimizer, training.variables(config), mesh)
        with nn.logical_axis_rules(sharding.RULES):
            text = jaxpr()
        assert "sharding_constraint" not in jaxpr()
    assert text.count("sharding_constraint") > 10
    assert "('data', 'fsdp')" in text and "'tensor'" in text


def test_make_mesh():
    mesh = sharding.make_mesh(2, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_mesh_for_another_number_of_devices():
    with pytest.raises(UserError, match="data=1 x fsdp=4 x tensor=1 needs 4 devices but 8 cpu devices are here: set"):
        sharding.make_mesh(1, 4, 1)


def test_dimension_that_its_axis_does_not_divide_stays_whole(training):
    """Two heads on four devices, say."""
    config = training.config("lm")
    boxed = jax.eval_shape(tasks.make_task(config).init, jax.random.key(0))
    places = sharding.variable_shardings(boxed, training.mesh(fsdp=2, tensor=4))["params"]["llm"]["layers"]
    assert places["attn"]["q"]["kernel"].spec == PartitionSpec(None, "fsdp", None, None)
    assert places["mlp"]["up"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")


def test_place_batch_spreads_rows(training):
    mesh = training.mesh(**MIXED)
    rows = np.arange(16, dtype=np.int32).reshape(8, 2)
    placed = sharding.place_batch({"tokens": rows}, mesh)["tokens"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
