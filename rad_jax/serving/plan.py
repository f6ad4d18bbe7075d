"""How much memory a bundle needs on a card, counted before anything is loaded, and whether a build of PyTorch runs there at all."""

import bisect
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rad_jax.errors import UserError
from rad_jax.serving import limits
from rad_jax.serving.bundle import Bundle, Decoder, Tower

GIB = 2**30
MAX_TOKENS = 2048  # of a row: a film of 518 pixels has 1,369, the longest reason for an exam some 400, findings 256
MOST_SLOTS = {"cuda": 16, "cpu": 8}
PREFILL_TOKENS = (
    1024  # of prompts taken in together, if there are several: more would win nothing and hold up texts in progress
)
# Beside tensors: on a card the CUDA context, cuBLAS's workspaces and what the allocator cannot use (0.5 to 0.8 GiB on a V100 are
# reported); on a CPU the interpreter with PyTorch.
ALLOWANCE = {"cuda": int(0.7 * GIB), "cpu": int(0.5 * GIB)}
WORKSPACES = 4 * 32 * 2**20  # more on cards from 9.0 on, where cuBLAS takes 32 MiB for each stream
CONTEXT = int(0.3 * GIB)  # of that: what a CUDA context takes as it is made, before any kernel is loaded
# Around the engine on a CPU; beside a card it is the host's memory. A decoder was measured at its peak on the largest DICOM that an upload
# holds uncompressed, 24 megapixels of 16 bits: 776 MB, of which 89 MB before. (One of 64 megapixels, compressed, takes up to 2.5 GB for a
# moment, within the decoder's own limit; where that is too much, the system ends the decoder and not the server.) Of all uploads that are
# held there is the body, and the film taken out of it.
DECODERS, DECODER_BYTES = 2, 776 * 2**20
BODY_BYTES = 2 * limits.BODIES
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
NF4_ROWS, NF4_BLOCK = 2048, 64
# The release of requirements-serve.txt in the build with Volta's sm_70: PyTorch's for CUDA 12.6, whose last is 2.14. CUDA 13, for which the
# package index's is, knows no Volta. With the label pip takes it in place of a 2.13.0 that is installed, and keeps it when the lock follows.
VOLTA_TORCH, VOLTA_INDEX = "2.13.0+cu126", "https://download.pytorch.org/whl/cu126"

# A matrix of the decoder, which int8 and NF4 store smaller; embedding and head are not among them.
_MATRIX = re.compile(r"language_model\.model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight")
_BLOCK = re.compile(r"vision_tower\.(?:vision_model\.)?encoder\.layers?\.(\d+)\..*")


@dataclasses.dataclass(frozen=True)
class Card:
    """What is computed on: `kind` cuda or cpu, bytes that are free there, and on a card its compute capability.

    `context`: bytes of the allowance that this process has taken already, and that are not among the free ones any more.
    """

    name: str
    kind: str
    free: int
    capability: tuple[int, int] | None = None
    context: int = 0


# Cards that a hospital may have, with the memory that they show when nothing else runs.
CARDS = {
    "V100-16GB": Card("V100-16GB", "cuda", int(15.78 * GIB), (7, 0)),
    "V100-32GB": Card("V100-32GB", "cuda", int(31.74 * GIB), (7, 0)),
    "T4": Card("T4", "cuda", int(14.58 * GIB), (7, 5)),
    "RTX-2080": Card("RTX-2080", "cuda", int(7.77 * GIB), (7, 5)),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by what they are for, and how many rows of `max_tokens` are served at once."""

    card: Card
    dtype: str
    weights: str
    weight_bytes: int
    slot_bytes: int
    temporary_bytes: int
    scratch_bytes: int
    allowance: int
    decoder_bytes: int
    body_bytes: int
    slots: int
    max_tokens: int

    @property
    def batch_1(self) -> int:
        """Bytes with a single row."""
        engine = self.weight_bytes + self.slot_bytes + self.temporary_bytes + self.scratch_bytes
        return engine + self.allowance + self.decoder_bytes + self.body_bytes

    @property
    def total(self) -> int:
        """Bytes with all slots."""
        return self.batch_1 + (self.slots - 1) * self.slot_bytes

    def text(self) -> str:
        """For people, on a few lines."""
        parts = {
            f"weights ({self.weights})": self.weight_bytes,
            f"keys and values of a row of {self.max_tokens} tokens": self.slot_bytes,
            "prefill and logits": self.temporary_bytes,
            "one matrix spread out": self.scratch_bytes,
            "CUDA context and allocator" if self.card.kind == "cuda" else "Python and PyTorch": self.allowance,
            f"{DECODERS} processes that decode films": self.decoder_bytes,
            "uploads": self.body_bytes,
        }
        lines = [f"  {size / GIB:7.2f} GiB  {name}" for name, size in parts.items() if size]
        head = f"memory plan, {self.card.name}, {self.dtype}: needs {self.batch_1 / GIB:.1f} of {self.card.free / GIB:.1f} GiB at batch 1"
        fit = "1 slot fits" if self.slots == 1 else f"{self.slots} slots fit"
        return "\n".join([f"{head}; {fit} ({self.total / GIB:.1f} GiB)", *lines])


def plan(bundle: Bundle, card: Card, dtype: str, weights: str | None = None, slots: int | None = None) -> Plan:
    """The memory of a bundle on a card, which need not be there: weights are counted from the files' headers.

    Args:
        bundle: what is served.
        card: where.
        dtype: that is computed in, a key of ITEM_BYTES.
        weights: of the decoder's matrices: "int8", "nf4", or None for `dtype`.
        slots: rows at once; None for as many as fit, at most MOST_SLOTS.

    Raises:
        UserError: it does not fit.
    """
    c, item = bundle.decoder, ITEM_BYTES[dtype]
    max_tokens = min(c.max_positions, MAX_TOKENS)
    slot = 2 * c.depth * c.kv_heads * c.head_dim * max_tokens * item
    scratch = _scratch(bundle, weights, item, pools=2 if card.kind == "cuda" else 1)
    allowance = ALLOWANCE[card.kind] - card.context + (WORKSPACES if (card.capability or (0, 0)) >= (9, 0) else 0)
    stored = weight_bytes(bundle, weights, item)
    decoders, bodies = (DECODERS * DECODER_BYTES, BODY_BYTES) if card.kind == "cpu" else (0, 0)
    fixed = stored + scratch + allowance + decoders + bodies
    wanted = slots or MOST_SLOTS[card.kind]
    squares = keeps_squares(card, c, dtype)

    def needed(rows: int) -> int:
        return fixed + rows * slot + temporary_bytes(c, bundle.tower, rows, max_tokens, item, squares)

    fitting = bisect.bisect_right(range(1, wanted + 1), card.free, key=needed)
    if not fitting or (slots is not None and fitting < slots):
        many = "a single row" if not fitting else f"{slots} slots"
        advice = f"use --slots={fitting}" if fitting else _smaller(weights, dtype)
        raise UserError(
            f"{bundle.folder} needs {needed(1 if not fitting else wanted) / GIB:.1f} GiB for {many} in {weights or dtype}, but {card.name} "
            f"has {card.free / GIB:.1f} GiB free: {advice}."
        )
    return Plan(
        card=card,
        dtype=dtype,
        weights=weights or dtype,
        weight_bytes=stored,
        slot_bytes=slot,
        temporary_bytes=temporary_bytes(c, bundle.tower, fitting, max_tokens, item, squares),
        scratch_bytes=scratch,
        allowance=allowance,
        decoder_bytes=decoders,
        body_bytes=bodies,
        slots=fitting,
        max_tokens=max_tokens,
    )


def weight_bytes(bundle: Bundle, weights: str | None, item: int) -> int:
    """Bytes of all tensors that are loaded, as they will lie in memory."""
    total = 0
    for name, shape in bundle.shapes().items():
        size = 1
        for side in shape:
            size *= side
        if (block := _BLOCK.fullmatch(name)) and int(block[1]) >= bundle.tower.blocks:
            continue
        if weights is not None and _MATRIX.fullmatch(name):
            # 1 byte an entry and a float32 for each output; half a byte and a float32 for each block.
            total += size + 4 * shape[0] if weights == "int8" else size // 2 + 4 * size // NF4_BLOCK
        else:
            total += size * item
    return total


def temporary_bytes(decoder: Decoder, tower: Tower, slots: int, max_tokens: int, item: int, squares: bool) -> int:
    """The most that is alive at once beside weights and cache: a block of the decoder on the prompts taken in together, or one of the
    tower on their films, and the logits. No attention keeps a square of the row's length but the decoder's where `squares`."""
    d, t = decoder, tower
    rows = min(slots * max_tokens, max(PREFILL_TOKENS, max_tokens))
    heads, turned = (d.heads + 2 * d.kv_heads) * d.head_dim, (d.heads + d.kv_heads) * d.head_dim
    attention = rows * (heads + turned + 2 * d.width) * item + (square_bytes(d, max_tokens) if squares else 0)
    in_decoder = rows * 2 * d.width * item + max(attention, rows * 3 * d.mlp_dim * item)
    films = max(1, rows // (t.patches + 1))
    in_tower = films * (t.patches + 1) * (2 * t.width + max(5 * t.width, 2 * t.mlp_dim)) * item
    return max(in_decoder, in_tower) + slots * d.vocab_size * (item + 4)


def keeps_squares(card: Card, decoder: Decoder, dtype: str) -> bool:
    """Whether PyTorch computes the decoder's attention with the scores of all pairs of tokens in memory.

    With fewer heads of keys than of queries its memory-efficient kernel cannot, and its flash kernel does on cards from 8.0 on and in 16
    bits alone; on a CPU it always does.
    """
    flash = (card.capability or (0, 0)) >= (8, 0) and dtype != "float32"
    return card.kind == "cuda" and decoder.kv_heads < decoder.heads and not flash


def square_bytes(decoder: Decoder, length: int) -> int:
    """Of that attention, on one prompt, in float32 whatever the dtype: scores before and after softmax and what hides the later tokens;
    queries, keys and values in full, and the output."""
    d = decoder
    return 4 * ((2 * d.heads + 2) * length**2 + 5 * d.heads * d.head_dim * length)


def _scratch(bundle: Bundle, weights: str | None, item: int, pools: int) -> int:
    """Room for the largest matrix spread out, and in NF4 for some of its rows on the way, in each pool: CUDA graphs have one of their own."""
    c = bundle.decoder
    columns = max(c.width, c.mlp_dim)
    largest = max(2 * c.mlp_dim, (c.heads + 2 * c.kv_heads) * c.head_dim) * c.width
    if weights is None:
        return 0
    return largest * item + (pools * NF4_ROWS * columns * (2 + item) if weights == "nf4" else 0)


def _smaller(weights: str | None, dtype: str) -> str:
    if weights is None:
        return "use --weights=int8 or --weights=nf4" + (", or --dtype=bfloat16" if dtype == "float32" else "")
    return "use --weights=nf4" if weights == "int8" else "use a card with more memory"


# ----------------------------------------------------------------------------------------------------------------------- this machine


def this_cpu() -> Card:
    """The memory that is free here, or left of what a container may use."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if found := re.search(r"^MemAvailable:\s+(\d+) kB", _contents("/proc/meminfo"), re.MULTILINE):
        free = int(found[1]) * 1024
    limit, used = _contents("/sys/fs/cgroup/memory.max").strip(), _contents("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        cached = re.search(r"^inactive_file (\d+)", _contents("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        free = min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return Card("this CPU", "cpu", free)


def this_gpu() -> Card:
    """The first CUDA card.

    Raises:
        UserError: the installed PyTorch has no code for it.
    """
    import torch

    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    check_build(name, capability, torch.cuda.get_arch_list(), torch.__version__)
    free, total = torch.cuda.mem_get_info()  # which makes the context, if nothing has: it is not free any more
    return Card(name, "cuda", free, capability, min(total - free, CONTEXT))


def check_build(name: str, capability: tuple[int, int], architectures: Sequence[str], version: str) -> None:
    """Refuses a card that a build of PyTorch has no code for, before it fails with "no kernel image is available".

    Args:
        name, capability: of the card; (7, 0) is Volta.
        architectures: what `torch.cuda.get_arch_list()` says: "sm_70" is code for 7.0 and newer cards of its generation,
            "compute_90" text that is compiled for any newer card.
        version: of PyTorch.

    Raises:
        UserError: with the build to install.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = re.match(r"\d+", number)
        if digits is None:
            continue
        has = int(digits[0][:-1]), int(digits[0][-1])
        if (kind == "sm" and has[0] == capability[0] and has <= capability) or (
            kind == "compute" and has <= capability
        ):
            return
    wanted = f"sm_{capability[0]}{capability[1]}"
    advice = (
        f"pip install torch=={VOLTA_TORCH} --index-url {VOLTA_INDEX}"
        if capability == (7, 0)
        else f"install a build of PyTorch that has {wanted}"
    )
    raise UserError(
        f"torch {version} has no code for {name} ({wanted}; it has {', '.join(architectures) or 'none'}): {advice}."
    )


def _contents(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
