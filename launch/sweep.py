"""Ablations: trains every arm of a sweep with every seed, writes findings, scores them, and ends in one table and one picture.

    python -m launch.sweep --sweep=configs/sweeps/phantom.py --out=out/ablations
    python -m launch.sweep --sweep=configs/sweeps/phantom.py:tiny --out=out/tiny
    python -m launch.sweep --sweep=configs/sweeps/paper.py:v5e-64 --corpora=all=/mnt/rad/corpus,... --given=/mnt/rad/bases \\
        --out=/mnt/rad/ablations --via="python -m launch.pod run --where=tpu-vm --machine=v5e-64 --zone=ZONE --bucket=BUCKET --"

A stage that several arms share is trained once per seed. The same command again goes on where it stopped: finished steps are in
OUT/steps.json, and a training that was interrupted goes on from its checkpoint. --dry_run prints every command. With --via the commands run
elsewhere, in folders that are seen here too.

It writes OUT/table.md, OUT/arms.json and OUT/arms.png. An interval holds the spread over patients and over seeds; an arm is called better or
worse than the first only where their intervals do not touch.
"""

import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from rad_jax import distributed, errors
from rad_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of launch/, under a name that changes with all that it depends on."""

    name: str
    command: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All steps in order, and the file that each arm's seeds write."""

    steps: list[Step]
    predictions: dict[str, list[Path]]
    corpus: Path


def plan(sweep: Any, out: Path, given: Path, corpora: Mapping[str, Path]) -> Plan:
    """What a sweep has to do.

    Args:
        sweep: corpora, stages, arms, seeds and generate, as configs/sweeps/phantom.py says them.
        out: where runs go. given: what "given/" stands for. corpora: packed ones by name; others are packed here.

    Raises:
        UserError: a corpus is neither given nor can be packed.
    """
    steps: dict[str, Step] = {}
    places = dict(corpora)
    for name, packing in sweep.corpora:
        if name not in places:
            if not packing:
                raise UserError(f"--corpora has no {name}: give {name}=FOLDER, a packed corpus.")
            places[name] = out / "data" / name
            _add(steps, f"pack {name}", ("launch.pack", *packing, f"--out={places[name]}"))
    first = sweep.corpora[0][0]
    predictions: dict[str, list[Path]] = {}
    for arm, changes in sweep.arms:
        for seed in sweep.seeds:
            data = places[changes.get("data", first)]
            run = _stages(steps, sweep, changes, seed, data, out, given)
            file = run.with_suffix(".jsonl")
            command = ("launch.generate", f"--checkpoint={run}", f"--data={data}", f"--out={file}", *sweep.generate)
            _add(steps, f"generate {run.name}", command)
            predictions.setdefault(arm, []).append(file)
    return Plan(list(steps.values()), predictions, places[first])


def _stages(steps: dict[str, Step], sweep: Any, changes: Any, seed: int, data: Path, out: Path, given: Path) -> Path:
    """The stages of one arm and seed; returns the last one's run. Equal commands on equal bases have the same folder."""
    runs: dict[str, Path] = {}
    for stage, usual, under, common in sweep.stages:
        bases = [
            str(given / base.removeprefix("given/")) if base.startswith("given/") else str(runs[base])
            for base in changes.get("bases", {}).get(stage, under)
        ]
        config = changes.get("configs", {}).get(stage, usual)
        words = [f"--config={config}", f"--data={data}", f"--config.seed={seed}", *common, *changes.get(stage, ())]
        words += ["--base=" + ",".join(bases)] if bases else []
        runs[stage] = out / "runs" / f"{stage}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:10]}"
        _add(steps, f"train {runs[stage].name}", ("launch.train", *words, f"--workdir={runs[stage]}"))
    return runs[stage]


def _add(steps: dict[str, Step], name: str, command: Sequence[str]) -> None:
    steps.setdefault(name, Step(name, tuple(command)))


class Done:
    """OUT/steps.json: finished commands and the seconds they took."""

    def __init__(self, out: Path):
        self._file = out / "steps.json"
        self._known: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def __contains__(self, step: Step) -> bool:
        return self._known.get(step.name, {}).get("command") == list(step.command)

    def add(self, step: Step, seconds: float) -> None:
        self._known[step.name] = {"command": list(step.command), "seconds": seconds}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        whole = self._file.with_suffix(".whole")
        whole.write_text(json.dumps(self._known, indent=1) + "\n")
        whole.replace(self._file)


def execute(steps: Sequence[Step], done: Done, via: Sequence[str], dry: bool) -> int:
    """Runs what is not done, in order; a training that is told to restart is. Returns the first other status than 0."""
    from launch.demo import KEEP_MEMORY

    for number, step in enumerate(steps, 1):
        command = [*via, *step.command]
        if step in done:
            continue
        print(f"== {number} of {len(steps)}, {step.name}: {shlex.join(command)}", flush=True)
        status, began = 0 if dry else distributed.RESTART, time.time()
        while status == distributed.RESTART:
            status = subprocess.run(command, env=KEEP_MEMORY | dict(os.environ)).returncode
        if status:
            print(f"error: this command ended with status {status}; what was finished is kept.", file=sys.stderr)
            return status
        if not dry:
            done.add(step, time.time() - began)
    return 0


def finish(found: Plan, metrics: Sequence[str], out: Path) -> str:
    """Scores all arms and writes the table, the figures and the picture; returns the table."""
    from data.phantom.parser import parse
    from evaluation import corpus as corpora
    from evaluation import report, sweeps
    from evaluation.predictions import read_predictions
    from rad_jax.corpus import Corpus

    corpus = Corpus.open(found.corpus)
    ids = {row.id for paths in found.predictions.values() for path in paths for row in read_predictions(path).rows}
    studies = corpora.studies_of(corpus, corpora.records_of(corpus, ids))
    scores = sweeps.compare(found.predictions, metrics, report.Options(studies=studies, parse=parse))
    text = sweeps.table(scores)
    (out / "table.md").write_text(text)
    (out / "arms.json").write_text(json.dumps([dataclasses.asdict(score) for score in scores], indent=1) + "\n")
    sweeps.draw(scores, out / "arms.png")
    return text


def main(_: Sequence[str]) -> int:
    options = flags.FLAGS
    sweep, out = options.sweep, Path(options.out)
    corpora = dict(pair.split("=", 1) for pair in options.corpora if "=" in pair)
    found = plan(sweep, out, Path(options.given), {name: Path(path) for name, path in corpora.items()})
    via = shlex.split(options.via) if options.via else [sys.executable, "-m"]
    if status := execute(found.steps, Done(out), via, options.dry_run):
        return status
    if not options.dry_run:
        print(f"\n{finish(found, sweep.metrics, out)}\nwritten: {out}/{{table.md,arms.json,arms.png}}")
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("sweep", None, "As configs/sweeps/phantom.py.")
    flags.mark_flag_as_required("sweep")
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_list("corpora", [], "Packed corpora, NAME=FOLDER, instead of packing them.")
    flags.DEFINE_string("given", "out/given", "Folder of converted bases that a sweep names given/NAME.")
    flags.DEFINE_string("via", "", "Words before every command, instead of this Python's -m.")
    flags.DEFINE_boolean("dry_run", False, "Print every command, run none.")
    errors.run(main)
