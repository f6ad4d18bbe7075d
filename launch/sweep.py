"""Ablations: trains every arm of a sweep with every seed, writes findings, scores them, and ends in one table and one picture.

    python -m launch.sweep --sweep=configs/sweeps/phantom.py --out=out/ablations
    python -m launch.sweep --sweep=configs/sweeps/phantom.py:tiny --out=out/tiny
    python -m launch.sweep --sweep=configs/sweeps/paper.py:v5e-64 --corpora=films=/mnt/rad/films,... --given=/mnt/rad/bases \\
        --out=/mnt/rad/ablations --via="python -m launch.pod run --where=tpu-vm --machine=v5e-64 --zone=ZONE --bucket=BUCKET --"

A stage that several arms share is trained once, and once per seed where the sweep says that seeds change it. The same command again goes on
where it stopped: finished steps are in OUT/steps.json, and a training that was interrupted goes on from its checkpoint. Told to stop
(SIGTERM), it hands that on to the running command, which saves, and ends with status 42. --dry_run prints every command, and how long all
of them may take. With --via the commands run elsewhere, in folders that are seen here too; corpora are packed here.

When a command fails, what needs it is left out, the other arms go on, and what failed is listed at the end, with exit status 1; the same
command again tries it again. Before anything is run every command's config is made, and bases and corpora that are missing are named.

It writes OUT/table.md, OUT/arms.json and OUT/arms.png, of the arms whose every seed is there. An interval holds the spread over patients and
over seeds; an arm is called better or worse than the first only where their intervals do not touch.
"""

import dataclasses
import hashlib
import json
import os
import shlex
import signal
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
    """A command of launch/, under a name that changes with all that it depends on.

    Attributes:
        title: for people; of a step that arms share, the first arm's.
        needs: names of the steps that have to be finished before.
        kind: steps of one kind take seconds in proportion to `weight`, which foretells them where the sweep has figures.
    """

    name: str
    command: tuple[str, ...]
    title: str = ""
    needs: tuple[str, ...] = ()
    kind: str = ""
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """All steps in order, the last step and the file of each arm's seeds, the corpus that is scored on, and folders that have to be there."""

    steps: list[Step]
    last: dict[str, list[str]]
    predictions: dict[str, list[Path]]
    corpus: Path
    given: list[Path]


def plan(sweep: Any, out: Path, given: Path, corpora: Mapping[str, Path]) -> Plan:
    """What a sweep has to do.

    Args:
        sweep: corpora, stages, arms, seeds and so on, as configs/sweeps/phantom.py says them.
        out: where runs go. given: what "given/" stands for. corpora: packed ones by name; others are packed here.

    Raises:
        UserError: a corpus is neither given nor can be packed, or a command's config cannot be made.
    """
    planner = _Planner(sweep, out, given, corpora)
    first = planner.corpus(sweep.corpora[0][0])
    last: dict[str, list[str]] = {}
    predictions: dict[str, list[Path]] = {}
    for arm, changes in sweep.arms:
        for seed in sweep.seeds:
            step, file = planner.arm(arm, changes, seed)
            last.setdefault(arm, []).append(step)
            predictions.setdefault(arm, []).append(file)
    if planner.missing:
        raise UserError(f"--corpora lacks {'; '.join(planner.missing)}.")
    return Plan(list(planner.steps.values()), last, predictions, first, sorted(planner.given))


class _Planner:
    """Collects steps; one that is asked for again is the same."""

    def __init__(self, sweep: Any, out: Path, given: Path, corpora: Mapping[str, Path]):
        self._sweep, self._out, self._bases = sweep, out, given
        self._packed = dict(sweep.corpora)
        self._places = dict(corpora)
        self._makers: dict[Path, str] = {}  # folder -> the step that makes it
        self._seconds = sweep.get("seconds", {})
        self.steps: dict[str, Step] = {}
        self.missing: list[str] = []
        self.given: set[Path] = {place / "corpus.json" for place in corpora.values()}

    def corpus(self, name: str) -> Path:
        """The folder of a corpus; what packs it comes before whatever asks first."""
        if name not in self._places:
            packing = self._packed[name]
            if isinstance(packing, str):
                self.missing.append(f"{name}=FOLDER, {packing}")
                return self._places.setdefault(name, Path(name))
            # "{whole}" in a flag is the folder of another corpus.
            sources = {other: self.corpus(other) for other in self._packed if any(f"{{{other}" in w for w in packing)}
            self._places[name] = self._out / "data" / name
            words = [word.format(**sources) for word in packing]
            command = ("launch.pack", *words, f"--out={self._places[name]}")
            weight = self._seconds.get("mix" if sources else "pack", 1.0)
            self._add(f"pack {name}", command, self._places[name], "", sources.values(), "pack", weight)
        return self._places[name]

    def arm(self, arm: str, changes: Any, seed: int) -> tuple[str, Path]:
        """All steps of an arm with a seed; the name of the last one and the file it writes."""
        sweep, data = self._sweep, changes.get("data", {})
        runs: dict[str, Path] = {}
        for stage, usual, under, common, corpus in sweep.stages:
            own = seed if stage in sweep.seeded else sweep.seeds[0]
            bases = [self._base(base, runs) for base in changes.get("bases", {}).get(stage, under)]
            place = self.corpus(data.get(stage, corpus))
            config = changes.get("configs", {}).get(stage, usual)
            words = [f"--config={config}", f"--data={place}", f"--config.seed={own}", *common, *changes.get(stage, ())]
            words += ["--base=" + ",".join(map(str, bases))] if bases else []
            run = self._out / "runs" / f"{stage}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:10]}"
            title, steps = f"{arm}, seed {own}, {stage}", experiment(words).steps
            weight = self._seconds.get("start", 0.0) + steps * self._seconds.get(stage, 1.0)
            command = ("launch.train", *words, f"--workdir={run}")
            self._add(f"train {run.name}", command, run, title, (place, *bases), stage, weight)
            runs[stage] = run
        name, place = f"generate {run.name}", self.corpus(data.get("generate", sweep.corpora[0][0]))
        words = [f"--checkpoint={run}", f"--data={place}", *sweep.generate, *changes.get("generate", ())]
        file, weight = run.with_suffix(".jsonl"), self._seconds.get("generate", 1.0)
        title, command = f"{arm}, seed {seed}, findings", ("launch.generate", *words, f"--out={file}")
        self._add(name, command, file, title, (place, run), "generate", weight)
        return name, file

    def _base(self, name: str, runs: Mapping[str, Path]) -> Path:
        if not name.startswith("given/"):
            return runs[name]
        found = self._bases / name.removeprefix("given/")
        self.given.add(found / "config.json")
        return found

    def _add(
        self, name: str, command: Sequence[str], makes: Path, title: str, uses: Any, kind: str, weight: float
    ) -> None:
        needs = tuple(dict.fromkeys(self._makers[place] for place in uses if place in self._makers))
        self._makers[makes] = name
        self.steps.setdefault(name, Step(name, tuple(command), title or name, needs, kind, weight))


def experiment(words: Sequence[str]) -> Any:
    """The experiment that a command of launch.train describes.

    Raises:
        UserError: there is no such config, or none with these settings.
    """
    holder = flags.FlagValues()
    own = ["train", *(word for word in words if word.startswith(("--config=", "--config.")))]
    config_flags.DEFINE_config_file("config", flag_values=holder, sys_argv=own)
    try:
        holder(own)
    except Exception as error:  # besides absl's own, whatever the file named in --config raises
        raise UserError(f"{shlex.join(words)}: {errors.describe_flag_error(error)}") from error
    return holder.config


class Done:
    """OUT/steps.json: finished commands and the seconds they took."""

    def __init__(self, out: Path):
        self._file = out / "steps.json"
        self._known: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def __contains__(self, step: Step) -> bool:
        return self._known.get(step.name, {}).get("command") == list(step.command)

    def seconds(self, step: Step) -> float:
        """What a finished step took."""
        return self._known[step.name]["seconds"]

    def add(self, step: Step, seconds: float) -> None:
        self._known[step.name] = {"command": list(step.command), "seconds": seconds}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        whole = self._file.with_suffix(".whole")
        whole.write_text(json.dumps(self._known, indent=1) + "\n")
        whole.replace(self._file)


def left(steps: Sequence[Step], done: Done, foretold: bool) -> str:
    """How long the steps that are not done may take, as text.

    By what finished steps of the same kind took; where there is none, by the sweep's figures, if it has them (`foretold`).
    """
    total = 0.0
    for kind in {step.kind for step in steps if step not in done}:
        ours = [step for step in steps if step.kind == kind]
        ended = [step for step in ours if step in done]
        rate = sum(map(done.seconds, ended)) / sum(step.weight for step in ended) if ended else 1.0
        if not ended and not foretold:
            return "time left not known yet"
        total += rate * sum(step.weight for step in ours if step not in done)
    return f"about {total / 60:.0f} minutes left"


class Runner:
    """Runs commands one after another; SIGTERM is handed on to the running one, which saves, and no other is begun."""

    def __init__(self, via: Sequence[str], environment: Mapping[str, str]):
        self._via, self._environment = list(via), dict(environment)
        self._running: subprocess.Popen[bytes] | None = None
        self.stops = False

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self._stop())

    def _stop(self) -> None:
        self.stops = True
        if self._running is not None:
            self._running.terminate()

    def command(self, step: Step) -> list[str]:
        here = (
            step.command[0] == "launch.pack"
        )  # the work of one machine: on a slice every host would write the same corpus
        return [*([sys.executable, "-m"] if here else self._via), *step.command]

    def __call__(self, step: Step) -> int:
        """A command's exit status; a training that is told to restart is."""
        while True:
            with subprocess.Popen(self.command(step), env=self._environment) as process:
                self._running = process
                if self.stops:  # told so while it was begun
                    process.terminate()
                status = process.wait()
            self._running = None
            if status != distributed.RESTART or self.stops:
                return status


def execute(steps: Sequence[Step], done: Done, run: Runner, foretold: bool) -> dict[str, str]:
    """Runs what is not done, in order, until told to stop.

    Returns:
        Name of a step that failed, or was left out because one that it needs had failed -> what happened.
    """
    failed: dict[str, str] = {}
    for number, step in enumerate(steps, 1):
        if step in done:
            continue
        if missing := [name for name in step.needs if name in failed]:
            failed[step.name] = f"left out, for it needs `{missing[0]}`"
            continue
        shown = shlex.join(run.command(step))
        print(f"== {number} of {len(steps)}, {left(steps, done, foretold)}; {step.title}: {shown}", flush=True)
        began = time.time()
        status = run(step)
        if status == 0:
            done.add(step, time.time() - began)
            print(f"== {step.title}: {time.time() - began:.0f} s", flush=True)
        if run.stops:
            break
        if status:
            failed[step.name] = f"ended with status {status}"
            print(f"error: {step.title}: ended with status {status}; the others go on.", file=sys.stderr, flush=True)
    return failed


def finish(found: Plan, done: Done, metrics: Sequence[str], out: Path) -> str:
    """Scores the arms whose every seed is there, and writes the table, the figures and the picture; returns the table.

    Raises:
        UserError: the first arm, which the others are compared with, is not there, or nothing could be computed.
    """
    from data.phantom.parser import parse
    from evaluation import corpus as corpora
    from evaluation import report, sweeps
    from evaluation.predictions import read_predictions
    from rad_jax.corpus import Corpus

    ended = {step.name for step in found.steps if step in done}
    predictions = {arm: found.predictions[arm] for arm, last in found.last.items() if set(last) <= ended}
    first = next(iter(found.predictions))
    if first not in predictions:
        raise UserError(f"no table: seeds of {first!r}, which the other arms are compared with, are missing.")
    corpus = Corpus.open(found.corpus)
    ids = {row.id for paths in predictions.values() for path in paths for row in read_predictions(path).rows}
    studies = corpora.studies_of(corpus, corpora.records_of(corpus, ids))
    scores = sweeps.compare(predictions, metrics, report.Options(studies=studies, parse=parse))
    text = f"{sweeps.table(scores)}\n{_caption(predictions, len(studies))}"
    if absent := [arm for arm in found.predictions if arm not in predictions]:
        text += f"Not in it, because seeds are missing: {'; '.join(absent)}.\n"
    if unknown := [name for name in metrics if name not in {score.metric for score in scores}]:
        text += f"Not computed: {', '.join(unknown)}.\n"
    (out / "table.md").write_text(text)
    (out / "arms.json").write_text(json.dumps([dataclasses.asdict(score) for score in scores], indent=1) + "\n")
    sweeps.draw(scores, out / "arms.png")
    return text


def _caption(predictions: Mapping[str, Sequence[Path]], studies: int) -> str:
    first, seeds = next(iter(predictions)), max(map(len, predictions.values()))
    return (
        f"Means over {seeds} seeds on {studies} studies, with intervals (95 %) over patients and seeds. better, worse: than {first!r}, where "
        "the two intervals do not touch; without a word no order is claimed.\n"
    )


def check_given(found: Plan) -> None:
    """Raises UserError, which names them, when bases or corpora that a plan is given are not there."""
    if missing := [str(file.parent) for file in found.given if not file.is_file()]:
        raise UserError(
            f"not there: {', '.join(missing)}: make the bases with launch.convert and the corpora with launch.pack, as the text at the top of "
            "the sweep's file says."
        )


def main(_: Sequence[str]) -> int:
    from launch.demo import KEEP_MEMORY

    options = flags.FLAGS
    sweep, out = options.sweep, Path(options.out)
    if wrong := [pair for pair in options.corpora if "=" not in pair]:
        raise UserError(f"--corpora takes NAME=FOLDER with commas between them, not {wrong[0]!r}.")
    corpora = dict(pair.split("=", 1) for pair in options.corpora)
    found = plan(sweep, out, Path(options.given), {name: Path(path) for name, path in corpora.items()})
    # What arms and seeds have in common is compiled once.
    environment = KEEP_MEMORY | {"JAX_COMPILATION_CACHE_DIR": str(out.absolute() / "compiled")} | dict(os.environ)
    run = Runner(shlex.split(options.via) if options.via else [sys.executable, "-m"], environment)
    done, foretold = Done(out), "seconds" in sweep
    ended = sum(step in done for step in found.steps)
    print(
        f"{len(sweep.arms)} arms, {len(sweep.seeds)} seeds: {len(found.steps)} commands, {ended} of them done; "
        f"{left(found.steps, done, foretold)}.",
        flush=True,
    )
    if options.dry_run:
        for step in found.steps:
            if step not in done:
                print(f"{step.title}: {shlex.join(run.command(step))}")
        return 0
    check_given(found)
    run.listen()
    failed = execute(found.steps, done, run, foretold)
    if run.stops:
        print("stopped, as it was told to (SIGTERM): the same command goes on.", file=sys.stderr)
        return distributed.RESTART
    for step in found.steps:
        if step.name in failed:
            print(f"error: `{step.name}` ({step.title}) {failed[step.name]}.", file=sys.stderr)
    print(f"\n{finish(found, done, sweep.metrics, out)}\nwritten: {out}/{{table.md,arms.json,arms.png}}")
    if failed:
        print(
            f"error: {len(failed)} of {len(found.steps)} commands are not done: the same command tries again.",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("sweep", None, "As configs/sweeps/phantom.py.")
    flags.mark_flag_as_required("sweep")
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_list("corpora", [], "Packed corpora, NAME=FOLDER, instead of packing them.")
    flags.DEFINE_string("given", "out/given", "Folder of converted bases that a sweep names given/NAME.")
    flags.DEFINE_string("via", "", "Words before every command, instead of this Python's -m.")
    flags.DEFINE_boolean("dry_run", False, "Print every command, run none.")
    errors.run(main)
