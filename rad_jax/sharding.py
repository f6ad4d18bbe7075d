"""Where arrays live: the device mesh, the table from logical axis names to mesh axes, and placement of variables and batches."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rad_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# A logical axis that is not named here is replicated.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of data x fsdp x tensor devices; axes are `Auto`, as linen's logical constraints need.

    Raises:
        UserError: the product is not the number of devices.
    """
    shape = (data, fsdp, tensor)
    found = jax.device_count()
    if np.prod(shape) != found:
        raise UserError(
            f"the mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {np.prod(shape)} devices but {found} "
            f"{jax.default_backend()} devices are here: set --config.mesh.data/fsdp/tensor to their number."
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def variable_shardings(boxed: Any, mesh: Mesh) -> Any:
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


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows [B / processes, ...] as part of the global batch [B, ...]."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def _size(mesh: Mesh, axes: Any) -> int:
    if axes is None:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[name] for name in names]))
