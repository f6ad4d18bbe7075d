"""The files that torch.save wrote before torch 1.6, read without torch and without running code in them: what old checkpoints still are.

Such a file is a row of pickles: a magic number, a version, facts of the machine, what was saved, and the names of its storages; behind them
stand the storages in that order, each as a number of elements (8 bytes) and the elements. Where a storage stands is known only after
what was saved has been read, so that it is read twice: once for the sizes, once for the tensors.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop.torch_zip import STORAGES, Known, Storage, Unpickler, damaged, mapped

_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number 0x1950a86a20f9469cfc6c
_VERSION = 1001


def begins(path: Path) -> bool:
    """Whether the file begins as one of these."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read(path: Path) -> Any:
    """What was saved, as `torch_zip.read` gives it: tensors are read-only views of the file.

    Raises:
        UserError: the file is damaged, of another format, or holds something else.
    """
    data = mapped(path)
    try:
        with open(path, "rb") as file:
            return _read(path, file, data)
    except UserError:
        raise
    except Exception as error:  # damaged files fail in any way they like, deep in pickle or struct
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def _read(path: Path, file: BinaryIO, data: np.ndarray) -> Any:
    def plain() -> Any:
        return _Sizes(file, path).load()

    plain()  # the magic number
    version, machine = plain(), plain()
    if version != _VERSION or not machine["little_endian"]:
        raise UserError(f"{path} was written on a big-endian machine or by an unknown torch: save it again with torch.")
    begin = file.tell()
    sizes = _Sizes(file, path)
    sizes.load()
    storages: dict[str, np.ndarray] = {}
    keys, at = plain(), file.tell()
    for key in keys:
        kind, count = sizes.found[key]
        (stored,) = struct.unpack("<q", data[at : at + 8].tobytes())
        stop = at + 8 + count * STORAGES[kind].itemsize
        if stored != count or count < 0 or stop > len(data):
            raise damaged(path, f"the storage {key!r} has {stored} numbers instead of {count}, or ends after the file")
        storages[key] = data[at + 8 : stop]
        at = stop
    file.seek(begin)
    return _Tensors(file, path, storages).load()


class _Sizes(Unpickler):
    """Notes the kind and size of every storage, and makes no tensor."""

    def __init__(self, program: BinaryIO, path: Path) -> None:
        super().__init__(program, path, np.zeros(0, np.uint8), {})
        self.found: dict[str, tuple[str, int]] = {}
        self.known["torch._utils._rebuild_tensor_v2"] = Known(lambda *_: None)

    def persistent_load(self, reference: Any) -> Any:
        kind, name, key, _, count, view = reference
        if kind != "storage" or view is not None or name not in STORAGES or type(count) is not int:
            raise damaged(self.path, f"an unknown reference, {kind!r}")
        if self.found.setdefault(key, (name, count)) != (name, count):
            raise damaged(self.path, f"the storage {key!r} has two sizes")
        return None


class _Tensors(Unpickler):
    """Makes the tensors, of storages whose place is known."""

    def __init__(self, program: BinaryIO, path: Path, parts: dict[str, np.ndarray]) -> None:
        super().__init__(program, path, np.zeros(0, np.uint8), {})
        self.parts = parts

    def persistent_load(self, reference: Any) -> Storage:
        _, name, key, *_ = reference
        return Storage(self.parts[key], STORAGES[name])
