"""Where every array of the full-size stages lies on every machine, as text under review; no device is needed for it."""

import functools
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from configs import hardware, stage1, stage2, stage3
from rad_jax import generate, optim, sharding, tasks, train

STAGES = {
    "stage1": stage1.get_config,
    "stage2": stage2.get_config,
    "stage3": stage3.get_config,
    "stage3_full": lambda: stage3.get_config("full"),
}
MACHINES = [*hardware.MACHINES, "v5e-64x2"]  # two slices


@functools.cache
class Placed:
    """A stage on a machine, as shapes and places."""

    def __init__(self, stage, machine, frozen_dtype=None):
        self.config = config = STAGES[stage]()
        found = hardware.MACHINES[machine.partition("x")[0]]
        config.batch_size = math.lcm(config.batch_size, 8 * found.data * found.fsdp)
        hardware.on(machine, config)
        config.num_micro = 2  # a machine's own says nothing of places
        config.frozen_dtype = frozen_dtype or config.frozen_dtype
        for part in {"vision", "text", "llm"} & set(config.model):
            if config.model[part].attention == "cudnn":  # cannot be traced away from its machine
                config.model[part].attention = "xla"
        self.sizes = dict(config.mesh)
        self.mesh = AbstractMesh(
            tuple(self.sizes[axis] for axis in sharding.AXES),
            sharding.AXES,
            axis_types=(AxisType.Auto,) * len(sharding.AXES),
        )
        self.task, self.initial = task_of(config.model.to_json(), config.task, config.frozen_dtype, config.dropout_bits)
        self.optimizer = optim.optimizer(config.optimizer, config.steps)
        boxed = jax.eval_shape(self.initial.init, jax.random.key(0))
        self.rules = flatten_dict(nn.logical_to_mesh(nn.get_partition_spec(boxed), sharding.RULES), sep="/")
        self.state, self.frozen = train.abstract(config, self.initial, self.optimizer, self.mesh)
        self.trains = flatten_dict(self.state.trainable, sep="/")
        self.leaves = {**self.trains, **flatten_dict(self.frozen, sep="/")}

    def weights(self):
        """A line per variable: dtype, shape, and the mesh axis that each dimension is cut along."""
        for path, leaf in sorted(self.leaves.items()):
            where = dims(leaf.shape, self.rules[path])
            yield f"{path:52} {'trains' if path in self.trains else 'frozen':7}{leaf.dtype.name:9} {where}"

    def moments(self):
        """Of each array of the optimizer its name, the path of the weight it belongs to ("" for none), and the array."""
        for keys, leaf in jax.tree_util.tree_leaves_with_path(self.state.opt_state):
            (name,) = (key.name for key in keys if isinstance(key, jax.tree_util.GetAttrKey))
            yield name, "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey)), leaf

    def optimizer_lines(self):
        """A line per weight: the optimizer's arrays that belong to it, as they are laid out."""
        found: dict[tuple[str, str], list[str]] = {}
        for name, path, leaf in self.moments():
            line = f"{leaf.dtype.name:9} {dims(leaf.shape, leaf.sharding.spec)}"
            found.setdefault((path, line), []).append(name)
        for (path, line), names in sorted(found.items()):
            yield f"{path or '-':52} {'+'.join(names):12}{line}"

    def on_machine(self):
        """Bytes per device; then what the mesh does not divide, and what of the optimizer does not lie with its weight."""
        parts = {"frozen": self.frozen, "trainable": self.state.trainable, "optimizer": self.state.opt_state}
        yield " ".join(f"{name}={size}" for name, size in self.sizes.items())
        yield ", ".join(f"{name} {sum(map(local, jax.tree.leaves(tree))):,}" for name, tree in parts.items())
        for path, leaf in sorted(self.leaves.items()):
            spec = tuple(self.rules[path]) + (None,) * leaf.ndim
            found = tuple(leaf.sharding.spec) + (None,) * leaf.ndim
            for n, wanted, axis in zip(leaf.shape, spec, found, strict=False):
                if wanted != axis:
                    yield f"whole: {path}, the dimension of {n}"
        for name, path, leaf in self.moments():
            if path and leaf.sharding != self.trains[path].sharding:
                yield f"elsewhere: {name} of {path}, {leaf.sharding.spec}"

    @functools.cached_property
    def constraints(self):
        """(dtype, shape, spec) of each constraint in the step's jaxpr, and how often it stands there."""
        rows, words, targets = self.config.batch_size, self.config.data.text_length, self.config.data.target_length
        size = self.config.model.vision.image_size
        shapes = {"tokens": (rows, words), "length": (rows,), "weight": (rows,), "image": (rows, size, size)}
        if self.config.task == "generative":
            shapes |= dict.fromkeys(("targets", "target_positions", "target_weights"), (rows, targets))
        step = train.make_step(self.task, self.optimizer, self.config.num_micro)
        return self.traced(step, self.state, self.frozen, abstract(shapes))

    def traced(self, function, *arguments):
        with jax.sharding.use_abstract_mesh(self.mesh), nn.logical_axis_rules(sharding.RULES):
            jaxpr = jax.make_jaxpr(function)(*arguments)
        found: Counter[tuple[str, tuple[int, ...], tuple[Any, ...]]] = Counter()
        for eqn in equations(jaxpr.jaxpr):
            if eqn.primitive.name == "sharding_constraint":
                aval, spec = eqn.invars[0].aval, tuple(eqn.params["sharding"].spec)
                found[aval.dtype.name, aval.shape, spec + (None,) * (aval.ndim - len(spec))] += 1
        return found

    def activations(self):
        """A line per constraint; B is one of two micro-batches of all devices."""
        names = {self.config.batch_size // 2: "B", self.config.batch_size: "2B"}
        found: Counter[str] = Counter()
        for (dtype, shape, spec), count in self.constraints.items():
            batch = [axis is not None and "data" in axis for axis in spec]
            named = [names[n] if b else n for n, b in zip(shape, batch, strict=True)]
            found[f"{dtype:9} {dims(named, spec)}"] += count
        return [f"{line}  ({count})" for line, count in sorted(found.items())]

    def uneven(self, others):
        """A line per activation of this machine, which computes as `others` does, that its mesh does not divide."""
        for _, shape, spec in sorted(others.constraints, key=str):
            for n, axes in zip(shape, spec, strict=True):
                # The rows of a batch are a multiple by construction, in these tests as in `hardware.on`.
                if isinstance(axes, str) and n % self.sizes[axes]:
                    yield f"padded: an activation's dimension of {n} along {axes}"

    def cache(self):
        """A line per array of the key-value cache, of 8 rows with room for 256 more tokens."""
        size, rows = self.config.model.vision.image_size, 8
        shapes = {"tokens": (rows, self.config.data.text_length), "length": (rows,), "image": (rows, size, size)}
        variables = jax.eval_shape(lambda key: nn.unbox(self.initial.init(key)), jax.random.key(0))

        def prefill(variables, batch):
            return generate.prefill(self.task.model, variables, batch, 256)

        found = self.traced(prefill, variables, abstract(shapes))
        depth = self.config.model.llm.depth
        for (dtype, shape, spec), count in sorted(found.items(), key=str):
            if len(shape) == 5 and shape[0] == depth:
                yield f"{dtype:9} {dims(shape, spec)}  ({count})"


@functools.cache
def task_of(model, name, frozen_dtype, dropout_bits):
    """A task, and its `init` in a form that is traced once; machines that compute alike share them."""
    shape = {"model": json.loads(model), "task": name, "frozen_dtype": frozen_dtype, "dropout_bits": dropout_bits}
    task = tasks.make_task(ConfigDict(shape))
    return task, SimpleNamespace(init=jax.jit(task.init))


def abstract(shapes):
    return {
        name: jax.ShapeDtypeStruct(shape, np.float32 if "weight" in name else np.int32)
        for name, shape in shapes.items()
    }


def dims(shape, spec):
    """A shape with the mesh axis of each dimension: 4096:fsdp x 64."""
    spec = tuple(spec) + (None,) * len(shape)
    cut = (f":{axis if isinstance(axis, str) else '+'.join(axis)}" if axis else "" for axis in spec)
    return " x ".join(f"{n}{axis}" for n, axis in zip(shape, cut, strict=False)) or "scalar"


def local(leaf):
    """Bytes of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def alike(stage, machines):
    """Machines that compute a stage with the same code, on whatever mesh: lists of names."""
    groups: dict[Any, list[str]] = {}
    for machine in machines:
        groups.setdefault(Placed(stage, machine).task, []).append(machine)
    return list(groups.values())


def written(stage, machines):
    first = Placed(stage, machines[0])
    lines = ["weights, by mesh axis", *first.weights()]
    lines += ["", "optimizer, by mesh axis", *first.optimizer_lines()]
    if "llm" in first.config.model and first.frozen.get("params", {}).get("llm"):
        eight = Placed(stage, machines[0], "int8")
        lines += ["", "weights where frozen_dtype is int8, as far as they differ"]
        lines += sorted(set(eight.weights()) - set(first.weights()))
    for group in alike(stage, machines):
        lines += ["", f"activations on {', '.join(group)}", *Placed(stage, group[0]).activations()]
    if stage == "stage3":
        lines += ["", "key-value cache of 8 rows, 256 tokens to write", *Placed(stage, "v5e-8").cache()]
    leaders = {machine: group[0] for group in alike(stage, machines) for machine in group}
    for machine in machines:
        here = Placed(stage, machine)
        lines += ["", f"{machine}, bytes per device", *here.on_machine(), *here.uneven(Placed(stage, leaders[machine]))]
    return "".join(f"{line.rstrip()}\n" for line in lines)


@pytest.mark.parametrize("stage", STAGES)
def test_shardings(golden, stage):
    golden(f"shardings_{stage}.txt", written(stage, MACHINES))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_activations_are_cut_alike_whatever_the_mesh(stage):
    """The golden shows them for the first of those that compute alike; here for another mesh."""
    for first, *others in alike(stage, MACHINES):
        expected = Placed(stage, first).activations()
        assert expected and others
        assert Placed(stage, others[-1]).activations() == expected
