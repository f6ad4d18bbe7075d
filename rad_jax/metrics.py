"""A run's numbers: one JSON line per logged step, a progress bar for people, and the loss curve as a picture."""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from rad_jax.errors import UserError


class Progress:
    """Writes metrics.jsonl, and shows a bar on a terminal or plain lines elsewhere. Only process 0 writes and shows.

    The file is closed after every row: a bucket that is mounted gets what is written no earlier.
    """

    def __init__(self, workdir: Path, steps: int, start: int, name: str, active: bool):
        self._file = workdir / "metrics.jsonl" if active else None
        if self._file is not None:
            _mend(self._file)
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
        with _opened(self._file) as file:
            file.write(json.dumps(dict(row)) + "\n")
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


def _mend(file: Path) -> None:
    """Cuts a file after its last whole line: a full disk or a kill may have left half of one."""
    if file.exists():
        text = file.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole != len(text):
            os.truncate(file, whole)


def _opened(file: Path) -> TextIO:
    return file.open("a")


def append(file: Path, row: Mapping[str, Any]) -> None:
    """Adds one JSON line to a file of few lines."""
    _mend(file)
    with _opened(file) as opened:
        opened.write(json.dumps(dict(row)) + "\n")


def event(workdir: Path, row: Mapping[str, Any]) -> None:
    """A line of starts.jsonl, with the time: a process has started, or ended in order. Written by process 0."""
    append(workdir / "starts.jsonl", {"time": time.time(), **row})


def lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; none where there is no file."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read(workdir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; of a step that was logged twice (before and after a resume) the later one."""
    return list({row["step"]: row for row in lines(workdir / "metrics.jsonl")}.values())


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


def tensorboard(workdir: Path) -> Callable[[Mapping[str, Any]], None]:
    """Writes rows for TensorBoard under WORKDIR/tensorboard.

    Raises:
        UserError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs a package that is not here: pip install tensorboardX, or leave it out."
        ) from None
    writer = SummaryWriter(str(workdir / "tensorboard"))

    def write(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def wandb(workdir: Path, project: str) -> Callable[[Mapping[str, Any]], None]:
    """Sends rows to Weights & Biases; restarts of a run go on in the same one there, whose id is in WORKDIR/wandb_id.

    Where it cannot be reached this is said, and nothing is sent.

    Raises:
        UserError: wandb is not installed.
    """
    try:
        import wandb as client
    except ImportError:
        raise UserError("--wandb needs a package that is not here: pip install wandb, or leave it out.") from None
    file = workdir / "wandb_id"
    if not file.exists():
        file.write_text(f"{uuid.uuid4().hex}\n")
    try:
        run = client.init(
            project=project, name=workdir.name, id=file.read_text().strip(), resume="allow", dir=str(workdir)
        )
    except Exception as error:  # of its own kinds: no login, no network, a server that fails
        dropped("Weights & Biases", error)
        return lambda row: None
    return _Wandb(run)


class _Wandb:
    """Named, for the message that it fails."""

    name = "Weights & Biases"

    def __init__(self, run: Any):
        self._run = run

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row), step=row["step"])


def dropped(name: str, error: Exception) -> None:
    """Says that rows go there no longer."""
    why = " ".join(str(error).split()) or type(error).__name__
    tqdm.write(f"note: {name} gets no rows ({why}); training goes on, metrics.jsonl has them all.", file=sys.stderr)
    sys.stderr.flush()
