"""Foreign weights on disk, in whatever they come: safetensors or torch files, one or several with an index.

Opening reads names, shapes and dtypes. Tensors are views of the mapped files: what is not used is never read.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop import shards, torch_legacy, torch_zip
from rad_jax.interop.tables import Shape, listed

INDEX = ".index.json"
NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
TORCH = (".bin", ".pt", ".pth", ".th")
NESTED = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the weights
UNFINISHED = ("*.incomplete", "*.part", ".cache/huggingface/download/*.incomplete")
DTYPES = {code: np.dtype(name) for name, code in shards.DTYPES.items()}


class Source(Mapping[str, np.ndarray]):
    """Foreign tensors by name, memory-mapped and read-only.

    Attributes:
        path: what was opened.
        files: weight files, and the index if there is one, that the tensors came from.
    """

    def __init__(self, path: Path, files: Sequence[Path], tensors: Mapping[str, np.ndarray]) -> None:
        self.path, self.files, self._tensors = path, tuple(files), dict(tensors)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> Shape:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].dtype

    def renamed(self, rename: Callable[[str], str | None]) -> "Source":
        """The same tensors under other names.

        Args:
            rename: the new name by the old one; None drops the tensor.

        Raises:
            UserError: two tensors get one name.
        """
        origins: dict[str, str] = {}
        for old in self:
            new = rename(old)
            if new is None:
                continue
            if new in origins:
                raise UserError(f"{self.path}: {origins[new]} and {old} both stand for {new}: remove one of them.")
            origins[new] = old
        return Source(self.path, self.files, {new: self[old] for new, old in origins.items()})


def open_source(path: Path, names: Sequence[str] = ()) -> Source:
    """Opens weights without reading them.

    Args:
        path: a `.safetensors`, `.bin`, `.pt` or `.pth` file, an index of several, or a folder with one of these.
        names: files to look for in a folder, the best one first; without them `NAMES`, then the only safetensors file.

    Raises:
        UserError: there are no weights, or they are damaged, incomplete or of another format.
    """
    if not path.is_dir():
        return _open_file(path, path)
    for name in names or NAMES:
        if (path / name).is_file():
            return _open_file(path, path / name)
    others = [] if names else sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return _open_file(path, others[0])
    if others:
        raise UserError(
            f"{path} has {len(others)} safetensors files and no {NAMES[0]}: name one of them, or add the index."
        )
    raise UserError(
        f"{path} has no weights: there should be {' or '.join(names or NAMES)}; check the path{_unfinished(path)}."
    )


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: the file is missing, is not JSON or holds something else.
    """
    try:
        content = json.loads(torch_zip.mapped(path).tobytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__} instead of an object: give another file.")
    return content


def _open_file(path: Path, file: Path) -> Source:
    if file.name.endswith(INDEX):
        return _open_index(path, file)
    return Source(path, [file], _tensors(file))


def _tensors(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in TORCH:
        return _read_torch(file)
    raise UserError(
        f"{file}: weights are read from .safetensors, {', '.join(TORCH)} or *{INDEX} files: give one of these."
    )


def _open_index(path: Path, index: Path) -> Source:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(_is_file_name(f) for f in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to files beside it: download it again.")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} files in {index.name}: {listed(missing)}; half-downloaded? "
            f"Download them again{_unfinished(index.parent)}."
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        found = _tensors(file)
        expected = {name for name, shard in weight_map.items() if shard == file.name}
        for names, problem in ((expected - set(found), "lacks"), (set(found) - expected, "has beyond its index")):
            if names:
                raise UserError(
                    f"{file} {problem} {listed(sorted(names))}: it does not belong to {index.name}; download both again."
                )
        tensors.update(found)
    return Source(path, [index, *files], tensors)


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    saved = torch_legacy.read(file) if torch_legacy.begins(file) else torch_zip.read(file)
    if not isinstance(saved, dict):
        raise UserError(f"{file} holds a {type(saved).__name__} instead of a dict of tensors: save a state_dict.")
    levels = [saved[key] for key in NESTED if isinstance(saved.get(key), dict)]
    for level in (*levels, saved):
        tensors = {name: x for name, x in level.items() if isinstance(name, str) and isinstance(x, np.ndarray)}
        if tensors:
            return tensors
    raise UserError(f"{file} holds no tensors, neither at its top nor in {', '.join(NESTED)}: give a file of weights.")


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """The format: length of the header (8 bytes), a JSON header, the tensors."""
    data = torch_zip.mapped(file)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > len(data):
        raise UserError(
            f"{file} is truncated or not a safetensors file: its header ends after the file; download it again."
        )
    try:
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        entries = {
            name: (str(e["dtype"]), tuple(e["shape"]), e["data_offsets"][0], e["data_offsets"][1])
            for name, e in header.items()
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged or not a safetensors file: its header cannot be read; download it again."
        ) from error
    if not entries:
        raise UserError(f"{file} holds no tensors: give a file of weights.")
    return {name: _view(file, data[start:], name, *entry) for name, entry in entries.items()}


def _view(file: Path, data: np.ndarray, name: str, code: str, shape: Shape, start: int, stop: int) -> np.ndarray:
    if code not in DTYPES:
        raise UserError(f"{file}: {name} has the dtype {code}, which is not read here: convert it to BF16, F16 or F32.")
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise UserError(f"{file} is damaged: {name} has shape {shape} and bytes {start} to {stop}; download it again.")
    if stop > len(data):
        raise UserError(f"{file} is truncated: {name} ends {stop - len(data)} bytes after the file; download it again.")
    if stop - start != math.prod(shape) * DTYPES[code].itemsize:
        raise UserError(
            f"{file} is damaged: {name} has {stop - start} bytes for shape {shape} of {code}; download it again."
        )
    return np.ndarray(shape, DTYPES[code], data[start:stop])


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _unfinished(folder: Path) -> str:
    """What a download in progress or a broken one left behind, for the end of a message."""
    names = sorted(file.name for pattern in UNFINISHED for file in folder.glob(pattern))
    return f" (unfinished downloads: {listed(names)})" if names else ""
