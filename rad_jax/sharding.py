"""Where arrays live: the device mesh, the table from logical axis names to mesh axes, and placement of variables and batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rad_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# A logical axis that is not named here is replicated.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("rank", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x fsdp x tensor devices; axes are `Auto`, as linen's logical constraints need.

    Several TPU slices are the outermost part of `data`: only gradients cross the network between them, fsdp and tensor stay inside one.

    Args:
        data, fsdp, tensor: size of each axis.
        devices: to use instead of those of this job; of a topology that is compiled for, say.

    Raises:
        UserError: the product is not the number of devices, or `data` is no multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, tensor)
    if np.prod(shape) != len(devices):
        raise UserError(
            f"the mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {np.prod(shape)} devices but {len(devices)} "
            f"{devices[0].platform} devices are here: set --config.mesh.data/fsdp/tensor to their number."
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(
            f"the mesh has data={data} but these devices are {slices} slices: set --config.mesh.data to a multiple of {slices}."
        )
    inside = (data // slices, fsdp, tensor)
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        outside = (slices, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(rows: int, devices: int, num_micro: int) -> None:
    """Whether so many devices along data and fsdp can share a batch, and each of its turns.

    Raises:
        UserError: they cannot.
    """
    share = devices * num_micro
    if rows % share:
        raise UserError(
            f"{rows} rows cannot be shared by {devices} devices in {num_micro} turns: set --config.batch_size to a multiple of {share}."
        )


def variable_shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings for a tree of (abstract) variables with logical axis names, in the tree of the unboxed variables.

    A dimension that its mesh axes do not divide stays whole (4 key heads on tensor=8, say).
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)

    def placed(leaf: Any, spec: PartitionSpec) -> NamedSharding:
        names = tuple(spec) + (None,) * (leaf.ndim - len(spec))
        kept = (axes if leaf.shape[i] % _size(mesh, axes) == 0 else None for i, axes in enumerate(names))
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree.map(placed, nn.unbox(boxed), specs)


def place(array: Any, dtype: Any, sharding: NamedSharding) -> jax.Array:
    """A numpy or lazy array on the mesh in `dtype`; each device's shard is read by itself."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index], dtype))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of the batch this process reads, and of how many. Processes whose devices hold the same rows read the same part.

    Raises:
        UserError: two processes hold some rows in common and some not.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    if sum(map(len, parts)) != len(rows):
        raise UserError(
            f"tensor={mesh.shape['tensor']} cuts across processes in a way that lets no process read whole rows: "
            "set --config.mesh.tensor to a divisor, or a multiple, of the devices of a process."
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of the rows, [B / shares, ...], as part of the global batch [B, ...]."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def place_whole(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch [B, ...] that every process has whole, spread over the mesh in its order."""
    sharding = batch_sharding(mesh)
    return {name: place(rows, rows.dtype, sharding) for name, rows in batch.items()}


def gather(tree: Any) -> Any:
    """Arrays on the mesh as whole numpy arrays, in every process."""
    return multihost_utils.process_allgather(tree, tiled=True)


def _size(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    if axes is None:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[name] for name in names]))
