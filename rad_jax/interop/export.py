"""A folder for other programs, written tensor by tensor, compared with its model, or none."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rad_jax import FORMAT_VERSION
from rad_jax.errors import UserError
from rad_jax.interop import bundle, gguf, layouts, ranges, receipt, sources, verify
from rad_jax.interop.exported import Exported

Writer = Callable[[Path, Exported, str, Callable[[int], object]], dict[str, str]]
WRITERS: dict[str, Writer] = {
    "hf": bundle.write,
    "hf_adapter": bundle.write_with_adapter,
    "peft": layouts.write_peft,
    "llava": layouts.write_llava,
    "open_clip": layouts.write_open_clip,
    "gguf": gguf.write,
}


def export(
    model: Exported,
    format: str,
    out: Path,
    dtype: str,
    *,
    studies: Sequence[verify.Study] = (),
    max_new_tokens: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a folder; `out` appears only when it is whole and, given studies, PyTorch makes the same of it as JAX.

    Args:
        model: what goes out.
        format: a key of `WRITERS`.
        out: folder to make.
        dtype: one of `shards.TARGETS`; for "gguf" one of `gguf.TYPES`.
        studies, max_new_tokens: as in `verify.verify`, for `verify.FORMATS`; without studies nothing is computed, only written.
        overwrite: replace an older `out`, once the new one is verified.

    Returns:
        The receipt, which is also in `out`.

    Raises:
        UserError: `out` exists, the format cannot hold the model, float16 cannot hold its numbers, or PyTorch and JAX do not agree.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: choose another --out, or give --overwrite.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with receipt.Meter() as meter:
            bar = tqdm(unit="B", unit_scale=True, desc=f"writing {format}", mininterval=1.0)
            sizes: list[int] = []

            def progress(size: int) -> None:
                sizes.append(size)
                bar.update(size)

            with bar:
                hashes = WRITERS[format](partial, model, dtype, progress)
            _reread(partial, hashes, len(sizes))
            outputs = None
            if format in verify.FORMATS and dtype == "float16":
                outputs = ranges.largest_outputs(model, studies[0] if studies else None)
            spent = meter.read()
        written = sum((partial / name).stat().st_size for name in hashes)
        contents: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "format": format,
            "dtype": dtype,
            "sources": dict(model.sources),
            "files": hashes,
            "tensors": len(sizes),
            "bytes": written,
            "mb_per_s": round(written / 1e6 / max(spent["seconds"], 1e-3), 1),
            **spent,
        }
        if outputs is not None:
            contents["max_abs_outputs"] = outputs
        if format in verify.FORMATS and model.config is not None and model.config.vision is not None:
            contents |= {"vocab_size": model.config.llm.vocab_size}
        receipt.write(partial, **contents)
        if studies:
            contents["differences"] = verify.verify(partial, model, studies, max_new_tokens)
            verify.check(contents["differences"], out)
            receipt.write(partial, **contents)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return contents


def _reread(folder: Path, files: Mapping[str, str], tensors: int) -> None:
    """Refuses files that are not on the disk as they were written: a network disk may lose what it took.

    Raises:
        UserError: a file cannot be opened, or tensors are missing.
    """
    weights = [folder / name for name in files if Path(name).suffix in (".safetensors", ".bin", ".pt")]
    found = sum(len(sources.open_source(file)) for file in weights)
    found += sum(gguf.tensor_count(folder / name) for name in files if Path(name).suffix == ".gguf")
    if found != tensors:
        raise UserError(f"{folder} holds {found} tensors instead of the {tensors} that were written: export it again.")
