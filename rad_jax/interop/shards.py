"""safetensors files, written tensor by tensor: what is held in memory is one tensor, not a model."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop.tables import Shape

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": "F32", "float16": "F16"}
INDEX = "model.safetensors.index.json"


def write(
    folder: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterator[tuple[str, np.ndarray]],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Writes `model-00001-of-0000N.safetensors` and their index.

    Args:
        folder: exists.
        shapes: of all tensors by name, in the order of `tensors`.
        tensors: names and values; each is cast to `dtype`.
        dtype: a key of `DTYPES`.
        shard_bytes: largest size of a file, unless a single tensor is larger.

    Returns:
        sha256 of each file, by its name.

    Raises:
        UserError: a value is not finite, or too large for `dtype`.
    """
    itemsize = np.dtype(dtype).itemsize
    groups = _grouped(shapes, itemsize, shard_bytes)
    hashes, weight_map = {}, {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        hashes[file] = _write_file(folder / file, {name: shapes[name] for name in names}, tensors, dtype)
        weight_map.update(dict.fromkeys(names, file))
    total = itemsize * sum(math.prod(shape) for shape in shapes.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    (folder / INDEX).write_text(index, encoding="utf-8")
    hashes[INDEX] = hashlib.sha256(index.encode()).hexdigest()
    return hashes


def _grouped(shapes: Mapping[str, Shape], itemsize: int, shard_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = itemsize * math.prod(shape)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write_file(path: Path, shapes: Mapping[str, Shape], tensors: Iterator[tuple[str, np.ndarray]], dtype: str) -> str:
    """The format: length of the header (8 bytes), a JSON header, the tensors one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for name, shape in shapes.items():
            found, tensor = next(tensors)
            assert (found, tensor.shape) == (name, shape), f"{found} {tensor.shape} came in the place of {name} {shape}"
            data = _cast(name, tensor, dtype).data
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.asarray(tensor, dtype=dtype, order="C")
    if not np.isfinite(cast).all():
        raise UserError(f"the tensor {name} has values that are not finite in {dtype}: export with --dtype=float32.")
    return cast
