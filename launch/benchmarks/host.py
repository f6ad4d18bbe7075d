"""What a host of a TPU pod must feed, beside what a core of this machine can: is the host a bottleneck?"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rad_jax import chips
from rad_jax.errors import UserError

# FLOPs of one row: a tower of ViT-B/14 at 518 pixels with BERT-base at 256 tokens, forward and backward; and Vicuna-7B's 4 N (its
# weights are frozen) at 1600 tokens.
FLOPS = {"stage 1": 1.05e12, "stage 2": 4 * 7e9 * 1600, "stage 3": 4 * 7e9 * 1600}
UTILISATION = 0.5  # of the chips' peak: more than is likely, so that the host is asked for more than it will be
CHIPS_PER_HOST, CORES_PER_HOST = 4, 112  # of v5e, by the vendor's table
MACHINES = ("v5e-64", "v5e-256")


def demand(cpu: Mapping[str, float], compiled: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Images a second that each host must feed, and the cores it takes.

    Args:
        cpu: CPU seconds of an image of each stage's batches, on one core of this machine.
        compiled: files that `launch.compile --json` wrote, whose step times are used besides; the dearest of the stages is assumed.

    Returns:
        Rows of name, images_per_s_per_host, cores_needed, cores, bottleneck.

    Raises:
        UserError: a file is not one of those.
    """
    rows = []
    for machine in MACHINES:
        place = chips.find(machine)
        for stage, flops in FLOPS.items():
            rate = UTILISATION * place.chip.peak / flops * CHIPS_PER_HOST
            rows.append(row(f"{stage}, {machine} at {UTILISATION:.0%} of peak", rate, cpu[stage]))
    for path in compiled:
        try:
            found = json.loads(path.read_text())
            rate = found["global_batch"] / found["predicted_step_s"] / found["chips"] * CHIPS_PER_HOST
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: is not what launch.compile --json writes of one program.") from error
        rows.append(row(f"{path.name}: {found['topology']}, compiled", rate, max(cpu.values())))
    return rows


def row(name: str, rate: float, cpu: float) -> dict[str, Any]:
    """A line of the table."""
    return {
        "name": name,
        "images_per_s_per_host": rate,
        "cpu_s_per_image": cpu,
        "cores_needed": rate * cpu,
        "cores": CORES_PER_HOST,
        "bottleneck": rate * cpu > CORES_PER_HOST,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows for people; a core of the host is taken to be as fast as one of this machine."""
    print(f"\n{'what a host must feed':44}{'images/s':>10}{'CPU ms each':>13}{'cores needed':>14}{'of':>5}  bottleneck")
    for r in rows:
        print(
            f"{r['name']:44}{r['images_per_s_per_host']:10.1f}{1e3 * r['cpu_s_per_image']:13.2f}{r['cores_needed']:14.2f}"
            f"{r['cores']:5}  {'yes' if r['bottleneck'] else 'no'}"
        )
