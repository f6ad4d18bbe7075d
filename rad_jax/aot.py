"""Ahead-of-time compilation: the real step of a real config for TPUs that are not here, by the compiler that a pod would use.

No weight is read: arguments are shapes, dtypes and places. The compiler (libtpu) tells what memory a chip needs, which collectives it has
put in, and a schedule with an estimate of every operation's cycles, from which `schedule` predicts a step's time.
"""

import dataclasses
import importlib.util
import os
import pickle
import re
import resource
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rad_jax import chips, contrastive, flops, generate, optim, schedule, sharding, tasks, train
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
    """A compiled program.

    Attributes:
        config: the experiment.
        place, slices: what it was compiled for. mesh: over all of their chips.
        arguments: abstract; of a train step the state, the frozen variables and the batch.
        rows: of the global batch. new_tokens: that generation may write, 0 for a train step.
        executable: JAX's. text: the scheduled program.
        seconds: that tracing and compiling took.
    """

    config: Any
    place: chips.Slice
    slices: int
    mesh: Mesh
    arguments: tuple[Any, ...]
    rows: int
    new_tokens: int
    executable: Any
    text: str
    seconds: float

    @property
    def chips(self) -> int:
        return self.place.chips * self.slices

    @property
    def memory(self) -> dict[str, int]:
        """Bytes per chip. `peak` is what counts: the others share memory where one is used up before the next is there."""
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
    """The train step of an experiment, as `train.run` compiles it.

    Raises:
        DoesNotFit: a chip has too little memory.
        UserError: the mesh is not that of the slices or does not divide heads, or libtpu is missing.
    """
    check_heads(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices(place, slices))
    task, optimizer = tasks.make_task(config), optim.optimizer(config.optimizer, config.steps)
    state, frozen = train.abstract(config, task, optimizer, mesh)
    arguments = (state, frozen, abstract_batch(config, mesh))
    step = train.jitted_step(config, task, optimizer, state)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        start = time.perf_counter()
        executable = _compiled(step.lower(*arguments))
    seconds = time.perf_counter() - start
    return Program(
        config, place, slices, mesh, arguments, config.batch_size, 0, executable, executable.as_text(), seconds
    )


def compile_generation(config: Any, place: chips.Slice, slices: int, rows: int, max_new_tokens: int) -> Program:
    """Prefill of `rows` prompts of up to `config.data.text_length` tokens, and greedy decoding of up to `max_new_tokens` more.

    As `launch.generate` does it with --attention as in the config, and no 8-bit weights.

    Raises:
        DoesNotFit, UserError: as `compile_training`; or the rows cannot be shared, or the config has no language model.
    """
    if "llm" not in config.model:
        raise UserError("--generate_rows needs a config that can write: that of stage 2 or 3.")
    share = config.mesh.data * config.mesh.fsdp
    if rows % share:
        raise UserError(
            f"--generate_rows={rows} cannot be shared by {share} devices along data and fsdp: give a multiple of {share}, or --config.mesh."
        )
    check_heads(config, generates=True)
    mesh = sharding.make_mesh(**config.mesh, devices=devices(place, slices))
    config = config.copy_and_resolve_references()
    if config.frozen_dtype == "int8":
        config.frozen_dtype = "bfloat16"
    task = tasks.make_task(config)
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    variables = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.frozen_dtype), sharding=where),
        nn.unbox(boxed),
        sharding.variable_shardings(boxed, mesh),
    )
    batch = {
        name: x
        for name, x in abstract_batch(config, mesh, rows).items()
        if name in ("tokens", "length", "image", "index")
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        start = time.perf_counter()
        lowered = generate.generate.lower(task.model, variables, batch, key, max_new_tokens=max_new_tokens, eos_id=2)
        executable = _compiled(lowered)
    seconds = time.perf_counter() - start
    text = executable.as_text()
    return Program(config, place, slices, mesh, (variables, batch), rows, max_new_tokens, executable, text, seconds)


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


def _compiled(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error) from error


def _explained(error: Exception) -> Exception:
    """The compiler's out-of-memory error as ours; others as they are."""
    if found := re.search(r"([\d.]+)([GMK]?)\) exceeds available HBM \(([\d.]+)([GMK]?)", str(error)):
        unit = {"G": 2**30, "M": 2**20, "K": 2**10, "": 1}
        return DoesNotFit(float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]])
    return error


def check_heads(config: Any, generates: bool = False) -> None:
    """Whether the mesh divides the attention heads where it must: for kernels that are run per device, and for the cache of generation.

    Raises:
        UserError: it does not.
    """
    tensor = config.mesh.tensor
    for name in ("vision", "text", "llm"):
        part = config.model.get(name, {})
        if part.get("attention", "xla") == "xla" and not (generates and name == "llm"):
            continue
        heads = part.get("kv_heads") or part["heads"]
        if heads % tensor:
            raise UserError(f"--config.mesh.tensor={tensor} does not divide the {heads} heads of config.model.{name}.")


def generation_advice(config: Any, rows: int, new_tokens: int) -> str:
    """What makes generation of so many rows at once smaller, the cheapest first."""
    data, fsdp, tensor = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    knobs, share = [], data * fsdp
    if rows >= 2 * share:
        knobs.append(f"fewer images at once (--generate_rows={rows // 2 // share * share})")
    heads = [part.get("kv_heads") or part["heads"] for part in (config.model.llm, config.model.get("vision")) if part]
    if share % 2 == 0 and all(n % (2 * tensor) == 0 for n in heads):
        data, fsdp = (data // 2, fsdp) if data % 2 == 0 else (data, fsdp // 2)
        sizes = f"--config.mesh.data={data} --config.mesh.fsdp={fsdp} --config.mesh.tensor={2 * tensor}"
        knobs.append(f"each copy's heads and cache on more chips ({sizes})")
    if new_tokens > 1:
        knobs.append(f"shorter texts (--max_new_tokens={new_tokens // 2})")
    return "What helps: " + "; ".join([*knobs, "a larger slice (--topology)"]) + "."


def advice(config: Any) -> str:
    """What makes a train step smaller, the cheapest first."""
    knobs = []
    model = config.model
    part = model.llm if "llm" in model else model.vision
    name = "llm" if "llm" in model else "vision"
    rows = config.batch_size // (config.num_micro * config.mesh.data * config.mesh.fsdp)
    if part.get("remat", "none") != "full":
        knobs.append(f"keep less for the backward pass (--config.model.{name}.remat=full)")
    if rows > 1:
        knobs.append(f"more turns with fewer rows (--config.num_micro={config.num_micro * rows // max(1, rows // 2)})")
    if config.mesh.data > 1:
        sizes = f"--config.mesh.data=1 --config.mesh.fsdp={config.mesh.data * config.mesh.fsdp}"
        knobs.append(f"share the weights among all chips ({sizes})")
    if config.frozen_dtype != "int8" and "llm" in model:
        knobs.append("hold the frozen layers in 8 bits (--config.frozen_dtype=int8)")
    return "What helps: " + "; ".join([*knobs, "a larger slice (--topology)"]) + "."


def save(program: Program, file: Path) -> None:
    """The executable, for the same jax and libtpu on the topology it was compiled for."""
    from jax.experimental.serialize_executable import serialize

    file.write_bytes(pickle.dumps(serialize(program.executable)))


# ----------------------------------------------------------------------------------------------------------------------- the report


def report(program: Program, text_tokens: float | None = None) -> dict[str, Any]:
    """What a program takes and how fast it should be, as JSON can hold it; FLOPs, bytes and rates are per chip unless named otherwise.

    Args:
        program: a train step or generation.
        text_tokens: real text tokens of a row on average; without it what the config says, else all of them.

    Returns:
        `lora_mfu` counts what real tokens need, `lora_mfu_full_rows` what they would need if texts filled their rows.
        `activation_bytes_per_image`, of stage 1, is what the image tower keeps of one image for its backward pass.
    """
    config, place = program.config, program.place
    reading = schedule.read(program.text, schedule.network_of(program))
    model = tasks.model_config(config)
    parts, lengths = _work(program, model, text_tokens)
    work = flops.total(parts)
    full = flops.total(_work(program, model, config.data.text_length)[0])
    rows = program.rows / program.chips / reading.seconds  # per second and chip
    memory = program.memory
    tokens = lengths.text + model.image_tokens + program.new_tokens
    found = {
        "topology": place.name,
        "slices": program.slices,
        "chips": program.chips,
        "mesh": dict(program.mesh.shape),
        "sequence_length": lengths.padded_text + model.image_tokens,
        "real_tokens": tokens,
        "global_batch": program.rows,
        "num_micro": 1 if program.new_tokens else config.num_micro,
        "remat": (config.model.get("llm") or config.model.vision).get("remat", "none"),
        "frozen_dtype": config.frozen_dtype,
        **_parameters(program),
        "peak_hbm_bytes": memory["peak"],
        "hbm_bytes": place.chip.hbm,
        "memory": memory,
        "flops_formula": work.executed * program.rows / program.chips,
        "flops_compiled": reading.flops,
        "flops_needed": work.needed * program.rows / program.chips,
        "parts": {name: dataclasses.asdict(part) for name, part in parts.items()},
        "collectives": _collectives(reading),
        "method": "cycles of the scheduled program (rad_jax/schedule.py); an estimate, not a measurement",
        "predicted_step_s": reading.seconds,
        "schedule": {
            "matmul_s": reading.matmul,
            "other_s": reading.other,
            "kernels_s": reading.kernels,
            "exposed_s": reading.exposed,
            "transfers_s": reading.transfers,
            "unknown_kernels": sorted(reading.unknown),
        },
        "tokens_per_s_per_chip": tokens * rows,
        "lora_mfu": work.needed * rows / place.chip.peak,
        "lora_mfu_full_rows": full.needed * rows / place.chip.peak,
        "mfu_6n": work.trained * rows / place.chip.peak,
        "hardware_utilization": reading.flops / reading.seconds / place.chip.peak,
        "compile_s": program.seconds,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if program.new_tokens:
        return found | {"new_tokens": program.new_tokens, "images_per_s_per_chip": rows}
    if config.task == "contrastive":
        kept = contrastive.activation_bytes(tasks.make_task(config).model, config.data.text_length)
        found["activation_bytes_per_image"] = kept["image"]
    hours = config.steps * reading.seconds / 3600
    return found | {"steps": config.steps, "stage_hours": hours, "chip_hours": hours * program.chips}


def _work(program: Program, model: Any, text_tokens: float | None) -> tuple[dict[str, flops.Count], flops.Lengths]:
    data = program.config.data
    text = min(data.text_length, text_tokens or data.get("mean_text_length") or data.text_length)
    lengths = flops.Lengths(text, min(data.target_length, text), data.text_length, data.target_length)
    if program.new_tokens:
        return flops.writing(model, lengths, program.new_tokens), lengths
    config = program.config
    return flops.training(model, config.trainable, lengths, program.rows, config.num_micro), lengths


def _parameters(program: Program) -> dict[str, Any]:
    """Their number, and of a train step what a checkpoint writes: trainables and optimizer."""

    def size(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    if program.new_tokens:
        return {"frozen_params": size(program.arguments[0]), "trainable_params": 0}
    state, frozen, _ = program.arguments
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    return {
        "frozen_params": size(frozen.get("params", {})),
        "trainable_params": size(state.trainable),
        "optimizer_params": size(state.opt_state),
        "checkpoint_bytes": stored,
        "checkpoint_s_at_1_gb_per_s": stored / 1e9,
    }


def _collectives(reading: schedule.Reading) -> list[dict[str, Any]]:
    """By kind and the mesh axes they go along: bytes and seconds on one chip, hidden ones too, and how many."""
    kinds = sorted({key[:2] for key in reading.collectives})
    return [
        {"kind": kind, "axes": axes}
        | {what: reading.collectives[kind, axes, what] for what in ("number", "bytes", "seconds")}
        for kind, axes in kinds
    ]
