"""Where every array of the full-size stages lies on every machine, as text under review; no device is needed for it."""

import functools
import math
from collections import Counter

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType

from configs import hardware, stage1, stage2, stage3
from rad_jax import optim, sharding, tasks, train

STAGES = {"stage1": stage1, "stage2": stage2, "stage3": stage3}
MACHINES = [*hardware.MACHINES, "v5e-64x2"]  # two slices


@functools.cache
class Placed:
    """A stage on a machine, as shapes and places."""

    def __init__(self, stage, machine):
        self.config = config = STAGES[stage].get_config()
        found = hardware.MACHINES[machine.partition("x")[0]]
        config.batch_size = math.lcm(config.batch_size, 8 * found.data * found.fsdp)
        hardware.on(machine, config)
        config.num_micro = 2  # a machine's own says nothing of places
        for part in {"vision", "text", "llm"} & set(config.model):
            config.model[part].attention = "xla"  # other kernels cannot be traced away from their machine
        self.sizes = tuple(config.mesh[axis] for axis in sharding.AXES)
        self.mesh = AbstractMesh(self.sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))
        self.task = tasks.make_task(config)
        self.optimizer = optim.optimizer(config.optimizer, config.steps)
        boxed = jax.eval_shape(self.task.init, jax.random.key(0))
        self.rules = flatten_dict(nn.logical_to_mesh(nn.get_partition_spec(boxed), sharding.RULES), sep="/")
        self.state, self.frozen = train.abstract(config, self.task, self.optimizer, self.mesh)
        self.trains = flatten_dict(self.state.trainable, sep="/")
        self.leaves = {**self.trains, **flatten_dict(self.frozen, sep="/")}

    def weights(self):
        """A line per variable: dtype, shape, and the mesh axis that each dimension is cut along."""
        for path, leaf in sorted(self.leaves.items()):
            spec = tuple(self.rules[path]) + (None,) * leaf.ndim
            dims = " x ".join(f"{n}{cut(axis)}" for n, axis in zip(leaf.shape, spec, strict=False)) or "scalar"
            yield f"{path:52} {'trains' if path in self.trains else 'frozen':7}{leaf.dtype.name:9} {dims}"

    def machine(self):
        """Bytes per device, and the dimensions that stay whole because the mesh does not divide them."""
        parts = {"frozen": self.frozen, "trainable": self.state.trainable, "optimizer": self.state.opt_state}
        yield " ".join(f"{name}={size}" for name, size in zip(sharding.AXES, self.sizes, strict=True))
        yield ", ".join(f"{name} {sum(map(local, jax.tree.leaves(tree))):,}" for name, tree in parts.items())
        for path, leaf in sorted(self.leaves.items()):
            spec = tuple(self.rules[path]) + (None,) * leaf.ndim
            found = tuple(leaf.sharding.spec) + (None,) * leaf.ndim
            for n, wanted, axis in zip(leaf.shape, spec, found, strict=False):
                if wanted != axis:
                    yield f"whole: {path}, the dimension of {n}"

    def activations(self):
        """A line per constraint in the step's jaxpr, and how often it stands there; B is one of two micro-batches of all devices."""
        batch_size = self.config.batch_size
        names = {batch_size // 2: "B", batch_size: "2B"}
        found: Counter[str] = Counter()
        for eqn in equations(self.jaxpr().jaxpr):
            if eqn.primitive.name == "sharding_constraint":
                aval, spec = eqn.invars[0].aval, tuple(eqn.params["sharding"].spec)
                spec += (None,) * (aval.ndim - len(spec))
                batch = [axis is not None and "data" in axis for axis in spec]
                dims = (names[n] if b else n for n, b in zip(aval.shape, batch, strict=True))
                shown = " x ".join(f"{n}{cut(axis)}" for n, axis in zip(dims, spec, strict=True))
                found[f"{aval.dtype.name:9} {shown}"] += 1
        yield from (f"{line}  ({count})" for line, count in sorted(found.items()))

    def jaxpr(self):
        c = self.config
        rows, words, targets = c.batch_size, c.data.text_length, c.data.target_length
        size = c.model.vision.image_size
        shapes = {"tokens": (rows, words), "length": (rows,), "weight": (rows,), "image": (rows, size, size)}
        if c.task == "generative":
            shapes |= dict.fromkeys(("targets", "target_positions", "target_weights"), (rows, targets))
        batch = {
            name: jax.ShapeDtypeStruct(shape, np.float32 if "weight" in name else np.int32)
            for name, shape in shapes.items()
        }
        step = train.make_step(self.task, self.optimizer, c.num_micro)
        with jax.sharding.use_abstract_mesh(self.mesh), nn.logical_axis_rules(sharding.RULES):
            return jax.make_jaxpr(step)(self.state, self.frozen, batch)


def cut(axis):
    """How a dimension along a mesh axis is written: 4096:fsdp."""
    return f":{axis if isinstance(axis, str) else '+'.join(axis)}" if axis else ""


def local(leaf):
    """Bytes of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def written(stage, machines):
    lines = ["weights, by mesh axis; mu and nu of what trains lie where their weights lie"]
    lines += list(Placed(stage, machines[0]).weights())
    lines += ["", "activations"]
    lines += list(Placed(stage, machines[0]).activations())
    for machine in machines:
        lines += ["", f"{machine}, bytes per device", *Placed(stage, machine).machine()]
    return "".join(f"{line.rstrip()}\n" for line in lines)


@pytest.mark.parametrize("stage", STAGES)
def test_shardings(golden, stage):
    golden(f"shardings_{stage}.txt", written(stage, MACHINES))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_activations_are_cut_alike_on_all_machines(stage):
    """The golden shows them for one machine; here one of each kind."""
    machines = ("cpu-1", "cpu-8", "v5e-256", "h100-8", "v5e-64x2")
    first, *others = ([line.rpartition("  ")[0] for line in Placed(stage, m).activations()] for m in machines)
    assert first
    assert all(other == first for other in others)
