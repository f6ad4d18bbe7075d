"""safetensors files, written tensor by tensor: what is held in memory is one tensor, not a model."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop.tables import Shape
from rad_jax.lazy import contiguous

SHARD_BYTES = 5 * 10**9  # largest size of a file, unless a single tensor is larger
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}  # by numpy's (and ml_dtypes') names

Plan = Mapping[str, tuple[Shape, np.dtype]]
TARGETS = ("float16", "float32", "keep")  # what an export may ask for


def write(
    folder: Path,
    plan: Plan,
    tensors: Iterator[tuple[str, np.ndarray]],
    stem: str = "model",
    progress: Callable[[int], object] = lambda size: None,
) -> dict[str, str]:
    """Writes `STEM-00001-of-0000N.safetensors` and their index, or one `STEM.safetensors` where that is enough.

    Args:
        folder: exists.
        plan: shape and dtype of all tensors by name, in the order of `tensors`; each is cast to its dtype.
        stem: of the files' names.
        progress: called with the bytes of each tensor once it is written.

    Returns:
        sha256 of each file, by its name.

    Raises:
        UserError: a value is not finite, or too large for the dtype it is cast to.
    """
    groups = _grouped(plan, SHARD_BYTES)
    hashes, weight_map = {}, {}
    for number, names in enumerate(groups, start=1):
        file = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else f"{stem}.safetensors"
        hashes[file] = _write_file(folder / file, {name: plan[name] for name in names}, tensors, progress)
        weight_map.update(dict.fromkeys(names, file))
    if len(groups) > 1:
        index = {"metadata": {"total_size": total_bytes(plan)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
        hashes[f"{stem}.safetensors.index.json"] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def in_dtype(plan: Plan, dtype: str) -> Plan:
    """The same tensors with those of floating point in another dtype; "keep" leaves all as they are."""
    if dtype == "keep":
        return plan
    floats = ("float64", "float32", "float16", "bfloat16")
    return {n: (shape, np.dtype(dtype) if kind.name in floats else kind) for n, (shape, kind) in plan.items()}


def total_bytes(plan: Plan) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in plan.values())


def _grouped(plan: Plan, shard_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in plan.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write_file(
    path: Path, plan: Plan, tensors: Iterator[tuple[str, np.ndarray]], progress: Callable[[int], object]
) -> str:
    """The format: length of the header (8 bytes), a JSON header, the tensors one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in plan.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for name, (shape, dtype) in plan.items():
            data = _bytes(next(tensors), name, shape, dtype)
            digest.update(data)
            file.write(data)
            progress(len(data))
            del data  # before the next one is made
    return digest.hexdigest()


def _bytes(found: tuple[str, np.ndarray], name: str, shape: Shape, dtype: np.dtype) -> memoryview:
    assert (found[0], found[1].shape) == (name, shape), (
        f"{found[0]} {found[1].shape} came in the place of {name} {shape}"
    )
    return contiguous(cast(name, found[1], dtype)).reshape(-1).view(np.uint8).data


def cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tensor in another dtype.

    Raises:
        UserError: a value is not finite in it. What keeps its dtype is not looked at.
    """
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        tensor = tensor.astype(dtype)
    if not np.isfinite(tensor).all():
        raise UserError(f"the tensor {name} has values that are not finite in {dtype}: export with --dtype=float32.")
    return tensor
