"""The files that torch.save writes (`.bin`, `.pt`, `.pth`), read and written without torch.

Such a file is a zip that nothing is compressed in: `NAME/data.pkl` is a pickle of what was saved, in which every tensor refers to
a storage `NAME/data/0`, `NAME/data/1`, ... A pickle can ask for any function of any module. The reader here knows a handful of names,
gives its own functions for them, and refuses the file at any other.
"""

import dataclasses
import hashlib
import io
import math
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop import shards
from rad_jax.interop.tables import Shape
from rad_jax.lazy import contiguous

STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
DTYPES = {dtype.name: storage for storage, dtype in STORAGES.items()}
ALIGNMENT = 64  # of tensors in the file, as torch has it
ZIP64_BYTES = 2**30  # members above this have 8-byte sizes; the format needs it from 4 GiB, zipfile wants it from 2 GiB


def read(path: Path) -> Any:
    """What was saved: dicts, lists, numbers, text and tensors, the latter as read-only views of the file.

    No tensor is read before it is used. Only numbers, text, containers and dense tensors are known; no code in the file is run.

    Raises:
        UserError: the file is damaged, of another format, or holds something else.
    """
    data = mapped(path)
    if data[:2].tobytes() != b"PK":
        raise UserError(
            f"{path} is no file that torch.save writes: if torch can load it, save it again with torch.save or as safetensors, else "
            "download it again."
        )
    try:
        return _read(path, data)
    except UserError:
        raise
    except Exception as error:  # damaged files fail in any way they like, deep in zipfile or pickle
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def _read(path: Path, data: np.ndarray) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        programs = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(programs) != 1:
            raise UserError(f"{path} is a zip file but none that torch.save wrote: give a file of weights.")
        root = programs[0].removesuffix("data.pkl")
        _locate(path, data, members[programs[0]])  # a compressed one is refused here: it could swell
        program = archive.read(programs[0])
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
    if order != b"little":
        raise UserError(f"{path} was written on a big-endian machine: convert it to safetensors there.")
    folder = f"{root}data/"
    storages = {name.removeprefix(folder): member for name, member in members.items() if name.startswith(folder)}
    return Unpickler(io.BytesIO(program), path, data, storages).load()


def mapped(path: Path) -> np.ndarray:
    """The file's bytes, mapped and not read.

    Raises:
        UserError: there is no such file, it is empty, or it is what a download left in place of the weights.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(256)
            if not start:
                raise UserError(f"{path} is empty: download it again.")
            if start.startswith(b"version https://git-lfs"):
                raise UserError(
                    f"{path} is a git-lfs pointer and not the file itself: run `git lfs pull` in its repository."
                )
            if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise UserError(f"{path} is a web page, perhaps one that asks to log in: download the file itself.")
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: check the path.") from error


def damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is truncated or damaged ({reason}): download it again.")


def _locate(path: Path, data: np.ndarray, member: zipfile.ZipInfo) -> slice:
    """Where a member's bytes are. Its local header (30 bytes, name, extra) may have another length than its entry at the end says."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise UserError(
            f"{path} is compressed or encrypted ({member.filename}): load it with torch and save it again with torch.save."
        )
    header = data[member.header_offset : member.header_offset + 30].tobytes()
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise damaged(path, f"{member.filename} is not where the list of contents says")
    start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + member.file_size > len(data):
        raise damaged(path, f"{member.filename} ends after the file")
    return slice(start, start + member.file_size)


@dataclasses.dataclass(frozen=True)
class Storage:
    """One-dimensional memory that tensors are views of."""

    data: np.ndarray
    dtype: np.dtype


class _StateDict(dict):
    """In place of OrderedDict; torch hangs `_metadata` on state dicts, which nobody here reads."""

    def __setstate__(self, state: object) -> None:
        pass


class _ScalarType:
    """In place of numpy.dtype, whose `__setstate__` is not made for hostile input."""

    def __init__(self, code: str, *flags: object) -> None:
        if not re.fullmatch(r"[biuf][1248]", code):
            raise ValueError(f"numpy scalar of type {code}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


class Known:
    """A function that a pickle may call and not change: it could set attributes of a plain one, for the next file to meet."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function is given a state")


class Unpickler(pickle.Unpickler):
    """Knows a few names and has functions of its own for them; `program` is a pickle."""

    def __init__(
        self, program: BinaryIO, path: Path, data: np.ndarray, storages: Mapping[str, zipfile.ZipInfo]
    ) -> None:
        super().__init__(program)
        self.path, self.data, self.storages = path, data, storages
        self.known: dict[str, Any] = {
            "torch._utils._rebuild_tensor_v2": Known(self.tensor),
            "torch._utils._rebuild_parameter": Known(self.parameter),
            "torch.Size": Known(self.size),
            "torch.device": Known(self.device),
            "collections.OrderedDict": Known(self.state_dict),
            "numpy.dtype": Known(self.scalar_type),
            "numpy.core.multiarray.scalar": Known(self.scalar),
            "numpy._core.multiarray.scalar": Known(self.scalar),
            "_codecs.encode": Known(self.encode),
            # Types are passed around and never called: their names do.
            **{f"torch.{name}": name for name in (*STORAGES, *DTYPES)},
        }

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in self.known:
            raise UserError(
                f"{self.path} was refused: it asks for {wanted}, which is no plain tensor or value; code in a file of weights is "
                "never run; save the state_dict alone with torch.save, or convert it to safetensors, if you trust the file."
            )
        return self.known[wanted]

    def persistent_load(self, reference: Any) -> Storage:
        kind, name, key, _device, count = reference
        if kind != "storage" or key not in self.storages:
            raise damaged(self.path, f"the storage {key!r} is missing")
        found = self.data[_locate(self.path, self.data, self.storages[key])]
        if count * STORAGES[name].itemsize != len(found):
            raise damaged(self.path, f"the storage {key!r} has {len(found)} bytes for {count} numbers of a {name}")
        return Storage(found, STORAGES[name])

    def tensor(
        self,
        storage: Storage,
        offset: int,
        shape: Shape,
        strides: tuple[int, ...],
        _requires_grad: bool,
        _hooks: object,
        metadata: object = None,
    ) -> np.ndarray:
        """A view; `offset` and `strides` count numbers, not bytes."""
        if metadata:  # a minus sign or a conjugation that torch puts off
            raise UserError(
                f"{self.path} has a tensor with metadata {metadata!r}: call resolve_neg() before torch.save."
            )
        dtype, numbers = storage.dtype, (offset, *shape, *strides)
        if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
            raise damaged(self.path, f"a tensor of shape {shape} has offset {offset} and strides {strides}")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 in shape:
            return np.ndarray(shape, dtype, storage.data[:0])
        if (last + 1) * dtype.itemsize > len(storage.data):
            raise damaged(self.path, f"a tensor of shape {shape} reaches out of its storage")
        steps = [stride * dtype.itemsize for stride in strides]
        return np.ndarray(shape, dtype, storage.data, offset * dtype.itemsize, steps)

    def parameter(self, tensor: np.ndarray, _requires_grad: bool, _hooks: object) -> np.ndarray:
        return tensor

    def size(self, shape: Shape) -> Shape:
        return shape

    def device(self, *name: object) -> str:
        return ":".join(map(str, name))

    def state_dict(self, *items: Any) -> _StateDict:
        return _StateDict(*items)

    def scalar_type(self, *arguments: Any) -> _ScalarType:
        return _ScalarType(*arguments)

    def scalar(self, dtype: _ScalarType, data: bytes) -> Any:
        return np.frombuffer(data, dtype.order + dtype.code, 1)[0].item()

    def encode(self, text: str, encoding: str) -> bytes:
        """How bytes are written in the pickle protocol that torch uses."""
        if encoding != "latin1":
            raise ValueError(f"bytes in the encoding {encoding}")
        return text.encode(encoding)


def write(
    path: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterator[tuple[str, np.ndarray]],
    dtypes: Mapping[str, str],
    under: str | None = None,
) -> str:
    """Writes a file that `torch.load(path, weights_only=True)` gives back as a dict of tensors; holds one tensor at a time.

    Args:
        path: of the file.
        shapes: of all tensors by name, in the order of `tensors`.
        tensors: names and values; each is cast to its dtype.
        dtypes: keys of `DTYPES` by tensor name.
        under: puts the dict into another one, under this key.

    Returns:
        sha256 of the file.

    Raises:
        UserError: a value is not finite, or too large for the dtype it is cast to.
    """
    with zipfile.ZipFile(path, "w") as archive:
        _add(archive, "data.pkl", _program(shapes, dtypes, under))
        _add(archive, "byteorder", b"little")
        for number, (name, shape) in enumerate(shapes.items()):
            _add(archive, f"data/{number}", _bytes(next(tensors), name, shape, dtypes[name]))
        _add(archive, "version", b"3\n")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Adds a member whose bytes start at a multiple of `ALIGNMENT`; the padding is an extra field, as torch does it."""
    member = zipfile.ZipInfo(f"archive/{name}")  # dated 1980: the same weights give the same file
    zip64 = len(data) > ZIP64_BYTES
    assert archive.fp is not None
    unpadded = archive.fp.tell() + 30 + len(member.filename) + (20 if zip64 else 0) + 4
    padding = -unpadded % ALIGNMENT
    member.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    member.file_size = len(data)
    with archive.open(member, "w", force_zip64=zip64) as file:
        file.write(data)


def _program(shapes: Mapping[str, Shape], dtypes: Mapping[str, str], under: str | None) -> bytes:
    """The pickle. Opcodes are written one by one because a pickler would import torch to look up its names."""

    def plain(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]  # without the protocol in front and the stop behind

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def called(function: bytes, *arguments: bytes) -> bytes:
        return function + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE

    new_dict = called(named("collections", "OrderedDict"))
    items = []
    for number, (name, shape) in enumerate(shapes.items()):
        kind = named("torch", DTYPES[dtypes[name]])
        reference = [plain("storage"), kind, plain(str(number)), plain("cpu"), plain(math.prod(shape))]
        storage = pickle.MARK + b"".join(reference) + pickle.TUPLE + pickle.BINPERSID
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tensor = called(
            named("torch._utils", "_rebuild_tensor_v2"),
            storage,
            plain(0),
            plain(shape),
            plain(strides),
            pickle.NEWFALSE,
            new_dict,
        )
        items += [plain(name), tensor]
    whole = new_dict + pickle.MARK + b"".join(items) + pickle.SETITEMS
    if under is not None:
        whole = pickle.EMPTY_DICT + plain(under) + whole + pickle.SETITEM
    return pickle.PROTO + b"\2" + whole + pickle.STOP


def _bytes(named: tuple[str, np.ndarray], name: str, shape: Shape, dtype: str) -> memoryview:
    found, tensor = named
    assert (found, tensor.shape) == (name, shape), f"{found} {tensor.shape} came in the place of {name} {shape}"
    cast = shards.cast(name, tensor, np.dtype(dtype))
    return contiguous(cast).reshape(-1).view(np.uint8).data
