"""The whole path with one command: pack, train four stages, write findings for held-out studies, score, export to PyTorch, show a page.

    python -m launch.demo --config=configs/phantom.py --out=out/demo
    python -m launch.demo --config=configs/phantom.py --dataset=folder --source=my/films --out=out/films --steps=60

Every step is one of the commands of launch/, printed as it is run. Run again, it goes on where it stopped. It ends with OUT/index.html and
OUT/summary.json. PHANTOM_SEED=n draws another corpus.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rad_jax import errors

STAGES = {"lm": [], "stage1": [], "stage2": ["lm", "stage1"], "stage3": ["stage2"]}  # name -> the runs it starts from

FULL_STUDIES = (
    9200  # twice the phantom's own number: in its longer stages the towers would begin to know the fewer films by heart
)

# glibc returns a large freed buffer to the kernel and faults its pages in again at every step; keeping it is 15 % of a step here.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def define_flags() -> None:
    flags.DEFINE_string("config", "configs/phantom.py", "Config file with the variants lm, stage1, stage2 and stage3.")
    flags.DEFINE_bool(
        "full", False, "Train longer (the config's ',full' variants), and on more studies of the phantom."
    )
    flags.DEFINE_string("out", "out/demo", "Folder to write.")
    flags.DEFINE_enum("dataset", "phantom", ["phantom", "folder"], "What to learn from; see launch.pack.")
    flags.DEFINE_string("source", None, "Folder of images with a CSV, for --dataset=folder.")
    flags.DEFINE_integer("steps", None, "Steps of every stage, instead of the config's.", lower_bound=1)
    flags.DEFINE_float("install_seconds", None, "How long the installation took, for the summary.")


def main(_: Sequence[str]) -> int:
    options = flags.FLAGS
    demo = Demo(Path(options.out), options)
    try:
        demo.run()
    except subprocess.CalledProcessError as error:
        print(
            f"error: `{' '.join(error.cmd[1:])}` ended with status {error.returncode}; what was finished is kept.",
            file=sys.stderr,
        )
        return 2
    return 0


class Demo:
    """The steps; what each command was and the seconds it took are in OUT/steps.json, so that a finished one is not run again."""

    def __init__(self, out: Path, options: Any):
        self._out, self._options = out, options
        out.mkdir(parents=True, exist_ok=True)
        self._file = out / "steps.json"
        self._steps: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._changed = False

    def run(self) -> None:
        out, data, options = self._out, self._out / "data", self._options
        size = variant(options.config, "stage3", options.full).model.vision.image_size
        pack = ["pack", f"--dataset={options.dataset}", f"--out={data}", f"--image_size={size}"]
        if options.source:
            # A first look goes on with the films that are there; what is missing is counted all the same.
            pack += [f"--source={options.source}", "--bad_rows=1"]
        elif options.full:
            pack.append(f"--studies={FULL_STUDIES}")
        self._step("pack", pack)
        for stage, bases in STAGES.items():
            self._step(stage, self._training(stage, bases, data))
        model = f"--checkpoint={out / 'stage3'}"
        for pixels in ("real", "noise", "shuffled"):
            predictions = out / f"predictions_{pixels}.jsonl"
            command = [
                "generate",
                model,
                f"--data={data}",
                f"--pixels={pixels}",
                f"--out={predictions}",
                "--max_new_tokens=64",
            ]
            self._step(f"generate {pixels}", command)
            baselines = ["--baselines"] if pixels == "real" else []
            command = [
                "evaluate",
                str(predictions),
                f"--data={data}",
                f"--out={out / f'evaluation_{pixels}'}",
                *baselines,
            ]
            self._step(f"evaluate {pixels}", command)
        towers = [f"--checkpoint={out / 'stage1'}", f"--data={data}", "--candidates=100"]
        self._step("retrieve", ["retrieve", *towers, f"--out={out / 'retrieval.json'}"])
        real = f"--predictions={out / 'predictions_real.jsonl'}"
        covering = [] if self._options.full else ["--covering"]  # the long one's attention points well alone
        self._step("ground", ["ground", model, f"--data={data}", real, *covering, f"--out={out / 'grounding'}"])
        bundle = [f"--out={out / 'bundle'}", "--overwrite", "--dtype=float32", "--max_new_tokens=48"]
        self._step("export", ["export", model, f"--data={data}", *bundle])
        self._report()

    def _training(self, stage: str, bases: list[str], data: Path) -> list[str]:
        """launch.train for one stage; text lengths as this corpus needs them, so that nothing is cut and little is padding."""
        from rad_jax.corpus import Corpus
        from rad_jax.input_pipeline import longest

        options = self._options
        name = f"{options.config}:{stage}" + (",full" if options.full else "")
        config = variant(options.config, stage, options.full)
        text, target = longest(Corpus.open(data), config.data.split, config.data.selection, config.data.template)
        command = ["train", f"--config={name}", f"--data={data}", f"--workdir={self._out / stage}"]
        if bases:
            command.append("--base=" + ",".join(str(self._out / base) for base in bases))
        command.append(f"--config.data.text_length={text}")
        if target:
            command.append(f"--config.data.target_length={target}")
        if options.steps:
            command.append(f"--config.steps={options.steps}")
        return command

    def _step(self, name: str, arguments: Sequence[str]) -> None:
        """Runs a command, unless it finished before and so did, unchanged, everything ahead of it."""
        record = self._steps.setdefault(name, {"seconds": 0.0, "finished": None})
        command = [sys.executable, "-m", f"launch.{arguments[0]}", *arguments[1:]]
        said = [*command[1:], f"PHANTOM_SEED={os.environ.get('PHANTOM_SEED', '0')}"]
        if record["finished"] == said and not self._changed:
            print(f"== {name}: finished before", flush=True)
            return
        if record["finished"]:
            record["seconds"] = 0.0
        self._changed, record["finished"] = True, None
        print(f"\n== {name}: python {' '.join(command[1:])}", flush=True)
        began = time.time()
        try:
            subprocess.run(command, check=True, env=KEEP_MEMORY | dict(os.environ))
            record["finished"] = said
        finally:
            record["seconds"] += time.time() - began
            self._file.write_text(json.dumps(self._steps, indent=1) + "\n")
        print(f"== {name}: {record['seconds']:.0f} s", flush=True)

    def _report(self) -> None:
        from data.phantom.parser import parse
        from evaluation import demo

        summary = demo.summarise(
            self._out, {name: step["seconds"] for name, step in self._steps.items()}, self._options.install_seconds
        )
        demo.write_page(self._out, summary, parse)
        (self._out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print("\n" + json.dumps(summary, indent=1))
        if self._options.install_seconds is not None:
            print(f"\ninstallation (once): {self._options.install_seconds:.0f} s")
        print(f"\nfinished in {summary['total_seconds']:.0f} s. Open {self._out / 'index.html'}")


def variant(config: str, stage: str, full: bool) -> Any:
    """The experiment of one stage."""
    from ml_collections import config_flags

    holder = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=holder)
    holder(["demo", f"--config={config}:{stage}" + (",full" if full else "")])
    return holder.config


if __name__ == "__main__":
    define_flags()
    errors.run(main)
