"""A bundle that has been compared with its model, or none."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rad_jax.errors import UserError
from rad_jax.interop import bundle, verify
from rad_jax.models.llava import LlavaConfig


def export_bundle(
    variables: Mapping[str, Any],
    config: LlavaConfig,
    tokenizer_path: Path,
    out: Path,
    dtype: str,
    *,
    studies: Sequence[verify.Study],
    max_new_tokens: int,
    provenance: Mapping[str, Any],
    tower: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a bundle and compares it with the model; `out` appears only when they agree.

    Args:
        variables, config, tokenizer_path, dtype, provenance, tower: as in `rad_jax.interop.bundle.write`.
        out: folder to make.
        studies, max_new_tokens: as in `rad_jax.interop.verify.verify`.
        overwrite: replace an older `out`, once the new one is verified.

    Returns:
        What `verify` found; it is also in `rad_jax.json` under "verified".

    Raises:
        UserError: `out` exists, the model cannot be exported, or PyTorch and JAX do not agree.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: choose another --out, or give --overwrite.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        bundle.write(partial, variables, config, tokenizer_path, dtype, provenance, tower)
        result = verify.verify(partial, variables, config, tokenizer_path, studies, max_new_tokens)
        verify.check(result, out)
        record = json.loads((partial / bundle.RECORD).read_text(encoding="utf-8"))
        text = json.dumps({**record, "verified": result}, indent=2) + "\n"
        (partial / bundle.RECORD).write_text(text, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result
