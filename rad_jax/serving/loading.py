"""An exported bundle to an engine that serves it: files checked, memory planned, weights loaded tensor by tensor."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from rad_jax import __version__
from rad_jax.errors import UserError
from rad_jax.serving import bundle as bundles
from rad_jax.serving import plan as plans
from rad_jax.serving.bundle import Bundle
from rad_jax.serving.engine import Engine, EngineInfo
from rad_jax.serving.limits import DEFAULT_NEW_TOKENS
from rad_jax.serving.plan import GIB, PREFILL_TOKENS, Plan

T = TypeVar("T")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "float32")}


def load(
    bundle: Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    weights: str | None = None,
    slots: int | None = None,
    queue: int = 64,
    say: Callable[[str], object] = print,
) -> Engine:
    """Checks a bundle, says what it needs, loads it, and starts its engine.

    Args:
        bundle: folder that `launch.export --format=hf` made.
        device: one of DEVICES; "auto" takes a CUDA card where there is one.
        dtype: that is computed in; None for float16 on a card, and on a CPU for float32, or bfloat16 if that does not fit.
        weights: "int8" or "nf4", for the decoder's matrices; None as `dtype`.
        slots: rows written at once; None for as many as fit.
        queue: requests that may wait.
        say: told the memory plan before anything is loaded, then how long it took and what it took.

    Raises:
        UserError: not a bundle, one that this engine does not run, a card that PyTorch has no code for, or too little memory.
    """
    began = time.perf_counter()
    size = sum(path.stat().st_size for path in bundle.glob("*.safetensors")) if bundle.is_dir() else 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="checking", mininterval=1.0, delay=1.0) as bar:
        found = bundles.read(bundle, bar.update)
    planned = choose(found, device, dtype, weights, slots)
    say(planned.text())
    model = alone(lambda: build(found, planned, say))
    tokenizer, open_ = open_tokenizer(found)
    info = EngineInfo(
        name=found.folder.resolve().name,
        version=__version__,
        bundle_sha256=found.sha256,
        device=planned.card.name,
        dtype=planned.dtype,
        weights=planned.weights,
        slots=planned.slots,
        max_tokens=planned.max_tokens,
        image_size=found.tower.image_size,
    )
    say(f"ready after {time.perf_counter() - began:.1f} s; {memory(planned)}")
    return Engine(model, tokenizer, open_, found.eos_ids, info, found.tower.patches, queue, PREFILL_TOKENS)


def choose(bundle: Bundle, device: str, dtype: str | None, weights: str | None, slots: int | None) -> Plan:
    """The plan for this machine, after `load`'s arguments."""
    import torch

    if device not in DEVICES:
        raise UserError(f"device {device!r} is not one of {', '.join(DEVICES)}.")
    if weights not in (None, "int8", "nf4"):
        raise UserError(f"weights {weights!r} is not one of int8, nf4.")
    if slots is not None and slots < 1:
        raise UserError("slots must be at least 1.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA card that this PyTorch sees: use --device=cpu, or install a build for CUDA.")
    card = (
        plans.this_gpu() if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else plans.this_cpu()
    )
    if dtype is not None and dtype not in DTYPES[card.kind]:
        raise UserError(f"dtype {dtype!r} is not for {card.kind}: use {' or '.join(DTYPES[card.kind])}.")
    if dtype is not None:
        return plans.plan(bundle, card, dtype, weights, slots)
    first, second = DTYPES[card.kind]
    try:
        return plans.plan(bundle, card, first, weights, slots)
    except UserError:
        if card.kind == "cuda":
            raise
        return plans.plan(bundle, card, second, weights, slots)


def build(bundle: Bundle, plan: Plan, say: Callable[[str], object]) -> Any:
    """The model with its weights and its cache, warmed up."""
    import torch

    from rad_jax.serving.filling import fill
    from rad_jax.serving.model import Model, Prompt, Row

    device = torch.device("cuda" if plan.card.kind == "cuda" else "cpu")
    if device.type == "cuda":
        # Sums in float16 lose too much over 11,008 terms, and float32 is asked for where it shall be exact.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = False
    stored = sum(path.stat().st_size for path in bundle.files)
    kind = plan.weights if plan.weights != plan.dtype else None
    with tqdm(total=stored, unit="B", unit_scale=True, desc="loading", mininterval=1.0, delay=1.0) as bar:
        weights = fill(bundle, getattr(torch, plan.dtype), device, kind, bar.update)
    model = Model(bundle.decoder, bundle.tower, weights, bundle.suppressed, plan.slots, plan.max_tokens, say)
    model.prefill([Prompt([0], None, False)], 0)
    model.step([Row(0, 1, None)])
    # A film with a short question at its beginning, and at the end of its text.
    model.prepare([bundle.tower.patches + more for more in (64, 64 + DEFAULT_NEW_TOKENS)])
    return model


def alone(work: Callable[[], T]) -> T:
    """The result of `work`, which is done in a thread that has ended when this returns.

    Every thread that computes on a CPU gets helpers of its own from OpenMP, which stay as long as it does. As soon as all of them are more than
    the cores, GNU's OpenMP lets them sleep between two operations, and waking them takes as long as a small operation. The engine's thread is to
    be the only one that has any.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="loading", daemon=True)
    thread.start()
    try:
        return future.result()
    finally:
        if future.done():
            thread.join()


def open_tokenizer(bundle: Bundle) -> tuple[Any, list[bool]]:
    """The bundle's tokenizer, and for each row of the embedding what `text.open_pieces` says.

    Raises:
        UserError: there is none.
    """
    import tokenizers

    from rad_jax.prompts import load_tokenizer
    from rad_jax.serving.text import open_pieces

    path = bundle.folder / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    return tokenizer, open_pieces(tokenizers.Tokenizer.from_file(str(path)), bundle.decoder.vocab_size)


def memory(plan: Plan) -> str:
    """What is in use, for people."""
    import re

    if plan.card.kind == "cuda":
        import torch

        return f"{torch.cuda.memory_reserved() / GIB:.1f} GiB of the card's memory in use"
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return "memory in use is not known on this system"
    found = {
        key: int(size) * 1024 / GIB for key, size in re.findall(r"^(VmRSS|RssAnon):\s+(\d+) kB", status, re.MULTILINE)
    }
    return f"{found['VmRSS']:.2f} GiB resident, of which {found['RssAnon']:.2f} GiB are its own and the rest pages of files"
