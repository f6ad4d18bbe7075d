"""Named machines: how a model is spread over them, what fits, and how it is computed there. Ours throughout; chosen by ahead-of-time compiles.

    python -m launch.train --config=configs/stage3.py:v5e-64 ...

`fsdp` shares out every weight and every batch, and is all that a model of 7 billion parameters needs on these machines; `data` keeps
whole copies of the weights, `tensor` cuts heads and feed-forward layers. One table of logical axes (`rad_jax.sharding.RULES`) serves all
machines, because it only names the mesh axis that each kind of dimension goes along; a machine says how long the axes are, and one of
length 1 cuts nothing. `rows` is what a device works on at once: a larger batch
goes through in several turns (config.num_micro).
"""

import dataclasses
from collections.abc import Mapping

import ml_collections

# Options of the TPU compiler, each for a reason; the names are those of libtpu 0.0.42.
# Left alone, the compiler cuts a product with a gathered weight into a loop over its shards, to begin before all are there. Here a whole
# layer's weights arrive while the layer before is computed, and the loop's small products only cost time.
_WHOLE_GATHERS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
}
# The generator "rbg" of dropout masks: every chip draws the bits of its own rows, instead of those of all rows to keep its own.
_OWN_BITS = {"xla_tpu_spmd_rng_bit_generator_unsafe": "true"}
# Without these v4, v5p and v6e wait for every gather of weights; v5e overlaps them by default.
_OVERLAP = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


def _fast_memory(kib: int) -> dict[str, str]:
    """More of a core's fast memory for one fused operation than the default 16 MiB: larger tiles of the matrix products, fewer reads."""
    return {"xla_tpu_scoped_vmem_limit_kib": str(kib)}


V5E = {**_WHOLE_GATHERS, **_OWN_BITS, **_fast_memory(32 * 1024)}
V5P = {**_WHOLE_GATHERS, **_OWN_BITS, **_OVERLAP, **_fast_memory(64 * 1024)}
V4 = {**_WHOLE_GATHERS, **_OWN_BITS, **_OVERLAP}
V6E = {**_WHOLE_GATHERS, **_OWN_BITS, **_OVERLAP, **_fast_memory(64 * 1024)}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices along each axis of the mesh, and what they run.

    Attributes:
        attention, rope, flat_adapters: implementations (models.attention, models.llama, models.layers).
        rows: of a batch per device at once, in stages 2 and 3.
        remat: of the language model, what its backward pass keeps (models.layers).
        dropout_bits: what draws dropout masks (tasks.Generative).
        options: of the compiler.
    """

    data: int
    fsdp: int
    tensor: int
    rows: int
    attention: str = "xla"
    rope: str = "halves"
    flat_adapters: bool = True
    remat: str = "full"
    dropout_bits: str = "threefry2x32"
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _tpu(fsdp: int, rows: int, options: Mapping[str, str], data: int = 1) -> Machine:
    return Machine(data, fsdp, 1, rows, "splash", "matmul", False, "minimal", "rbg", options)


# Beside a machine: what launch.compile foretells of stage 3 on it, as far as it was asked. Seconds are estimates.
MACHINES = {
    "cpu-1": Machine(data=1, fsdp=1, tensor=1, rows=1),
    # Eight fake devices on one CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8.
    "cpu-8": Machine(data=2, fsdp=2, tensor=2, rows=1),
    # 16 GB of memory per chip.
    "v5e-8": _tpu(8, 1, V5E),  # 64 rows in 3.81 s, 7.6 GiB, LoRA-MFU 45 % of real tokens
    "v5e-16": _tpu(16, 2, V5E),  # 64 rows in 1.72 s, 11.4 GiB, 50 %
    # Weights shared out among half of the chips take 0.2 GiB more and 4 % less time than among all; among a quarter, an eighth, less is gained.
    "v5e-64": _tpu(32, 2, V5E, data=2),  # 128 rows in 0.86 s, 10.7 GiB, 50 %
    "v5e-256": _tpu(256, 2, V5E),  # 512 rows in 0.88 s, 11.9 GiB, 49 %
    # A v4 or v5p is named by its cores: eight are four chips, which JAX shows as four devices, of 95 GB (v5p) or 32 GB (v4).
    "v5p-8": _tpu(4, 4, V5P),  # 64 rows in 3.13 s, 25.2 GiB, 47 %
    "v5p-64": _tpu(32, 4, V5P),  # 64 rows in 0.39 s, 10.7 GiB, 47 %
    "v4-8": _tpu(4, 2, V4),  # 64 rows in 6.36 s, 15.1 GiB, 39 %
    "v4-32": _tpu(16, 2, V4),  # 64 rows in 1.48 s, 11.3 GiB, 42 %
    # 32 GB per chip.
    "v6e-8": _tpu(8, 4, V6E),  # 64 rows in 1.26 s (no calibration), 22.7 GiB
    "v6e-64": _tpu(64, 4, V6E),  # 128 rows in 0.36 s (no calibration), 10.5 GiB
    "v6e-256": _tpu(256, 2, V6E),
    # Eight GPUs of 80 GB in one host; 16 rows each are the original's stage 3.
    "a100-8": Machine(data=1, fsdp=8, tensor=1, rows=16, attention="cudnn"),
    "h100-8": Machine(data=1, fsdp=8, tensor=1, rows=16, attention="cudnn"),
}


# Of one row a device is done before the next layer's weights have arrived.
_LEAST_ROWS = 2


def on(machine: str, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The experiment set up for a machine.

    The global batch stays what it is, unless the machine has so many devices that each would get a single row: it grows to two each.
    `steps` and `num_micro` follow the batch and the mesh, those that are set afterwards too (--config.batch_size): as many rows of the
    corpus in all, and no more rows on a device at once than the machine takes. Set themselves, they stay.

    "v5e-256x4" is four slices of v5e-256: each holds a copy of what a slice holds, and only gradients cross between them (the
    outermost part of `data`, see `rad_jax.sharding.make_mesh`).

    Raises:
        ValueError: no such machine, or one whose devices do not share the batch evenly.
    """
    name, _, slices = machine.partition("x")
    if name not in MACHINES or (slices and not slices.isdecimal()):
        raise ValueError(f"machine {machine!r} is unknown; choose {', '.join(MACHINES)}")
    found = MACHINES[name]
    data = found.data * int(slices or 1)
    copies = data * found.fsdp
    rows = config.steps * config.batch_size  # of the whole stage
    config.batch_size = max(config.batch_size, copies * min(_LEAST_ROWS, found.rows))
    if config.batch_size % copies:
        raise ValueError(f"a batch of {config.batch_size} rows cannot be shared by {copies} devices of {machine}")
    config.mesh = {"data": data, "fsdp": found.fsdp, "tensor": found.tensor}
    # References, which follow what is set later; rounded up.
    batch = config.get_oneway_ref("batch_size")
    config.steps = -(-rows // batch)
    # A pair of stage 1 takes a small part of the memory that a row of the other stages takes.
    at_once = found.rows * (16 if config.task == "contrastive" else 1)
    copies = config.mesh.get_oneway_ref("data") * config.mesh.get_oneway_ref("fsdp")
    config.num_micro = -(-batch // (copies * at_once))
    config.compiler_options = dict(found.options)
    config.dropout_bits = found.dropout_bits
    with config.unlocked():  # a small experiment has none of these settings yet
        for part in ("vision", "text", "llm"):
            if part in config.model:
                config.model[part].attention = found.attention
        if "llm" in config.model:
            config.model.llm.update(rope=found.rope, flat_adapters=found.flat_adapters, remat=found.remat)
    return config
