"""Compares systems on the same studies, paired, and can fail a build when one got worse.

    python -m launch.compare BASE.jsonl NEW.jsonl --out=DIR
    python -m launch.compare BASE.jsonl NEW.jsonl --data=CORPUS --fail_if="rules_macro_14 < -0.5pp at 95%"
    python -m launch.compare BASE.jsonl NEW.jsonl --judged=A/scores.jsonl,B/scores.jsonl --fail_if="chexprompt_total > 0 at 95%"

Every other file is compared with the first: the difference with its 95% interval, p of a randomisation test that swaps whole patients (whole
reports without --data, and under profiles that resample reports) between the two, p adjusted after Holm for all the tests made here, how many reports got better and worse, and
Cohen's d. comparisons.json holds them all, the screen the main metrics. --fail_if names differences (new minus base) that end the command
with status 1: with "at 95%" only when the whole 95% interval lies beyond the bound; pp is hundredths of the metric's scale.
--labels, --radgraph, --judged and --weights bring the metrics that they bring in launch.evaluate.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from evaluation import judging, labels, radgraph, report, scoring, tables
from evaluation.metric import Metric
from evaluation.scoring import Gate
from launch import evaluate
from rad_jax import errors
from rad_jax.errors import UserError


def compare(inputs: Sequence[report.Input], options: report.Options, gates: Sequence[Gate]) -> tuple[Any, list[str]]:
    """The comparisons as plain JSON, and one sentence for every gate that fails.

    Raises UserError for input that cannot be compared and for a gate of a metric that is not there.
    """
    result, scored, _ = report.score(inputs, options)
    result["comparisons"] = report.compare(scored, options.trials)
    failures = []
    for gate in gates:
        part = next((p for p in scored if all(_find(m, gate.metric) for m in p.systems.values())), None)
        if part is None:
            raise UserError(f"--fail_if: no metric {gate.metric!r}, comparisons.json lists what there is")
        first, *others = part.systems
        for other in others:
            base, new = (_find(part.systems[name], gate.metric)[0] for name in (first, other))
            if gate.fails(base, new, part.setting):
                failures.append(f"{other} against {first}: {gate} ({new.total() - base.total():+.4f})")
    return result, failures


def _find(metrics: Sequence[Metric], name: str) -> list[Metric]:
    return [metric for metric in metrics if metric.name == name]


def main(argv: Sequence[str]) -> int:
    """Reads the command line, compares, prints the table; 1 when a gate fails."""
    options = flags.FLAGS
    if len(argv) < 3:
        raise UserError("give two predictions files or more: python -m launch.compare BASE.jsonl NEW.jsonl")
    try:
        gates = [scoring.parse_gate(text) for text in options.fail_if]
    except ValueError as error:
        raise UserError(f"--fail_if: {error}") from None
    reference_path, label_paths = evaluate.given_files("--labels", options.labels, len(argv) - 1)
    entities_path, annotation_paths = evaluate.given_files("--radgraph", options.radgraph, len(argv) - 1)
    inputs = evaluate.read_inputs([Path(name) for name in argv[1:]], label_paths, annotation_paths)
    wanted = report.Options(
        profiles=evaluate.profile_names(options.profile),
        reference_labels=labels.read_csv(reference_path) if reference_path else None,
        labels_by=options.labels_by,
        reference_annotations=radgraph.read(entities_path) if entities_path else None,
        judged=[judging.read(Path(name)) for name in options.judged],
        trials=options.trials,
        **evaluate.corpus_options(Path(options.data) if options.data else None, False, inputs),
    )
    if options.weights:
        from evaluation import models

        inputs, wanted = models.fill(inputs, wanted, Path(options.weights))
    result, failures = compare(inputs, wanted, gates)
    for sentence in result["warnings"]:
        print(sentence)
    print("\n" + tables.markdown_table(tables.comparisons(result)))
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparisons.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"\nwritten: {out / 'comparisons.json'}")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    evaluate.define_score_flags()
    flags.DEFINE_string("out", None, "Folder for comparisons.json.")
    flags.DEFINE_multi_string("fail_if", [], "Condition on a difference that fails the command; may be repeated.")
    flags.DEFINE_integer("trials", 10_000, "Random swaps of the test.", lower_bound=100)


if __name__ == "__main__":
    define_flags()
    errors.run(main, positional=True)
