"""Scores predictions files and writes results.json, results.md, results.csv, results.tex, per_report.jsonl and report.html.

    python -m launch.evaluate PREDS.jsonl --out=DIR
    python -m launch.evaluate OURS.jsonl THEIRS.jsonl --out=DIR --profile=llava-rad,native
    python -m launch.evaluate PREDS.jsonl --out=DIR --data=CORPUS --baselines
    python -m launch.evaluate PREDS.jsonl --out=DIR --labels=REFERENCES.csv,PREDICTIONS.csv --require=chexbert_micro_14

A file has one JSON object per line with id, query, reference and prediction, as LLaVA-Rad writes it. Several files are
systems: scored on the studies that all of them hold, each compared with the first, paired. Predictions that launch.generate
wrote with --pixels=noise or --pixels=shuffled, put beside the real ones, show how much of a score needs the image.
--profile is one or more of native, llava-rad, radeval, rexrank, r2gen, maira: the same name is another number in each, and
every number's signature says how it was made. Metrics that need weights are listed as warnings, unless
--weights=DIR has them (launch.doctor says what belongs there); --labels gives label files (of CheXbert, say) for the references and for every
predictions file in turn, --radgraph the same for RadGraph's annotations. --idf=REPORTS.csv (a findings column) fixes the word frequencies
that BERTScore is weighted by.
--groups=GROUPS.csv (id, then columns such as view or sex) adds the scores of every group with at least 20 reports; --groups=corpus takes
view, sex, age and whether there is an indication from --data.
With --data the intervals resample patients; with the phantom corpus the findings are also judged against what was drawn.
--judged names score files of launch.judge, whose systems have the names of the predictions files: a judge's scores beside the others, paired.
per_report.jsonl has every report's own score. report.html is one file for a browser, offline: scores, findings, and the --cases worst reports
beside their references, with images from --data and, with --attention=DIR of launch.ground --every_word, the map of each word of the first
system under the mouse. Unless the data is public (--access, or a corpus that is drawn), it carries a banner and is readable by its owner
alone; --html=redacted leaves every text, image and id out.
"""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from evaluation import bleu, html_sources, judging, labels, profiles, radgraph, report, tables
from evaluation.predictions import access_of, read_predictions
from launch import label
from rad_jax import errors
from rad_jax.chat import access
from rad_jax.errors import UserError

FILES = ("results.json", "results.md", "results.csv", "results.tex", "per_report.jsonl")
PAGE = "report.html"
CORPUS = "corpus"


def read_inputs(
    paths: Sequence[Path], label_paths: Sequence[Path] = (), annotation_paths: Sequence[Path] = ()
) -> list[report.Input]:
    """The systems, named after their files; `label_paths` and `annotation_paths`, when given, one per file.

    Raises UserError for unusable files.
    """
    names: list[str] = []
    for path in paths:
        names.append(path.stem if path.stem not in names else f"{path.stem} ({len(names) + 1})")
    given: list[Any] = [labels.read_csv(path) for path in label_paths] or [None] * len(paths)
    annotations: list[Any] = [radgraph.read(path) for path in annotation_paths] or [None] * len(paths)
    return [
        report.Input(name, read_predictions(path), path, table, annotation)
        for name, path, table, annotation in zip(names, paths, given, annotations, strict=True)
    ]


def corpus_options(
    data: Path | None, with_baselines: bool, inputs: Sequence[report.Input], with_groups: bool = False
) -> dict[str, Any]:
    """What a packed corpus adds to `report.Options`; nothing without one."""
    if data is None:
        if with_baselines:
            raise UserError("--baselines needs --data=CORPUS: they are made from its training split")
        if with_groups:
            raise UserError("--groups=corpus needs --data=CORPUS, or give a CSV file of groups")
        return {}
    from data.phantom.parser import parse
    from evaluation import corpus as corpora
    from rad_jax.corpus import Corpus

    corpus = Corpus.open(data)
    records = corpora.records_of(corpus, {row.id for item in inputs for row in item.read.rows})
    return {
        "studies": corpora.studies_of(corpus, records),
        "parse": parse,
        "baselines": corpora.baseline_reports(corpus, records) if with_baselines else {},
        "access": corpus.access,
        **({"groups": corpora.groups_of(records)} if with_groups else {}),
    }


def given_files(flag: str, value: str | None, count: int) -> tuple[Path | None, list[Path]]:
    """The files of --labels or --radgraph: the references', and one per predictions file. Raises UserError for another number of them."""
    paths = [Path(part) for part in value.split(",")] if value else []
    if paths and len(paths) != count + 1:
        raise UserError(
            f"{flag} names {len(paths)} files: give the references' and one for each of the {count} systems"
        )
    return (paths[0], paths[1:]) if paths else (None, [])


def read_groups(path: Path) -> dict[str, dict[str, str]]:
    """id -> {column: value} of a CSV file with an id column. Raises UserError for a file that has none."""
    if not path.is_file():
        raise UserError(f"no groups at {path}: give a CSV file with id and one column per grouping")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if "id" not in (reader.fieldnames or ()):
            raise UserError(f"{path}: no column 'id'")
        return {row["id"]: {name: value or "" for name, value in row.items() if name != "id"} for row in reader}


def idf_corpus(path: Path) -> tuple[list[str], str]:
    """The findings of a CSV or JSONL file of reports, and the file's sha256. Raises UserError as `label.read_texts`."""
    return list(label.read_texts(path, "id", "findings").values()), report.sha256(path)


def profile_names(value: str) -> list[str]:
    """The profiles of --profile. Raises UserError for an unknown one."""
    names = value.split(",")
    for name in names:
        if name not in profiles.PROFILES:
            raise UserError(f"--profile: {name!r} is none of {', '.join(profiles.PROFILES)}")
    return names


def evaluate(inputs: Sequence[report.Input], options: report.Options, out: Path, required: Sequence[str] = ()) -> Any:
    """Scores the systems, writes the files of `FILES` under `out`, and returns the result.

    Raises UserError for input that cannot be scored and for a required metric that was not, OSError for an unwritable folder.
    """
    result, rows = report.evaluate(inputs, options)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "results.md").write_text(tables.markdown(result), encoding="utf-8")
    (out / "results.csv").write_text(tables.csv_text(result), encoding="utf-8")
    (out / "results.tex").write_text(tables.latex(result), encoding="utf-8")
    own = access.create(out / "per_report.jsonl", options.access)  # it has the reports' ids
    with own.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    report.require(result, required)
    return result


def main(argv: Sequence[str]) -> None:
    """Reads the command line, evaluates and prints the tables."""
    options = flags.FLAGS
    if len(argv) < 2 or not options.out:
        raise UserError("give a predictions file and a folder: python -m launch.evaluate PREDS.jsonl --out=DIR")
    reference_path, label_paths = given_files("--labels", options.labels, len(argv) - 1)
    entities_path, annotation_paths = given_files("--radgraph", options.radgraph, len(argv) - 1)
    names = profile_names(options.profile)
    inputs = read_inputs([Path(name) for name in argv[1:]], label_paths, annotation_paths)
    wanted = report.Options(
        profiles=names,
        bleu=options.bleu,
        reference_labels=labels.read_csv(reference_path) if reference_path else None,
        labels_by=options.labels_by,
        reference_annotations=radgraph.read(entities_path) if entities_path else None,
        interval=options.interval,
        draws=options.draws,
        judged=[judging.read(Path(name)) for name in options.judged],
        **corpus_options(
            Path(options.data) if options.data else None, options.baselines, inputs, options.groups == CORPUS
        ),
    )
    if options.groups and options.groups != CORPUS:
        wanted = dataclasses.replace(wanted, groups=read_groups(Path(options.groups)))
    rows = [row for item in inputs for row in item.read.rows]
    if options.access or options.data or any(row.access for row in rows):
        known = wanted.access if options.data else None
        wanted = dataclasses.replace(wanted, access=access_of(rows, options.access, known))
    if options.weights:
        from evaluation import models

        corpus = idf_corpus(Path(options.idf)) if options.idf else None
        inputs, wanted = models.fill(inputs, wanted, Path(options.weights), corpus)
    out, data = Path(options.out), Path(options.data) if options.data else None
    result = evaluate(inputs, wanted, out)
    files: tuple[str, ...] = FILES
    if options.html != "none":
        count = options.cases if options.html == "full" else 0
        attention = Path(options.attention) if options.attention else None
        html_sources.write_page(result, inputs, out / PAGE, count, data, attention)
        files = (*FILES, PAGE)
    report.require(result, options.require)
    print_result(result)
    print(f"\nwritten: {options.out}/{{{','.join(files)}}}")


def print_result(result: Any) -> None:
    """Warnings and tables for people."""
    for sentence in result["warnings"]:
        print(sentence)
    for profile in tables.profiles_of(result):
        print(f"\nprofile {profile}\n" + tables.markdown_table(tables.summary(result, profile)))
    first = result["systems"][0]["name"]
    for table in (
        tables.comparisons(result),
        tables.per_finding(result, first),
        tables.panel(result),
        tables.subgroups(result),
    ):
        if table:
            print("\n" + tables.markdown_table(table))


def define_score_flags() -> None:
    """What decides which scores there are; launch.compare has these too."""
    flags.DEFINE_string("data", None, "Packed corpus of the predictions: patients and, for the phantom, truth.")
    flags.DEFINE_string("profile", "native", f"Comma-separated: {', '.join(profiles.PROFILES)}.")
    flags.DEFINE_string("labels", None, "Label files: the references', then one per predictions file, comma-separated.")
    flags.DEFINE_string(
        "labels_by",
        "chexbert",
        "Which labeler made the files of --labels: the name of its scores, as in chexbert_micro_14.",
    )
    flags.DEFINE_string("radgraph", None, "RadGraph annotations as JSON by id, in the same order as --labels.")
    flags.DEFINE_list("judged", [], "Score files of launch.judge.")
    flags.DEFINE_string("weights", None, "Folder of weights for CheXbert, RadGraph, BERTScore, SembScore and RadCliQ.")


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    define_score_flags()
    flags.DEFINE_string("out", None, "Folder for the results.")
    flags.DEFINE_boolean(
        "baselines", False, "Also score the most frequent normal, a random and the nearest thumbnail's training report."
    )
    flags.DEFINE_multi_enum("bleu", [], list(bleu.CONVENTIONS), "BLEU-1 to -4 in this convention too; may be repeated.")
    flags.DEFINE_list("require", [], "Metrics without which the command fails.")
    flags.DEFINE_string("idf", None, "Reports (id, findings) whose word frequencies weigh BERTScore.")
    flags.DEFINE_string(
        "groups", None, "CSV with id and columns such as view, sex, age, or 'corpus': scores per group."
    )
    flags.DEFINE_enum("html", "full", ["full", "redacted", "none"], "report.html: with cases, scores alone, or none.")
    flags.DEFINE_integer("cases", 50, "Cases in report.html, the worst first.", lower_bound=1)
    flags.DEFINE_string("attention", None, "Folder of launch.ground --every_word for the first predictions file.")
    flags.DEFINE_enum(
        "access",
        None,
        ["public", "credentialed", "private"],
        "Who may see the data; the strictest of this, --data and the rows counts.",
    )
    flags.DEFINE_enum("interval", "percentile", ["percentile", "bca"], "Kind of the 95% intervals.")
    flags.DEFINE_integer("draws", None, "Bootstrap draws, instead of the profile's.", lower_bound=100)


if __name__ == "__main__":
    define_flags()
    errors.run(main, positional=True)
