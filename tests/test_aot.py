"""Abstract arguments against real ones, and claims about the compiled step: its FLOPs, its collectives, its size in depth."""

import functools
import json
import math
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from configs import common
from launch import compile as command
from rad_jax import aot, chips, contrastive, flops, hlo, optim, schedule, sharding, tasks, train

CPU = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # quick to compile


def experiment(stage, remat="none", depth=3, num_micro=1, **settings):
    """A small model with the proportions of the real one, 49 patches and 65 words a row, on eight devices."""
    vision = {"image_size": 98, "patch_size": 14, "width": 64, "depth": 3, "heads": 2, "mlp_dim": 256}
    llm = {"vocab_size": 512, "width": 128, "depth": depth, "heads": 4, "kv_heads": 2, "mlp_dim": 352, "remat": remat}
    lora = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ("q", "k", "v", "o", "gate", "up", "down")}
    model = {"vision": {**vision, "feature_layer": -2}, "llm": llm}
    trainable: tuple[str, ...] = ("params/projector/.*",)
    if stage == 3:
        model["lora"], trainable = lora, (*trainable, "lora/.*")
    data = {"template": "v1", "text_length": 65, "target_length": 32}
    config = common.experiment("generative", model, trainable, data, steps=10, batch_size=16)
    config.update({"frozen_dtype": "bfloat16", "num_micro": num_micro, "mesh": {"data": 1, "fsdp": 8, "tensor": 1}})
    config.update(settings)
    return config


def lowered(config):
    mesh = sharding.make_mesh(**config.mesh)
    task, optimizer = tasks.make_task(config), optim.optimizer(config.optimizer, config.steps)
    state, frozen = train.abstract(config, task, optimizer, mesh)
    step = train.jitted_step(config, task, optimizer, state)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        return state, step.lower(state, frozen, aot.abstract_batch(config, mesh))


@functools.cache
def text_of(*settings, **more):
    return lowered(experiment(*settings, **more))[1].compile(compiler_options=CPU).as_text()


def formula(config):
    data = config.data
    lengths = flops.Lengths(data.text_length, data.target_length, data.text_length, data.target_length)
    parts = flops.training(tasks.model_config(config), config.trainable, lengths, config.batch_size)
    return flops.total(parts).executed * config.batch_size / 8


@pytest.mark.parametrize(
    ("stage", "remat"),
    [
        (3, "full"),
        (3, "minimal"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((3, "none"), (3, "attention"), (3, "dots"), (2, "full"))
        ),
    ],
)
def test_compiled_flops_are_those_of_the_formula(stage, remat):
    """Within 5 %, either way: more would be a gradient of the frozen weights (another 2 N), fewer a formula that flatters."""
    assert hlo.parse(text_of(stage, remat)).flops == pytest.approx(formula(experiment(stage, remat)), rel=0.05)


@pytest.mark.slow
def test_accumulation_computes_nothing_twice():
    assert hlo.parse(text_of(3, "full", num_micro=2)).flops == pytest.approx(
        hlo.parse(text_of(3, "full")).flops, rel=0.01
    )


def reduced(text, mesh):
    """Elements that a chip adds to those of chips with other rows, per step: among these would be gradients of frozen weights."""
    found = schedule.read(text, schedule.Network(chips.CHIPS["v5e"], mesh)).collectives
    sizes = [
        size
        for (kind, axes, what), size in found.items()
        if what == "bytes" and kind in ("all-reduce", "reduce-scatter") and {"data", "fsdp"} & set(axes.split("+"))
    ]
    return sum(sizes) / 4


@pytest.mark.parametrize(
    ("stage", "mesh", "num_micro"),
    [
        (3, (1, 8, 1), 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, (1, 8, 1), 1), (3, (1, 8, 1), 2), (3, (2, 2, 2), 1), (2, (2, 2, 2), 1))
        ),
    ],
)
def test_only_gradients_of_trainables_cross_the_mesh(stage, mesh, num_micro):
    """They are float32, and cross once a micro-batch; the frozen decoder alone has several times as many weights."""
    axes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    config = experiment(stage, "full", num_micro=num_micro, mesh=axes)
    state, step = lowered(config)
    # A chip's part of the gradients before they are scattered over fsdp; tensor has cut them already.
    trainable = axes["fsdp"] * sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.trainable)
    )
    _, frozen = train.abstract(
        config, tasks.make_task(config), optim.optimizer(config.optimizer, 10), sharding.make_mesh(*mesh)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) > 3 * axes["tensor"] * trainable
    if mesh == (1, 8, 1):
        text = text_of(stage, "full", **({"num_micro": num_micro} if num_micro > 1 else {}))
    else:
        text = step.compile(compiler_options=CPU).as_text()
    assert 0.5 * trainable < reduced(text, axes) / num_micro < 1.1 * trainable


def test_optimizer_has_two_moments_of_each_trainable_and_nothing_else():
    state, _ = lowered(experiment(3))
    weights = jax.tree.leaves(state.trainable)
    arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(arrays) == 2 * len(weights) == 2 * (4 + 2 * 7)
    assert sum(leaf.size for leaf in arrays) == 2 * sum(leaf.size for leaf in weights)


def test_program_is_flat_in_depth():
    """Compile time and memory follow the size of the program: counted, since timing is noise."""
    short, long = (lowered(experiment(3, "full", depth))[1].as_text().count("\n") for depth in (2, 32))
    assert long < 1.05 * short


@pytest.mark.slow
def test_compiled_program_is_flat_in_depth():
    short, long = (text_of(3, "full", depth).count("\n") for depth in (2, 32))
    assert long < 1.3 * short


@pytest.mark.parametrize("frozen_dtype", ["bfloat16", "int8"])
def test_abstract_state_is_that_of_training(training, frozen_dtype):
    """Every array of `train.initial`: shape, dtype, place; the moments too."""
    config = training.config("stage3", frozen_dtype=frozen_dtype)
    task, mesh = tasks.make_task(config), training.mesh(fsdp=4, tensor=2)
    optimizer = optim.optimizer(config.optimizer, config.steps)
    expected = train.abstract(config, task, optimizer, mesh)
    base = training.config("stage3")
    with jax.set_mesh(mesh):
        found = train.initial(config, task, optimizer, training.variables(base), mesh)

    def described(leaf):
        return leaf.shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape)

    assert jax.tree.map(described, found) == jax.tree.map(described, expected)


@pytest.mark.parametrize("stage", ["lm", "stage1", "stage3"])
def test_abstract_batch_is_that_of_the_input_pipeline(training, stage):
    config = training.config(stage)
    batch = next(training.batches(config))
    found = aot.abstract_batch(config, training.mesh(fsdp=8))
    if "vision" not in config.model:
        batch.pop("image", None)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, jnp.dtype(x.dtype)) for name, x in batch.items()
    }


def test_report_of_two_towers(training, monkeypatch):
    """The figures of stage 1 around those of a compiler that is not asked; the tower's activations are among them and on the page."""
    config = training.config("stage1", batch_size=16, mesh={"data": 1, "fsdp": 8, "tensor": 1})
    config.update({"num_micro": 2, "steps": 100})
    task, mesh = tasks.make_task(config), sharding.make_mesh(**config.mesh)
    state, frozen = train.abstract(config, task, optim.optimizer(config.optimizer, 100), mesh)
    monkeypatch.setattr(schedule, "network_of", lambda program: None)
    monkeypatch.setattr(schedule, "read", lambda text, network: schedule.Reading(seconds=0.5, other=0.5, flops=1e9))
    memory = dict.fromkeys(("argument_size", "output_size", "alias_size", "temp_size", "generated_code_size"), 2**20)
    sizes = {f"{name}_in_bytes": size for name, size in memory.items()} | {"peak_memory_in_bytes": 3 * 2**20}
    executable = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))
    arguments = (state, frozen, aot.abstract_batch(config, mesh))
    program = aot.Program(config, chips.find("v5e-8"), 1, mesh, arguments, 16, 0, executable, "", 1.0)
    found = aot.report(program)
    kept = contrastive.activation_bytes(task.model, config.data.text_length)["image"]
    assert found["activation_bytes_per_image"] == kept > 32 * 32  # an image and more
    assert (found["frozen_params"], found["num_micro"], found["peak_hbm_bytes"]) == (0, 2, 3 * 2**20)
    assert found["trainable_params"] == sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    assert found["chip_hours"] == pytest.approx(100 * 0.5 * 8 / 3600)
    assert f"activations       {kept / 2**20:.2f} MiB per image" in command.page(json.loads(json.dumps(found)))


# ----------------------------------------------------------------------------------------------------------------------- with the TPU compiler

tpu = pytest.mark.slow


@pytest.fixture
def place():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    return chips.find("v5e-8")


@tpu
def test_a_program_that_does_not_fit(place):
    config = experiment(3, batch_size=4096, mesh={"data": 1, "fsdp": 8, "tensor": 1})
    config.model.llm.update(width=1024, mlp_dim=4096, depth=16)
    with pytest.raises(aot.DoesNotFit, match=r"needs [\d.]+ GiB per chip of 15.75 GiB: [\d.]+ GiB too many") as caught:
        aot.compile_training(config, place)
    assert caught.value.needed > caught.value.available == place.chip.hbm


def test_without_the_tpu_compiler(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(aot.UserError, match=r"needs its compiler, libtpu.*pip install 'jax\[tpu\]=="):
        aot.devices(chips.find("v5e-8"))


def test_other_errors_of_the_compiler_are_not_explained_away():
    error = RuntimeError("INTERNAL: something else")
    assert aot._explained(error) is error
    memory = aot._explained(RuntimeError("temporaries (17.58G) exceeds available HBM (15.75G)"))
    assert isinstance(memory, aot.DoesNotFit) and memory.needed == pytest.approx(17.58 * 2**30)
