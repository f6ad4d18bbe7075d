"""Named machines: how a model is spread over them, and which attention they run. Ours throughout; chosen by arithmetic, not measured.

    python -m launch.train --config=configs/stage3.py:v5e-64 ...

`fsdp` shares out every weight and every batch, and is all that a model of 7 billion parameters needs on these machines; `data` keeps
whole copies of the weights, `tensor` cuts heads and feed-forward layers. `rows` is what a device works on at once: a larger batch
goes through in several turns (config.num_micro).
"""

import dataclasses

import ml_collections


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices along each axis of the mesh, implementation of attention, rows per device at once."""

    data: int
    fsdp: int
    tensor: int
    attention: str
    rows: int


MACHINES = {
    "cpu-1": Machine(data=1, fsdp=1, tensor=1, attention="xla", rows=1),
    # Eight fake devices on one CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8.
    "cpu-8": Machine(data=2, fsdp=2, tensor=2, attention="xla", rows=1),
    # 16 GB of memory per chip.
    "v5e-8": Machine(data=1, fsdp=8, tensor=1, attention="xla", rows=2),
    "v5e-64": Machine(data=1, fsdp=64, tensor=1, attention="xla", rows=2),
    # A v5p is named by its cores: eight are four chips, which JAX shows as four devices of 95 GB.
    "v5p-8": Machine(data=1, fsdp=4, tensor=1, attention="xla", rows=16),
    # 32 GB per chip.
    "v6e-8": Machine(data=1, fsdp=8, tensor=1, attention="xla", rows=4),
    # Eight GPUs of 80 GB in one host; 16 rows each are the original's stage 3.
    "a100-8": Machine(data=1, fsdp=8, tensor=1, attention="cudnn", rows=16),
    "h100-8": Machine(data=1, fsdp=8, tensor=1, attention="cudnn", rows=16),
}


def on(machine: str, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The experiment set up for a machine; the global batch stays what it is.

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
    if config.batch_size % copies:
        raise ValueError(f"a batch of {config.batch_size} rows cannot be shared by {copies} devices of {machine}")
    config.mesh = {"data": data, "fsdp": found.fsdp, "tensor": found.tensor}
    config.num_micro = max(1, config.batch_size // (copies * found.rows))
    for part in ("vision", "text", "llm"):
        if part in config.model:
            config.model[part]["attention"] = found.attention
    return config
