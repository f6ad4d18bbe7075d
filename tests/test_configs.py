"""Every experiment as the text it expands to, and what the full-size ones must agree with."""

import importlib
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import pytest
from flax.traverse_util import flatten_dict

from configs import hardware, stage1, stage2, stage3
from rad_jax import optim, state, tasks

EXPERIMENTS = [
    *(f"phantom:{stage}{variant}" for stage in ("lm", "stage1", "stage2", "stage3") for variant in ("", ",full")),
    *("phantom:tuning", "phantom:projector"),
    *(
        "stage1",
        "stage1:biomedclip,v5e-64",
        "stage2",
        "stage3",
        "stage3:v5e-64",
        "stage3:v5e-256",
        "stage3:v5p-8",
        "stage3:full,v5p-64",
        "stage3:projector,v5e-64",
    ),
]


def load(name: str) -> Any:
    module, _, variant = name.partition(":")
    return importlib.import_module(f"configs.{module}").get_config(*([variant] if variant else []))


def expanded(config: Any) -> str:
    """One setting per line, in order of their names."""
    flat = flatten_dict(config.to_dict(), sep=".")
    return "".join(f"{name} = {value!r}\n" for name, value in sorted(flat.items()))


def shapes(config: Any) -> Any:
    """The variables of an experiment as shapes; with XLA's attention, since cuDNN's cannot be traced without it."""
    config = ml_collections.ConfigDict(config)
    for part in ("vision", "text", "llm"):
        if part in config.model:
            config.model[part].attention = "xla"
    return nn.unbox(jax.eval_shape(tasks.make_task(config).init, jax.random.key(0)))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_expanded_config(golden, name):
    golden(f"{name.replace(':', '_').replace(',', '_')}.txt", expanded(load(name)))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_config_builds(name):
    """The model takes every setting, the patterns match, the optimizer is made, words and targets fit each other."""
    config = load(name)
    task = tasks.make_task(config)
    state.split(shapes(config), config.trainable)
    optim.optimizer(config.optimizer, config.steps)
    assert config.data.target_length <= config.data.text_length
    assert config.batch_size % (config.num_micro * config.mesh.data * config.mesh.fsdp) == 0
    if config.task == "contrastive":
        assert config.data.text_length <= config.model.text.max_positions
    else:
        length = config.data.text_length + task.model.config.image_tokens
        assert length + 256 <= config.model.llm.max_positions  # and 256 generated tokens


def test_full_size_towers_have_the_parameters_of_the_released_ones():
    """Counted from the released files: trunk, BERT without pooler, heads and temperature."""
    params = shapes(stage1.get_config())["params"]
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    released = {
        "vision": 86_579_712,
        "vision_head": 393_216,
        "text": 108_891_648,
        "text_head": 819_200,
        "logit_scale": 1,
    }
    assert counts == released


@pytest.mark.parametrize("stage", [2, 3])
def test_trainable_table(golden, stage):
    """What trains and what does not, at full size."""
    config = (stage2, stage3)[stage - 2].get_config()
    trainable, frozen = state.split(shapes(config), config.trainable)
    projector, adapters = 19_931_136, 159_907_840  # the released files
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == projector + (adapters if stage == 3 else 0)
    golden(f"trainable_stage{stage}.txt", state.table(trainable, frozen) + "\n")


def test_steps_of_the_published_recipe():
    assert (stage2.get_config().steps, stage3.get_config().steps) == (1563, 18752)


STEPS = {stage: stage.get_config().steps for stage in (stage1, stage2, stage3)}


@pytest.mark.parametrize("machine", hardware.MACHINES)
def test_machine(machine):
    """The mesh and how things are computed come from the machine; the global batch does not, but where it would be a row per device."""
    for stage in (stage1, stage2, stage3):
        config, found = stage.get_config(machine), hardware.MACHINES[machine]
        grown = config.batch_size // stage.BATCH
        assert config.batch_size == grown * stage.BATCH
        assert grown == 1 or config.batch_size == 2 * found.data * found.fsdp
        assert config.steps == -(-STEPS[stage] // grown)
        assert config.mesh.to_dict() == {"data": found.data, "fsdp": found.fsdp, "tensor": found.tensor}
        assert {config.model[part].attention for part in ("vision", "text", "llm") if part in config.model} == {
            found.attention
        }
        rows = found.rows * (16 if stage is stage1 else 1)
        assert config.batch_size == config.num_micro * rows * found.data * found.fsdp or config.num_micro == 1
        if "llm" in config.model:
            assert (config.model.llm.remat, config.model.llm.rope) == (found.remat, found.rope)
        assert config.compiler_options.to_dict() == found.options


def test_full_fine_tuning():
    """Every weight of the language model and the projector, nothing else, and no adapters."""
    config = stage3.get_config("full,v5e-256")
    trainable, frozen = state.split(shapes(config), config.trainable)
    assert {path.split("/")[1] for path in flatten_dict(trainable, sep="/")} == {"llm", "projector"}
    assert set(frozen["params"]) == {"vision"} and set(frozen) == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable["params"]["llm"])) == 6_738_415_616  # Llama 2 7B


def test_projector_alone_in_stage_3():
    """On the words and for the steps of stage 3; nothing of the language model, and no adapters."""
    config, usual = stage3.get_config("projector,v5e-64"), stage3.get_config("v5e-64")
    trainable, frozen = state.split(shapes(config), config.trainable)
    assert set(trainable["params"]) == {"projector"} and set(frozen) == {"params"}
    assert (config.data, config.optimizer, config.steps) == (usual.data, usual.optimizer, usual.steps)


@pytest.mark.parametrize(("name", "learns"), [("tuning", {"llm", "projector"}), ("projector", {"projector"})])
def test_phantom_without_adapters(name, learns):
    config, usual = load(f"phantom:{name}"), load("phantom:stage3")
    trainable, frozen = state.split(shapes(config), config.trainable)
    assert set(trainable["params"]) == learns and set(trainable) | set(frozen) == {"params"}
    assert (config.data, config.steps, config.batch_size) == (usual.data, usual.steps, usual.batch_size)


def test_unknown_machine():
    with pytest.raises(ValueError, match="'v9' is unknown; choose cpu-1, cpu-8, v5e-8"):
        stage3.get_config("v9")


def test_batch_that_a_machine_cannot_share():
    config = stage3.get_config()
    config.batch_size = 12
    with pytest.raises(ValueError, match="12 rows cannot be shared by 8 devices of v5e-8"):
        hardware.on("v5e-8", config)


def test_unknown_phantom_experiment():
    with pytest.raises(ValueError, match="choose lm, stage1, stage2, stage3"):
        load("phantom:stage4")
