"""Ahead-of-time compilation: the real step of a real config for TPUs that are not here, by the compiler that a pod would use.

No weight is read: arguments are shapes, dtypes and places. The compiler (libtpu) tells what memory a chip needs, which collectives it has
put in, and a schedule with an estimate of every operation's cycles, from which `schedule` predicts a step's time.
"""

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rad_jax import chips, flops, generate, optim, schedule, sharding, tasks, train
from rad_jax.errors import UserError

# Keeps libtpu from asking a cloud's metadata server where it is, and from claiming the machine for one process.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class DoesNotFit(UserError):
    """The program needs more memory than a chip has; `needed` bytes, as far as the compiler tells."""

    def __init__(self, needed: float, available: float):
        super().__init__(
            f"the program needs {needed / chips.GIB:.2f} GiB per chip of {available / chips.GIB:.2f} GiB: "
            f"{(needed - available) / chips.GIB:.2f} GiB too many."
        )
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, what went into it, and how long compiling took in seconds."""

    mesh: Mesh
    place: chips.Slice
    slices: int
    executable: Any
    text: str
    arguments: tuple[Any, ...]
    seconds: float

    @property
    def memory(self) -> dict[str, int]:
        """Bytes per chip. `peak` is what counts: arguments and temporaries overlap where memory is reused."""
        found = self.executable.memory_analysis()
        return {
            "arguments": found.argument_size_in_bytes,
            "outputs": found.output_size_in_bytes,
            "aliased": found.alias_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "code": found.generated_code_size_in_bytes,
            "peak": found.peak_memory_in_bytes,
        }


def devices(place: chips.Slice, slices: int = 1) -> list[Any]:
    """Devices that can be compiled for and not run on.

    Raises:
        UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for a TPU needs its compiler, libtpu, which runs on any x86-64 Linux: pip install 'jax[tpu]=={jax.__version__}'."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental.topologies import get_topology_desc

    options: dict[str, Any] = {"wrap": place.wrap} if any(place.wrap) else {}
    if place.chip.cores == 2:
        options["chip_config_name"] = "megacore"
    if place.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    name = f"{place.chip.generation}:{place.arrangement}"
    return list(get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def compile_training(config: Any, place: chips.Slice, slices: int = 1) -> Program:
    """The train step of an experiment.

    Raises:
        DoesNotFit: a chip has too little memory.
        UserError: the mesh is not that of the slices, or libtpu is missing.
    """
    mesh = sharding.make_mesh(**config.mesh, devices=devices(place, slices))
    task, optimizer = tasks.make_task(config), optim.optimizer(config.optimizer, config.steps)
    state, frozen = train.abstract(config, task, optimizer, mesh)
    step = train.jitted_step(config, task, optimizer, state)
    return _compile(step, (state, frozen, abstract_batch(config, mesh)), mesh, place, slices, {})


def compile_generation(config: Any, place: chips.Slice, slices: int, rows: int, max_new_tokens: int) -> Program:
    """Prefill of `rows` prompts of `config.data.text_length` tokens in all, and greedy decoding of up to `max_new_tokens`.

    Raises: as `compile_training`.
    """
    mesh = sharding.make_mesh(**config.mesh, devices=devices(place, slices))
    task = tasks.make_task(config)
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    variables = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.frozen_dtype), sharding=where),
        nn.unbox(boxed),
        sharding.variable_shardings(boxed, mesh),
    )
    batch = {name: x for name, x in abstract_batch(config, mesh, rows).items() if name in ("tokens", "length", "image")}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    options = {"max_new_tokens": max_new_tokens, "eos_id": 2}
    return _compile(generate.generate, (task.model, variables, batch, key), mesh, place, slices, options)


def abstract_batch(config: Any, mesh: Mesh, rows: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """What `input_pipeline.train_iterator` gives for an experiment, as shapes, dtypes and places; of `config.batch_size` rows."""
    rows = rows or config.batch_size
    text, targets = (rows, config.data.text_length), (rows, config.data.target_length)
    shapes = {"tokens": (text, jnp.int32), "length": ((rows,), jnp.int32), "weight": ((rows,), jnp.float32)}
    shapes |= {"truncated": ((rows,), jnp.int32), "index": ((rows,), jnp.int32)}
    if "vision" in config.model:
        size = config.model.vision.image_size
        shapes["image"] = ((rows, size, size), jnp.uint8)
    if config.task == "generative":
        shapes |= {"targets": (targets, jnp.int32), "target_positions": (targets, jnp.int32)}
        shapes["target_weights"] = (targets, jnp.float32)
    where = sharding.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, (shape, dtype) in shapes.items()}


def _compile(
    function: Any, arguments: tuple[Any, ...], mesh: Mesh, place: chips.Slice, slices: int, options: dict[str, Any]
) -> Program:
    start = time.perf_counter()
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        lowered = function.lower(*arguments, **options)
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise _explained(error) from error
    seconds = time.perf_counter() - start
    return Program(mesh, place, slices, executable, executable.as_text(), arguments, seconds)


def _explained(error: Exception) -> Exception:
    """The compiler's out-of-memory error as ours; others as they are."""
    if found := re.search(r"([\d.]+)([GMK]?)\) exceeds available HBM \(([\d.]+)([GMK]?)", str(error)):
        unit = {"G": 2**30, "M": 2**20, "K": 2**10, "": 1}
        return DoesNotFit(float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]])
    return error


# ----------------------------------------------------------------------------------------------------------------------- the report


def report(
    config: Any, program: Program, text_tokens: float | None, generate_rows: int | None, max_new_tokens: int
) -> dict[str, Any]:
    """What a compiled program takes and how fast it should be.

    Args:
        config: the experiment.
        program: its step, or generation.
        text_tokens: real text tokens of a row on average; None counts all as real.
        generate_rows: rows that generation was compiled for, None for the train step.
        max_new_tokens: of generation.
    """
    reading = schedule.read(program.text, schedule.network_of(program))
    model = tasks.model_config(config)
    text, targets = config.data.text_length, config.data.target_length
    real = min(text, text_tokens or text)
    lengths = flops.Lengths(real, min(targets, real), text, targets)
    rows = generate_rows or config.batch_size
    if generate_rows:
        parts = flops.writing(model, lengths, max_new_tokens)
    else:
        parts = flops.training(model, config.trainable, lengths, rows)
    work, total_chips = flops.total(parts), program.place.chips * program.slices
    share = rows / total_chips / reading.seconds / program.place.chip.peak
    memory = program.memory
    image = model.image_tokens
    return {
        "topology": program.place.name,
        "slices": program.slices,
        "chips": total_chips,
        "mesh": dict(program.mesh.shape),
        "sequence_length": text + image,
        "real_tokens": real + image,
        "global_batch": rows,
        "num_micro": config.num_micro,
        "peak_hbm_bytes": memory["peak"],
        "hbm_bytes": program.place.chip.hbm,
        "memory": memory,
        "flops_formula": work.executed * rows / total_chips,
        "flops_compiled": reading.flops,
        "collectives": reading.collectives,
        "predicted_step_s": reading.seconds,
        "schedule": {"matmul_s": reading.matmul, "other_s": reading.other, "kernels_s": reading.kernels, "exposed_s": reading.exposed, "transfers_s": reading.transfers},
        "tokens_per_s_per_chip": (real + image) * rows / total_chips / reading.seconds,
        "lora_mfu": work.needed * share,
        "mfu_6n": work.trained * share,
        "hardware_utilization": reading.flops / reading.seconds / program.place.chip.peak,
        "compile_s": program.seconds,
    }
