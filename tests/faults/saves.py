"""What checkpoints cost: resident memory from the tenth to the fiftieth, and wall time with one every thirty seconds beside none.

    python -m tests.faults.saves --rounds=3 --json=saves.json

Trains the demo's language model on a small phantom, each run a process of its own; runs with and without checkpoints take turns. Nothing else
should be running. The JSON has rss_mib (by number of the save), rss_growth_mib (the least of the last five saves less that of the tenth and the
four after it), with_s and without_s (seconds that steps, data and saving took, of every round), saves (written in a run) and wall_growth (of the
medians, a share).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from rad_jax import metrics

ROOT = Path(__file__).resolve().parents[2]
SAVES = 50
MINUTES = 0.5
NEVER = 10**6  # steps


def training(corpus: Path, workdir: Path, steps: int, *settings: str) -> subprocess.Popen[bytes]:
    """Starts a run of so many steps."""
    command = [sys.executable, "-m", "launch.train", "--config=configs/phantom.py:lm", f"--data={corpus}"]
    command += [f"--workdir={workdir}", f"--config.steps={steps}", "--config.log_every=5", *settings]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with workdir.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen[bytes], workdir: Path) -> None:
    if process.wait(timeout=1800):
        sys.exit(f"a run ended with {process.returncode}:\n{workdir.with_suffix('.log').read_text()[-2000:]}")


def memory(corpus: Path, folder: Path, every: int = 5) -> dict[int, float]:
    """Resident MiB of a run when it has written so many checkpoints, from the tenth on."""
    workdir, found = folder / "memory", dict[int, float]()
    process = training(corpus, workdir, every * SAVES, f"--config.checkpoint_every={every}")
    page, status = os.sysconf("SC_PAGE_SIZE"), Path(f"/proc/{process.pid}/statm")
    while process.poll() is None:
        saved = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
        number = max(saved, default=0) // every
        if number >= 10:
            found[number] = int((status.read_text().split() or ["0", "0"])[1]) * page / 2**20 or found.get(number, 0.0)
        time.sleep(0.05)
    finished(process, workdir)
    return found


def seconds(corpus: Path, workdir: Path, steps: int, minutes: float) -> tuple[float, int]:
    """What a run's steps took with what lay between them, and how many checkpoints it wrote before the last step."""
    finished(
        training(
            corpus, workdir, steps, f"--config.checkpoint_minutes={minutes}", f"--config.checkpoint_every={NEVER}"
        ),
        workdir,
    )
    phases = metrics.lines(workdir / "starts.jsonl")[-1]["phases"]
    saves = sum(row["save_s"] > 0 for row in metrics.read(workdir))
    return phases["learn"] + phases["data"] + phases["save"], saves


def measure(rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """All of it, in `folder`."""
    from data import packing

    corpus = folder / "corpus"
    arguments = packing.Arguments("phantom", None, image_size=32, studies=400, seed=0, tokenizer=None, vocab_size=1024)
    packing.pack(arguments, corpus, workers=1, progress=False)
    resident = memory(corpus, folder)
    times: dict[float, list[float]] = {MINUTES: [], 0.0: []}
    written = 0
    for number in range(rounds):
        for minutes in sorted(times, reverse=bool(number % 2)):
            took, saves = seconds(corpus, folder / f"{number}-{minutes}", steps, minutes)
            times[minutes].append(took)
            written = max(written, saves)
            print(f"round {number + 1}: {'with' if minutes else 'without'} checkpoints {took:.1f} s", flush=True)
    middle = {minutes: statistics.median(found) for minutes, found in times.items()}
    numbers = sorted(resident)
    first, last = numbers[:5], numbers[-5:]  # a save in progress holds a copy, so the least of a few counts
    return {
        "rss_mib": {str(number): round(value, 1) for number, value in sorted(resident.items())},
        "rss_growth_mib": round(min(resident[n] for n in last) - min(resident[n] for n in first), 1),
        "with_s": times[MINUTES],
        "without_s": times[0.0],
        "saves": written,
        "wall_growth": middle[MINUTES] / middle[0.0] - 1,
    }


_ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs with and without checkpoints.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 500, "Of each of these runs.", lower_bound=10)
_JSON = flags.DEFINE_string("json", None, "File for the result.")


def main(_: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(_ROUNDS.value, _STEPS.value, Path(folder))
    text = json.dumps(found, indent=1)
    print(text)
    if _JSON.value:
        Path(_JSON.value).write_text(text + "\n")


if __name__ == "__main__":
    app.run(main)
