"""A run's numbers: one JSON line per logged step, a progress bar for people, and the loss curve as a picture."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Writes metrics.jsonl, and shows a bar on a terminal or plain lines elsewhere. Only process 0 writes and shows."""

    def __init__(self, workdir: Path, steps: int, start: int, name: str, active: bool):
        self._file = _append(workdir / "metrics.jsonl") if active else None
        self._lines = active and not sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=start, desc=name, unit="step", disable=not active or self._lines, dynamic_ncols=True
        )
        self._steps, self._name = steps, name

    def step(self) -> None:
        self._bar.update()

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends a row; shows loss, step time, tokens per second and the time left."""
        if self._file is None:
            return
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()
        shown = f"loss {row['loss']:.4f}, {row['step_time_s'] * 1e3:.0f} ms/step, {row['tokens_per_s']:,.0f} tokens/s"
        self._bar.set_postfix_str(shown)
        if self._lines:
            left = (self._steps - row["step"]) * row["step_time_s"]
            print(
                f"{self._name}: step {row['step']}/{self._steps}, {shown}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()


def _append(file: Path) -> TextIO:
    """Opens to append, after the last whole line: a full disk or a kill may have left half of one."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return file.open("a")


def read(workdir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; of a step that was logged twice (before and after a resume) the later one."""
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return list({row["step"]: row for row in rows}.values())


def plot(workdir: Path) -> None:
    """Draws WORKDIR/loss.png: training loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(workdir)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    axes.set(xlabel="step", ylabel="training loss", title=workdir.name)
    axes.grid(alpha=0.3)
    figure.savefig(workdir / "loss.png", dpi=120)
    plt.close(figure)
