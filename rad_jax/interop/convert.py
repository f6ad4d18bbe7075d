"""Foreign weights to a base, tensor by tensor: nothing holds a model, and nothing is left of a conversion that fails."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rad_jax import FORMAT_VERSION, __version__, base
from rad_jax.checkpoint import Run, write_config
from rad_jax.errors import UserError
from rad_jax.interop import positions, receipt, shards, sources, tables
from rad_jax.interop.formats import FORMATS, Opened
from rad_jax.prompts import load_tokenizer

TOKENIZERS = ("tokenizer.model", "tokenizer.json", "vocab.txt")
_POSITIONS = "params/vision/pos_embed"


def convert(
    source: Path,
    format: str,
    out: Path,
    *,
    bases: Sequence[Run] = (),
    tokenizer: Path | None = None,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Writes a base; `out` appears only when it is whole.

    Args:
        source: file or folder.
        format: a key of `formats.FORMATS`.
        out: folder to make.
        bases: what an adapter or a projector belongs to; the new base refers to them.
        tokenizer: file, or folder with one; None is the source's folder.
        image_size: pixels; the tower's position table is resampled to it.

    Returns:
        The receipt, which is also in `out`.

    Raises:
        UserError: files or tensors that are missing, damaged or unknown, a model that is not ours, too small a disk, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out.")
    with receipt.Meter() as meter:
        opened = FORMATS[format](source, bases)
        plan, values = _planned(opened, image_size)
        found = _tokenizer(source, tokenizer, opened, bases)
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_disk(out.parent, shards.total_bytes(plan))
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with ThreadPoolExecutor(1) as pool:
                hashing = pool.submit(lambda: {path.name: sources.sha256(path) for path in opened.files})
                bar = tqdm(total=shards.total_bytes(plan), unit="B", unit_scale=True, desc="weights", mininterval=1.0)
                with bar:
                    written = shards.write(
                        partial, plan, zip(plan, values, strict=True), base.STEM, progress=bar.update
                    )
                hashes = hashing.result()
            record = _record(opened, format, partial, out, written, hashes, bases, found)
            write_config(partial, record)
            seconds = meter.read()
            contents = {
                "format": format,
                "sources": hashes,
                "tensors": len(plan),
                "bytes": shards.total_bytes(plan),
                "mb_per_s": round(shards.total_bytes(plan) / 1e6 / seconds["seconds"], 1),
                "carried": sum(name.startswith(base.CARRIED) for name in plan),
                "dropped": list(opened.dropped),
                **seconds,
            }
            receipt.write(partial, **contents)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return contents


def _planned(opened: Opened, image_size: int | None) -> tuple[dict[str, Any], Iterator[np.ndarray]]:
    """Shape and dtype of everything to write by its name, and the values in the same order; all foreign names are checked here."""
    plan: dict[str, Any] = {}
    streams: list[Callable[[], Iterator[np.ndarray]]] = []
    edits = _edits(opened, image_size)
    for table, tensors in opened.parts:
        carried = tables.check(table, {name: tensor.shape for name, tensor in tensors.items()})
        carried = [name for name in carried if name not in opened.dropped]
        pieces = tables.pieces(table, {name: tensor.dtype for name, tensor in tensors.items()})
        for piece in pieces:
            shape = edits[piece.path][0] if piece.path in edits else piece.shape
            plan[base.name_of(piece)] = shape, piece.dtype
        plan |= {base.CARRIED + name: (tensors[name].shape, tensors[name].dtype) for name in carried}

        def values(
            table: tables.Table = table,
            tensors: Mapping[str, np.ndarray] = tensors,
            pieces: Sequence[tables.Piece] = pieces,
            carried: Sequence[str] = carried,
        ) -> Iterator[np.ndarray]:
            for piece, value in zip(pieces, tables.read(table, tensors), strict=True):
                yield edits[piece.path][1](value) if piece.path in edits else value
            yield from (tensors[name] for name in carried)

        streams.append(values)
    return plan, (value for stream in streams for value in stream())


def _edits(
    opened: Opened, image_size: int | None
) -> dict[str, tuple[tables.Shape, Callable[[np.ndarray], np.ndarray]]]:
    """What is not taken over as it is: the position table, for another image size. The model's description is changed with it."""
    vision = opened.model.get("vision")
    if image_size is None or vision is None or vision["image_size"] == image_size:
        return {}
    patch, tokens = vision["patch_size"], int(vision.get("class_token", True))
    if image_size % patch:
        raise UserError(f"--image_size={image_size} is not a multiple of the tower's patches of {patch} pixels.")
    grid = image_size // patch
    vision["image_size"] = image_size
    shape = (1, tokens + grid * grid, vision["width"])
    return {_POSITIONS: (shape, lambda table: positions.resample(table, grid))}


def _tokenizer(source: Path, given: Path | None, opened: Opened, bases: Sequence[Run]) -> Path | None:
    """The tokenizer's file: given, beside the weights, or of the base that they belong to; checked against the model's rows."""
    folder = source if source.is_dir() else source.parent
    place = given or folder
    names = [name for name in TOKENIZERS if (place / name).is_file()] if place.is_dir() else []
    path = place if place.is_file() and given else place / names[0] if names else None
    if path is None:
        if given:
            raise UserError(f"{given}: no {', '.join(TOKENIZERS)} there.")
        return next((run.tokenizer_file for run in reversed(bases) if run.tokenizer), None)
    part = "llm" if "llm" in opened.model else "text"
    rows = opened.model.get(part, {}).get("vocab_size")
    if rows is None:
        return None
    pieces = load_tokenizer(path).vocab_size
    if pieces > rows:
        raise UserError(f"{path} has {pieces} pieces but the model has {rows} rows: it is another model's tokenizer.")
    return path


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free but the base needs {needed / 1e9:.1f} GB: free some space."
        )


def _record(
    opened: Opened,
    format: str,
    partial: Path,
    out: Path,
    written: Mapping[str, str],
    hashes: Mapping[str, str],
    bases: Sequence[Run],
    tokenizer: Path | None,
) -> dict[str, Any]:
    """The contents of `config.json`."""
    task = "generative" if "llm" in opened.model else "contrastive" if "text" in opened.model else "tower"
    kept = None
    if tokenizer is not None:
        shutil.copyfile(tokenizer, partial / tokenizer.name)
        kept = {"file": tokenizer.name, "sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest()}
    return {
        "format_version": FORMAT_VERSION,
        "rad_jax": __version__,
        "config": {"task": task, "model": opened.model, "data": _data(opened)},
        "tokenizer": kept,
        "bases": [{"path": os.path.relpath(b.path, out.resolve()), "step": b.step, "sha256": b.sha256} for b in bases],
        "weights": {name: {"bytes": (partial / name).stat().st_size, "sha256": h} for name, h in written.items()},
        "source": {"format": format, "files": dict(hashes), "configs": opened.configs},
    }


def _data(opened: Opened) -> dict[str, Any]:
    """How long texts are: what open_clip's configuration says of a text tower, else its own 256."""
    if "text" not in opened.model:
        return {}
    texts = [config.get("model_cfg", config).get("text_cfg") for config in opened.configs.values()]
    length = next((text["context_length"] for text in texts if text and "context_length" in text), 256)
    return {"text_length": min(length, opened.model["text"]["max_positions"])}
