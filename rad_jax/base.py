"""Weights made elsewhere, as a folder that `--base` and `--checkpoint` can name: what launch.convert writes.

config.json             format version, model, tokenizer, sources and their sha256, sizes and sha256 of the weight files
weights*.safetensors    one array per layer and tensor: "params/llm/layers/attn/q/kernel[3]"; tensors that the model never uses are kept
                        under "carried/" by their foreign names
tokenizer.model, tokenizer.json or vocab.txt

Arrays are read through a memory map, slice by slice, straight into the shards of a device mesh.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop import sources
from rad_jax.interop.tables import Piece, unflatten
from rad_jax.lazy import LazyArray

STEM = "weights"
CARRIED = "carried/"
_LAYER = re.compile(r"(.+)\[(\d+)\]")


def name_of(piece: Piece) -> str:
    """A piece's name in the files."""
    return piece.path if piece.layer is None else f"{piece.path}[{piece.layer}]"


def manifest_hash(files: Mapping[str, Any]) -> str:
    """What stands for the content of all weight files: sha256 over their names, sizes and hashes."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def read_weights(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The variables of a base as a tree of lazy arrays, and the carried tensors by their foreign names.

    Args:
        folder: of the base.
        files: size in bytes and sha256 of each weight file, from `config.json`. Sizes are checked, contents are not read.

    Raises:
        UserError: a file is missing or has another size.
    """
    for name, recorded in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != recorded["bytes"]:
            what = "is missing" if found is None else f"has {found} bytes instead of {recorded['bytes']}"
            raise UserError(f"{folder / name} {what}: copy the base again, or convert it again.")
    source = sources.open_source(folder, (f"{STEM}.safetensors.index.json", f"{STEM}.safetensors"))
    layers: dict[str, int] = {}
    carried: dict[str, np.ndarray] = {}
    for name in source:
        if name.startswith(CARRIED):
            carried[name.removeprefix(CARRIED)] = source[name]
            continue
        match = _LAYER.fullmatch(name)
        path = match[1] if match else name
        layers[path] = layers.get(path, 0) + 1 if match else 0
    return unflatten({path: _lazy(source, path, count) for path, count in layers.items()}), carried


def _lazy(source: "sources.Source", path: str, layers: int) -> LazyArray:
    first = f"{path}[0]" if layers else path
    shape, dtype = source.shape(first), source.dtype(first)

    def read(layer: int) -> np.ndarray:
        return source[f"{path}[{layer}]" if layers else path]

    return LazyArray((layers, *shape) if layers else shape, dtype, read, stacked=bool(layers))
