"""Interrupts a training again and again, at random points, and looks whether it ends as one that was never interrupted.

    python -m tests.faults.campaign --kills=30 --terms=10 --processes=1,2 --seed=0 --json=campaign.json

Trains the demo's language model on a small phantom, with a checkpoint every four steps. Each start is ended by SIGKILL or SIGTERM to one
of its processes, while it starts, compiles, waits for data, computes, saves or evaluates, and started again by the same command; a run
that gets to its end begins anew until all faults are used. Every line of metrics.jsonl must have, to the bit, the loss of the undisturbed
run on the same mesh, and the rows of the batches that count must be the same: none lost, none twice.

Exit status 1: something differs, or a process ended in another way than it should. The JSON has kills, terms, bit_equal, lost_records,
repeated_records, sigterm_to_exit_s (the longest; all in sigterm_to_exit_all_s) and what was hit where.
"""

import collections
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from rad_jax import distributed, metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY, ROWS = 24, 4, 8

# Runs a command that notes each step's rows, and sends itself a signal so long after it has entered a phase for the n-th time.
PROCESS = """
import json, os, runpy, sys, threading, time, types
from pathlib import Path
from rad_jax import goodput
from tests import noting

noting.rows_of_steps(Path(sys.argv[2]))
fault, sys.argv = json.loads(sys.argv[1]), sys.argv[3:]
switch, left = goodput.Phases._switch, fault.get("times", 0)

def hit():
    with open(fault["file"], "w") as file:
        file.write(repr(time.time()))
    os.kill(os.getpid(), fault["signal"])

def switched(self, name):
    global left
    if left and name == fault["phase"] and name != self._now:
        left -= 1
        if not left:
            threading.Timer(fault["delay"], hit).start()
    return switch(self, name)

class Development:  # a language model alone writes no findings; here it matters only that this takes its time, and asks whether to stop
    def __init__(self, *_):
        pass

    def __call__(self, trainable, frozen, stopped):
        for _ in range(10):
            if stopped():
                return None
            time.sleep(0.03)
        return {"metric": "none", "value": 0.0, "low": 0.0, "high": 0.0}

sys.modules["evaluation.development"] = types.ModuleType("evaluation.development")
sys.modules["evaluation.development"].Development = Development
goodput.Phases._switch = switched
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
# Phase, how often it is entered before, and within how many seconds after; "data" reaches into the step that follows it.
PHASES = {"start": (1, 0.5), "compile": (1, 0.5), "data": (9, 0.1), "save": (2, 0.15), "evaluate": (2, 0.4)}


class Campaign:
    """One number of processes: an undisturbed run, and runs with faults."""

    def __init__(self, folder: Path, corpus: Path, processes: int, rng: random.Random):
        self._folder, self._corpus, self._processes, self._rng = folder, corpus, processes, rng
        self.seconds: list[float] = []
        self.hit: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        folder.mkdir(parents=True)

    def run(self, faults: Sequence[int]) -> dict[str, Any]:
        """Uses these signals up, in this order, and compares."""
        whole = self._folder / "whole"
        self._start(whole, None)
        runs, left = [whole], list(faults)
        while left:
            workdir = self._folder / f"run{len(runs)}"
            runs.append(workdir)
            finished = False
            while not finished:
                finished = self._start(workdir, left[0] if left else None)
                left = left[1:] if left and not finished else left
                print(f"{self._processes} processes: {len(left)} faults left", flush=True)
        found = [self._compare(whole, run) for run in runs[1:]]
        self.wrong += [f"{run.name}: a checkpoint was put aside" for run in runs if (run / "damaged").exists()]
        return {
            "bit_equal": all(equal for equal, _, _ in found),
            "lost_records": sum(lost for _, lost, _ in found),
            "repeated_records": sum(repeated for _, _, repeated in found),
            "rows_compared": STEPS * ROWS * len(found),
        }

    def _start(self, workdir: Path, number: int | None) -> bool:
        """One start of all processes; whether the run is finished."""
        fault: dict[str, Any] = {}
        victim, when = self._rng.randrange(self._processes), self._folder / "hit"
        when.unlink(missing_ok=True)
        if number is not None:
            phase = self._rng.choice(list(PHASES))
            times, delay = PHASES[phase]
            fault = {"signal": number, "phase": phase, "file": str(when), "delay": self._rng.uniform(0, delay)}
            fault["times"] = self._rng.randint(1, times)
        job = [self._process(workdir, index, fault if index == victim else {}) for index in range(self._processes)]
        statuses = [process.wait(timeout=900) for process in job]
        ended = time.time()
        if all(status == 0 for status in statuses):  # the fault came too late, or there was none
            return True
        self.hit[f"{signal.Signals(number).name if number else 'nothing'} in {fault.get('phase')}"] += 1
        if number == signal.SIGTERM:
            self.seconds.append(ended - float(when.read_text()))
            fine = all(status == distributed.RESTART for status in statuses)
        else:
            others = {distributed.RESTART, -signal.SIGABRT}
            fine = statuses[victim] == -signal.SIGKILL and {*statuses[:victim], *statuses[victim + 1 :]} <= others
        if not fine:
            self.wrong.append(f"{fault}: ended with {statuses}")
            logs = [self._folder / f"{workdir.name}-{index}.log" for index in range(self._processes)]
            print(self.wrong[-1], *(log.read_text()[-2000:] for log in logs), sep="\n")
        return False

    def _process(self, workdir: Path, index: int, fault: dict[str, Any]) -> Any:
        port = self._port if index else self._free_port()
        several = ["--multihost", f"--coordinator=localhost:{port}", f"--num_processes={self._processes}"]
        command = [
            *("--config=configs/phantom.py:lm", f"--data={self._corpus}", f"--workdir={workdir}"),
            *(f"--config.steps={STEPS}", f"--config.checkpoint_every={EVERY}", f"--config.batch_size={ROWS}"),
            *("--config.log_every=1", "--config.evaluate.every=10", f"--config.mesh.data={self._processes}"),
            "--config.data.text_length=64",
            # Of rows so short many hold no word that is learned.
            *("--config.data.target_length=48", "--config.checkpoint_minutes=0", "--bad_rows=1"),
            *([*several, f"--process_id={index}"] if self._processes > 1 else []),
        ]
        # Compiling takes far longer than running, so it may do without polishing the code.
        quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {quickly}",
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        notes = self._folder / f"{workdir.name}-{index}.jsonl"
        with notes.with_suffix(".log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-c", PROCESS, json.dumps(fault), str(notes), "launch.train", *command],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _free_port(self) -> int:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self._port: int = free.getsockname()[1]
        return self._port

    def _compare(self, whole: Path, run: Path) -> tuple[bool, int, int]:
        """Whether all losses ever logged are those of the whole run, and how many rows of it are missing and too many."""
        expected = {row["step"]: row["loss"] for row in metrics.read(whole)}
        logged = metrics.lines(run / "metrics.jsonl")
        equal = all(row["loss"] == expected[row["step"]] for row in logged)
        equal &= {row["step"] for row in logged} == set(range(1, STEPS + 1))
        mine, theirs = self._rows(run), self._rows(whole)
        return equal, (theirs - mine).total(), (mine - theirs).total()

    def _rows(self, workdir: Path) -> collections.Counter[tuple[int, int]]:
        """Rows of the batches that count, by step: of a step done several times the last."""
        found: collections.Counter[tuple[int, int]] = collections.Counter()
        for index in range(self._processes):
            last = {row["step"]: row["rows"] for row in metrics.lines(self._folder / f"{workdir.name}-{index}.jsonl")}
            found.update((step, number) for step, numbers in last.items() for number in numbers)
        return found


def campaign(kills: int, terms: int, processes: Sequence[int], seed: int, folder: Path) -> dict[str, Any]:
    """The whole of it, in `folder`; faults are dealt out to the numbers of processes in turn."""
    from data import packing

    corpus, rng = folder / "corpus", random.Random(seed)
    arguments = packing.Arguments("phantom", None, image_size=32, studies=40, seed=0, tokenizer=None, vocab_size=512)
    packing.pack(arguments, corpus, workers=1, progress=False)
    faults = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    rng.shuffle(faults)
    found, seconds, hit, wrong = [], [], collections.Counter[str](), []
    for place, number in enumerate(processes):
        part = Campaign(folder / f"processes{number}", corpus, number, rng)
        found.append(part.run(faults[place :: len(processes)]))
        seconds += part.seconds
        hit.update({f"{where}, {number} processes": count for where, count in part.hit.items()})
        wrong += part.wrong
    return {
        "kills": sum(count for where, count in hit.items() if where.startswith("SIGKILL")),
        "terms": sum(count for where, count in hit.items() if where.startswith("SIGTERM")),
        "processes": list(processes),
        "seed": seed,
        "bit_equal": all(part["bit_equal"] for part in found),
        **{key: sum(part[key] for part in found) for key in ("lost_records", "repeated_records", "rows_compared")},
        "sigterm_to_exit_s": max(seconds, default=0.0),
        "sigterm_to_exit_median_s": statistics.median(seconds) if seconds else 0.0,
        "sigterm_to_exit_all_s": [round(value, 2) for value in seconds],
        "hit": dict(sorted(hit.items())),
        "wrong": wrong,
    }


def main(_: Sequence[str]) -> int:
    options = flags.FLAGS
    folder = Path(tempfile.mkdtemp(prefix="campaign"))
    try:
        found = campaign(options.kills, options.terms, [int(n) for n in options.processes], options.seed, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["wrong"] or found["lost_records"] or found["repeated_records"] or not found["bit_equal"]))


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 30, "SIGKILLs.", lower_bound=0)
    flags.DEFINE_integer("terms", 10, "SIGTERMs.", lower_bound=0)
    flags.DEFINE_list("processes", ["1", "2"], "Numbers of processes of a job.")
    flags.DEFINE_integer("seed", 0, "Of the points that are hit.")
    flags.DEFINE_string("json", None, "File for the figures.")
    app.run(main)
