"""How much of a model's scores needs the image: writes findings with the film, with another study's film and with grey, and compares.

    python -m launch.blind --checkpoint=out/demo/stage3 --data=out/demo/data --split=test --limit=200 --out=out/demo/blind
    python -m launch.blind --predictions=REAL.jsonl,SHUFFLED.jsonl,BLANK.jsonl --out=OUT

Writes OUT/real.jsonl, shuffled.jsonl and blank.jsonl with launch.generate (which goes on where it was stopped), OUT/blindness.json and
OUT/blindness.md. "kept" is the share of a score that is still there without the image, with an interval that resamples patients: near 1 the
metric, or the test set, cannot tell whether the model looks. With --predictions the files are there already, in this order.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from evaluation import blindness, report, tables
from launch import evaluate
from rad_jax import errors
from rad_jax.errors import UserError

WAYS = (blindness.REAL, "shuffled", "blank")


def write_all(checkpoint: Path, data: Path, split: str, limit: int | None, batch_size: int, out: Path) -> list[Path]:
    """The predictions of every way, written by launch.generate. Raises UserError when it fails."""
    files = [out / f"{way}.jsonl" for way in WAYS]
    for way, file in zip(WAYS, files, strict=True):
        if file.exists():
            print(f"{file} is there already")
            continue
        command = [sys.executable, "-m", "launch.generate", f"--checkpoint={checkpoint}", f"--data={data}"]
        command += [f"--split={split}", f"--pixels={way}", f"--out={file}", f"--batch_size={batch_size}"]
        if subprocess.run([*command, *([f"--limit={limit}"] if limit else [])], check=False).returncode:
            raise UserError(f"launch.generate failed with --pixels={way}: see above")
    return files


def main(_: Sequence[str]) -> None:
    options = flags.FLAGS
    given = [Path(name) for name in options.predictions or ()]
    if bool(given) == bool(options.checkpoint):
        raise UserError("give --checkpoint and --data, or --predictions=REAL,SHUFFLED,BLANK")
    if (given and len(given) != len(WAYS)) or (options.checkpoint and not options.data):
        raise UserError("--checkpoint needs --data, and --predictions three files: real, shuffled, blank")
    out, data = Path(options.out), Path(options.data) if options.data else None
    out.mkdir(parents=True, exist_ok=True)
    if not given:
        assert data is not None
        given = write_all(Path(options.checkpoint), data, options.split, options.limit, options.batch_size, out)
    read = evaluate.read_inputs(given)
    inputs = [report.Input(way, item.read, item.path) for way, item in zip(WAYS, read, strict=True)]
    wanted = report.Options(**evaluate.corpus_options(data, False, inputs))
    part = report.score(inputs, wanted)[1][0]
    rows = blindness.panel(part.systems, part.setting)
    table = tables.markdown_table(blindness.table(rows, list(tables.HEADLINES)))
    (out / "blindness.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "blindness.md").write_text(table + "\n", encoding="utf-8")
    print(f"{table}\n\nwritten: {out}/blindness.{{json,md}}")


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    flags.DEFINE_string("checkpoint", None, "Run of launch.train, stage 2 or 3.")
    flags.DEFINE_string("data", None, "Packed corpus; also gives the patients of --predictions.")
    flags.DEFINE_list("predictions", None, "Three files instead of --checkpoint: real, shuffled, blank.")
    flags.DEFINE_string("split", "test", "Which studies.")
    flags.DEFINE_integer("limit", None, "Only the first so many studies.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 64, "Studies at once.", lower_bound=1)
    flags.DEFINE_string("out", None, "Folder to write.", required=True)


if __name__ == "__main__":
    define_flags()
    errors.run(main)
