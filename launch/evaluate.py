"""Scores a predictions file and writes results.json and results.md.

    python -m launch.evaluate PREDS.jsonl --out=DIR [--data=CORPUS] [--baselines]

Without --data only the texts are compared (BLEU, ROUGE-L). With the phantom corpus the findings are read from the
generated text and judged against what was drawn, and intervals resample patients.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from evaluation import report
from evaluation.predictions import read_predictions
from rad_jax import errors
from rad_jax.errors import UserError


def evaluate(predictions: Path, out: Path, data: Path | None = None, with_baselines: bool = False) -> report.Json:
    """Scores `predictions`, writes out/results.json and out/results.md, and returns the result.

    Raises UserError for unusable input, OSError for an unwritable folder.
    """
    if with_baselines and data is None:
        raise UserError("--baselines needs --data=CORPUS: they are made from its training split")
    read = read_predictions(predictions)
    if data is None:
        result = report.evaluate(read)
    else:
        from data.phantom.parser import parse
        from evaluation import corpus as corpora
        from rad_jax.input_pipeline import Corpus

        corpus = Corpus.open(data)
        records = corpora.records_of(corpus, {row.id for row in read.rows})
        result = report.evaluate(
            read,
            studies=corpora.studies_of(corpus, records),
            parse=parse,
            baselines=corpora.baseline_reports(corpus, records) if with_baselines else None,
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "results.md").write_text(report.markdown(result), encoding="utf-8")
    return result


def main(argv: Sequence[str]) -> None:
    """Reads the command line, evaluates and prints the tables."""
    if len(argv) != 2 or not flags.FLAGS.out:
        raise UserError("give one predictions file and a folder: python -m launch.evaluate PREDS.jsonl --out=DIR")
    path, out, data = Path(argv[1]), Path(flags.FLAGS.out), flags.FLAGS.data
    result = evaluate(path, out, Path(data) if data else None, flags.FLAGS.baselines)
    for sentence in report.warnings(result):
        print(sentence)
    for table in (report.summary_table(result), report.finding_table(result)):
        if table:
            print("\n" + report.markdown_table(table))
    print(f"\nwritten: {out / 'results.json'} and {out / 'results.md'}")


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    flags.DEFINE_string("out", None, "folder for results.json and results.md")
    flags.DEFINE_string(
        "data", None, "packed corpus the predictions were made from: patients and, for the phantom, truth"
    )
    flags.DEFINE_boolean("baselines", False, "also score the most frequent training report and the nearest thumbnail's")


if __name__ == "__main__":
    define_flags()
    errors.run(main, positional=True)
