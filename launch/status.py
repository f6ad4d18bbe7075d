"""What a run is doing: its state, curves, what is left, what it cost, and where its time went. Reads its folder alone.

    python -m launch.status out/demo/stage3
    python -m launch.status RUN --png=curves.png --price=1.2

Cost is in chip-hours, of all starts together; --price is of one. Goodput is the time of steps that count by all the time since the first
start, machines' absence included.
"""

import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rad_jax import errors
from rad_jax.errors import UserError

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60
CURVES = ("loss", "grad_norm", "lr", "tokens_per_s")


def main(argv: Sequence[str]) -> None:
    from rad_jax import history

    options = flags.FLAGS
    if len(argv) != 2:
        raise UserError("give a run's folder: python -m launch.status WORKDIR")
    found = history.read(Path(argv[1]))
    print(page(found, options.price))
    if options.png:
        draw(found, Path(options.png))
        print(f"\nwritten: {options.png}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures(found), indent=1) + "\n")


def page(found: Any, price: float | None) -> str:
    """All of it, for people."""
    lines = [f"{found.workdir}: {_state(found)}", f"step        {found.step:,} of {found.steps:,}"]
    if not found.rows:
        return "\n".join([*lines, "nothing is logged yet"])
    row = found.rows[-1]
    seconds, hours = found.left()
    for name in CURVES:
        values = [each[name] for each in found.rows]
        lines.append(f"{name:14}{spark(values)}  {values[0]:.4g} to {values[-1]:.4g}")
    if found.evaluations:
        values = [each["value"] for each in found.evaluations]
        lines.append(f"{found.evaluations[-1]['metric']:14}{spark(values)}  {values[0]:.4g} to {values[-1]:.4g}")
    if found.best:
        best = found.best
        interval = f"[{best['low']:.4f}, {best['high']:.4f}]"
        lines.append(f"best        {best['metric']} {best['value']:.4f} {interval} at step {best['step']:,}")
    lines.append(f"speed       {row['step_time_s']:.3f} s a step, {row['tokens_per_s_per_chip']:,.0f} tokens/s a chip")
    if "lora_mfu" in row:
        lines.append(
            f"utilisation {row['lora_mfu']:.1%} (needed FLOPs: 4 N for frozen weights), {row['mfu_6n']:.1%} (6 N)"
        )
    if "hbm_peak_gib" in row:
        lines.append(f"memory      {row['hbm_peak_gib']:.2f} GiB at the peak")
    split = found.split()
    total = max(sum(split.values()), 1e-9)
    parts = ", ".join(f"{name} {value / total:.1%}" for name, value in split.items() if value / total >= 5e-4)
    lines.append(f"goodput     {found.goodput:.1%} of {_span(total)} in {len(found.starts)} starts: {parts}")
    if found.state != "finished":
        lines.append(
            f"left        {_span(seconds)}, until {time.strftime('%F %R', time.localtime(found.now + seconds))}"
        )
    cost = f"{found.chip_hours:.2f} chip-hours so far, {found.chip_hours + hours:.2f} in the end"
    if price is not None:
        cost += f"; {price * found.chip_hours:.2f} so far, {price * (found.chip_hours + hours):.2f} in the end"
    lines.append(f"cost        {cost}")
    notes = {
        "skipped steps": row["skipped"],
        "loss spikes": row.get("spikes", 0),
        "recompiles": row["recompiles"],
        "rows without weight": row["bad_rows"],
    }
    lines.append("noted       " + ", ".join(f"{value} {name}" for name, value in notes.items()))
    return "\n".join(lines)


def figures(found: Any) -> dict[str, Any]:
    """The same as JSON can hold it."""
    seconds, hours = found.left()
    return {
        "state": found.state,
        "step": found.step,
        "steps": found.steps,
        "starts": len(found.starts),
        "last": found.rows[-1] if found.rows else None,
        "best": found.best,
        "goodput": found.goodput,
        "seconds": found.split(),
        "left_s": seconds,
        "chip_hours": found.chip_hours,
        "chip_hours_in_the_end": found.chip_hours + hours,
    }


def _state(found: Any) -> str:
    if found.state == "running":
        last = found.rows[-1]["time"] if found.rows else found.starts[-1].event["time"] if found.starts else found.now
        return f"running, {found.holder}; the last sign {_span(found.now - last)} ago"
    if found.state == "finished":
        return "finished"
    return f"{found.state} at step {found.step:,}: start it again with the same command to go on"


def spark(values: Sequence[float]) -> str:
    """A curve in one line of at most `_WIDTH` characters; each is the mean of the numbers that fall into it, "×" where there are none."""
    width = min(_WIDTH, len(values))
    cuts = [round(place * len(values) / width) for place in range(width + 1)]
    parts = [[value for value in values[a:b] if math.isfinite(value)] for a, b in itertools.pairwise(cuts)]
    means = [sum(part) / len(part) if part else math.nan for part in parts]
    known = [value for value in means if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((v - low) * scale)] if math.isfinite(v) else "×" for v in means).ljust(width)


def _span(seconds: float) -> str:
    """ "2 h 05 min"."""
    minutes, hours = divmod(int(seconds) // 60, 60)[1], int(seconds) // 3600
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {int(seconds) % 60:02d} s"
        if minutes
        else f"{seconds:.0f} s"
    )


def draw(found: Any, file: Path) -> None:
    """The curves as a picture, evaluations with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [*CURVES, *(["evaluation"] if found.evaluations else [])]
    figure, all_axes = plt.subplots(
        len(names), 1, figsize=(8, 2.2 * len(names)), sharex=True, layout="constrained", squeeze=False
    )
    for name, axes in zip(names, all_axes[:, 0], strict=True):
        axes.grid(alpha=0.3)
        if name != "evaluation":
            axes.plot([row["step"] for row in found.rows], [row[name] for row in found.rows])
            axes.set_ylabel(name)
            continue
        rows = found.evaluations
        ends = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
        axes.errorbar([row["step"] for row in rows], [row["value"] for row in rows], yerr=ends, marker="o", capsize=3)
        axes.set_ylabel(rows[-1]["metric"])
    all_axes[-1, 0].set_xlabel("step")
    figure.suptitle(found.workdir.name)
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    flags.DEFINE_string("png", None, "File for the curves.")
    flags.DEFINE_string("json", None, "File for the figures.")
    flags.DEFINE_float("price", None, "Of a chip-hour, in any currency.", lower_bound=0)
    errors.run(main, positional=True)
