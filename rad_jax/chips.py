"""What a TPU is: memory, speed and links of each generation, and the shapes in which chips are rented.

Published figures (Google Cloud's pages of each generation; the DCN share is a host's network cards over its chips), but for two facts that
the compiler tells: the memory it lets a program have (its message when one needs more), and the clock its cycle estimates count in.
"""

import dataclasses
import math
import re

from rad_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation.

    Attributes:
        generation: "v5e"; kind: as JAX names the device.
        peak: bf16 FLOP/s. hbm: bytes a program may use. hbm_bandwidth: bytes/s.
        ici: bytes/s of one link, one way. dcn: bytes/s of a chip's share of its host's network.
        clock: Hz, of the compiler's `estimated_cycles`.
        cores: TensorCores per chip; two are one device (megacore), and slices are named by cores.
    """

    generation: str
    kind: str
    peak: float
    hbm: int
    hbm_bandwidth: float
    ici: float
    dcn: float
    clock: float
    cores: int


CHIPS = {
    chip.generation: chip
    for chip in (
        Chip("v4", "TPU v4", 2.75e14, int(30.75 * GIB), 1.2e12, 4.5e10, 6.25e9, 1.05e9, 2),
        Chip("v5e", "TPU v5 lite", 1.97e14, int(15.75 * GIB), 8.1e11, 4.5e10, 3.125e9, 1.5e9, 1),
        Chip("v5p", "TPU v5", 4.59e14, int(95.74 * GIB), 2.765e12, 9e10, 6.25e9, 1.75e9, 2),
        Chip("v6e", "TPU v6 lite", 9.18e14, int(31.25 * GIB), 1.64e12, 9e10, 1.25e10, 1.75e9, 1),
    )
}

# Chips to their arrangement. A whole v5e or v6e pod of 256 is a torus; so is any v4 or v5p slice of whole 4 x 4 x 4 cubes.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that share an interconnect: their number, arrangement "4x4", and which of its axes close to a ring."""

    name: str
    chip: Chip
    chips: int
    arrangement: str
    wrap: tuple[bool, bool, bool]


def find(name: str) -> Slice:
    """The slice that `name` means: "v5e-64" and "v6e-64" are 64 chips, "v5p-64" and "v4-64" are 64 cores, which are 32 chips.

    Raises:
        UserError: no such generation, or no slice of that size.
    """
    match = re.fullmatch(r"(\w+)-(\d+)", name)
    chip = CHIPS.get(match[1]) if match else None
    if match is None or chip is None:
        raise UserError(
            f"topology {name!r} is unknown: write GENERATION-SIZE, v5e-64 say; generations are {', '.join(CHIPS)}."
        )
    shapes = _FLAT if chip.cores == 1 else _CUBES
    count, rest = divmod(int(match[2]), chip.cores)
    if rest or count not in shapes:
        sizes = ", ".join(str(size * chip.cores) for size in shapes)
        raise UserError(f"there is no {name}: {chip.generation} has slices of {sizes}.")
    extents = [int(n) for n in shapes[count].split("x")]
    closed = count == 256 if chip.cores == 1 else all(n % 4 == 0 for n in extents)
    wrap = tuple(closed and n > 1 for n in [*extents, 1][:3])
    assert math.prod(extents) == count
    return Slice(name, chip, count, shapes[count], (wrap[0], wrap[1], wrap[2]))
