"""A bundle on a CUDA card: whether the memory plan holds there, and how far its numbers are from float32.

    python -m tests.serving.on_card BUNDLE [--as_card=V100-16GB]

For float16, int8 and NF4 the plan is printed, and beside it what the card then held at most: after a prefill of every slot's longest prompt at
once, and steps of all slots; and the milliseconds of a step. With --as_card PyTorch may take no more memory than that card has, and uses no attention kernel that it lacks; a
plan that counts too little ends in an error. Logits of a film's prompt are compared with those of transformers in float32, beside which stand
those of transformers in float16. Exit status 1 if a plan was exceeded.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rad_jax.prompts import IMAGE_ID, question
from rad_jax.serving import bundle as bundles
from rad_jax.serving import loading, plan, reference, text
from rad_jax.serving.model import Model, Prompt, Row
from rad_jax.serving.plan import CARDS, GIB, Plan

REASON = "cough and fever"
KINDS = (None, "int8", "nf4")


def as_volta() -> None:
    """Kernels that need 8.0 are not used, and cuBLAS takes what it takes before 9.0."""
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8", "CUBLASLT_WORKSPACE_SIZE": "1024"}
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def worst(model: Model, planned: Plan, film: np.ndarray, patches: int) -> list[Row]:
    """Fills all slots with films and as many words as there is room for, as the engine takes them in: one long prompt at a time.

    Returns:
        The rows of a next step.
    """
    words = planned.max_tokens - patches - 32
    prompt = Prompt([*range(3, 67), IMAGE_ID, *(3 + i % 900 for i in range(words - 64))], film, True)
    for slot in range(planned.slots):
        model.prefill([prompt], slot)
    short = Prompt([1, IMAGE_ID, *range(3, 60)], film, False)
    model.prefill([short] * min(max(1, plan.PREFILL_TOKENS // (patches + 58)), planned.slots), 0)
    rows = [Row(5, words + patches, 64)] * planned.slots
    model.step(rows)
    return rows


def milliseconds(work: Callable[[], object], times: int = 10) -> float:
    """Median of some runs, each until the card is done."""
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def used(bundle: bundles.Bundle, planned: Plan) -> tuple[int, int, list[float]]:
    """The most bytes in tensors and in PyTorch's allocator; milliseconds of reading a film, and of a step of one row and of all."""
    torch.cuda.reset_peak_memory_stats()
    model = loading.build(bundle, planned, print)
    side = bundle.tower.image_size
    film = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    rows = worst(model, planned, film, bundle.tower.patches)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    text = Prompt([1, IMAGE_ID, *range(3, 60)], film, False)
    plain = [row._replace(length=bundle.tower.patches + 100, look_from=None) for row in rows]
    works = [partial(model.prefill, [text], 0), partial(model.step, plain[:1]), partial(model.step, plain)]
    return *most, [milliseconds(work) for work in works]


def measured(bundle: bundles.Bundle, card: plan.Card, kind: str | None) -> bool:
    """Prints the plan and what was taken; whether it held."""
    planned = plan.plan(bundle, card, "float16", kind)
    before = outside()
    tensors, reserved, (read, one, all_) = used(bundle, planned)
    more = outside() - before
    free()
    # As it is planned, a context is there already, and what it took is not counted as free; of a card that is not here it is part of the plan.
    held = tensors + more + (0 if card.context else plan.CONTEXT) <= planned.total
    print(
        f"{planned.weights}: plan {planned.total / GIB:.2f} GiB for {planned.slots} slots, {planned.batch_1 / GIB:.2f} for one; "
        f"most in tensors {tensors / GIB:.2f}, reserved {reserved / GIB:.2f}, outside PyTorch's allocator {before / GIB:.2f} before and "
        f"{more / GIB:.2f} more: {'held' if held else 'EXCEEDED'}; a film read in {read:.1f} ms, a step of 1 row {one:.1f} ms, of "
        f"{planned.slots} rows {all_:.1f} ms",
        flush=True,
    )
    return held


def outside() -> int:
    """Bytes of the card that are in use, but not by PyTorch's allocator: contexts, and code."""
    return total_used() - torch.cuda.memory_reserved()


def total_used() -> int:
    """Bytes that are not free on the card."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@torch.inference_mode()
def numbers(bundle: bundles.Bundle, card: plan.Card) -> None:
    """Prints how far logits are from float32's, all relative to the spread of these."""
    tokenizer, _ = loading.open_tokenizer(bundle)
    side = bundle.tower.image_size
    film = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)

    def theirs(dtype: str) -> torch.Tensor:
        model = reference.load(bundle.folder, dtype, card.kind)
        return torch.from_numpy(model.logits(model.prompt(film, REASON), film)[-1])

    expected = theirs("float32")
    free()
    usable = torch.isfinite(expected)
    usable[list(bundle.suppressed)] = False

    def tell(name: str, found: torch.Tensor) -> None:
        off = (found - expected)[usable]
        print(
            f"{name}: logits off by {off.square().mean().sqrt() / expected[usable].std():.1e} of their spread (root mean square), at most "
            f"{off.abs().max() / expected[usable].std():.1e}; same largest: {bool(found[usable].argmax() == expected[usable].argmax())}",
            flush=True,
        )

    tell("transformers, float16", theirs("float16"))
    free()
    ids = text.prompt(tokenizer, question(REASON), True)
    for dtype, kind in (("float32", None), ("float16", None), ("float16", "int8"), ("float16", "nf4")):
        model = loading.build(bundle, plan.plan(bundle, card, dtype, kind, 1), print)
        tell(f"ours, {kind or dtype}", model.prefill([Prompt(ids, film, False)], 0)[0][0].cpu())
        del model
        free()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--as_card", choices=sorted(CARDS))
    given = parser.parse_args()
    if given.as_card:
        as_volta()
    bundle, card = bundles.read(given.bundle), plan.this_gpu()
    if given.as_card:
        card = CARDS[given.as_card]
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((card.free - plan.CONTEXT) / total)
    else:
        numbers(bundle, card)
    held = [measured(bundle, card, kind) for kind in KINDS]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
