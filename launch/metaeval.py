"""Compares scores with the ratings of radiologists: does a metric, or a judge, agree with experts as they agree with each other?

    python -m launch.metaeval OUT/per_report.jsonl EXPERTS.csv --out=metaeval.json
    python -m launch.metaeval SCORES.jsonl ratings.csv --id=study_number --system=candidate_type --rater=rater_index --value=num_errors
    python -m launch.metaeval SCORES.jsonl ratings.csv --value=rating --ratings=quality --higher_is_better=my_metric

SCORES.jsonl has lines {"id": ..., "system": ..., "scores": {metric: number}}, as launch.evaluate and launch.judge write them. Metrics of several
profiles are told apart as PROFILE/METRIC; signatures are taken from the lines, or from the results.json beside the file. EXPERTS.csv has one line per
report and rater: id, rater, value and, when several systems were rated, system. (The second line above is for ReXVal, the third as for RadPref, which keeps a JSON file
for each rater, to be written as such lines first.) Lines of one rater on one report are summed, so that a file
with a line per kind of error works too. Reports that a rater or a score lacks are left out and counted. --cluster names a column that groups
reports, such as the patient; intervals resample these, or else the ids.

tau is Kendall's tau-b with the mean of the raters, distance the mean absolute difference (for scores on the raters' scale); beside them the
same of a rater against the others, and the gap between the two. Raters count errors unless --ratings=quality. The gap in tau is of a
score that is turned as the raters are, so that one that goes the wrong way cannot look like an expert: which way is known of the metrics
here; others have no gap until --higher_is_better or --lower_is_better names them.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from evaluation import directions, metaeval, tables
from rad_jax import errors
from rad_jax.errors import UserError

Key = tuple[str, str]
Name = tuple[str, str]  # profile (empty where none is said) and metric


@dataclass(frozen=True)
class Scores:
    """rows: (id, system) -> profile and metric -> number, what is no number left out. signatures: of metrics, where they are known."""

    rows: dict[Key, dict[Name, float]] = field(default_factory=dict)
    signatures: dict[Name, str] = field(default_factory=dict)


def read_scores(path: Path) -> Scores:
    """The scores of a file, and their signatures from its lines or from the results.json beside it.

    Raises UserError for a missing or unusable file, and for a score of a report that stands twice.
    """
    if not path.is_file():
        raise UserError(f"no scores at {path}: launch.evaluate writes per_report.jsonl")
    out = Scores()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            key = (str(row["id"]), str(row.get("system", "")))
            profile, how = str(row.get("profile", "")), row.get("signature")
            scores = {(profile, str(name)): float(value) for name, value in row["scores"].items() if value is not None}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}, line {number}: no object with id and scores") from None
        own = out.rows.setdefault(key, {})
        if twice := own.keys() & scores.keys():
            raise UserError(f"{path}, line {number}: a report has {min(twice)[1]} twice, keep one line per report")
        own |= scores
        out.signatures.update(dict.fromkeys(scores, str(how)) if how else {})
    return Scores(out.rows, _beside(path) | out.signatures)


def _beside(path: Path) -> dict[Name, str]:
    """The signatures in the results.json that launch.evaluate wrote beside its scores; nothing where there is none."""
    try:
        metrics = json.loads((path.parent / "results.json").read_text(encoding="utf-8"))["metrics"]
        return {(str(m["profile"]), str(m["name"])): str(m["signature"]) for m in reversed(metrics)}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def read_ratings(path: Path, columns: dict[str, str | None]) -> tuple[dict[Key, dict[str, float]], dict[Key, str]]:
    """(id, system) -> rater -> sum of values, and (id, system) -> cluster. columns: id, system, rater, value and cluster.

    Raises UserError for a missing file or column, or a value that is no number.
    """
    if not path.is_file():
        raise UserError(f"no ratings at {path}: give a CSV file")
    ratings: dict[Key, dict[str, float]] = {}
    clusters: dict[Key, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for name in columns.values():
            if name is not None and name not in (reader.fieldnames or ()):
                raise UserError(
                    f"{path}: no column {name!r}, choose columns with --id, --rater, --value, --system, --cluster"
                )
        for row in reader:
            found = {key: row[name] if name else "" for key, name in columns.items()}
            key = (found["id"], found["system"])
            try:
                value = float(found["value"])
            except ValueError:
                raise UserError(f"{path}, line {reader.line_num}: {columns['value']} is not a number") from None
            own = ratings.setdefault(key, {})
            own[found["rater"]] = own.get(found["rater"], 0.0) + value
            clusters[key] = found["cluster"] or found["id"]
    return ratings, clusters


def compare(
    scores: Scores,
    ratings: dict[Key, dict[str, float]],
    clusters: dict[Key, str],
    draws: int,
    errors_counted: bool = True,
    better: Mapping[str, int] | None = None,
) -> Any:
    """`metaeval.evaluate` over the reports that every rater rated, each metric over those it has a score of.

    errors_counted: whether raters count errors, rather than rate quality. better: metric -> 1 where more is better, -1 where less is, before
    what `directions` knows.
    """
    rows = scores.rows
    raters = sorted({rater for row in ratings.values() for rater in row})
    rated = [key for key, row in ratings.items() if len(row) == len(raters)]
    if len({system for _, system in rated}) == 1 and not rated[0][1]:  # ratings of one system name none
        if len({system for _, system in rows}) > 1:
            raise UserError("the scores are of several systems and the ratings name none: give --system")
        rows = {(name, ""): row for (name, _), row in rows.items()}
    names = list(dict.fromkeys(name for key in rated for name in rows.get(key, ())))
    if not names:
        raise UserError(
            "no rated report has a score: the ids, and the systems where several were rated, must be the same in both files"
        )
    out: dict[str, Any] = {"raters": len(raters), "left_out": len(ratings) - len(rated), "metrics": {}}
    several = len({profile for profile, _ in names}) > 1
    for name in names:
        profile, metric = name
        keys = [key for key in rated if name in rows.get(key, ())]
        values = np.array([rows[key][name] for key in keys])
        table = np.array([[ratings[key][rater] for rater in raters] for key in keys])
        way = (better or {}).get(metric) or directions.direction(metric)
        signs = {metric: -way if errors_counted else way} if way else {}
        found = metaeval.evaluate({metric: values}, table, [clusters[key] for key in keys], signs=signs, draws=draws)
        known = {"name": metric, "profile": profile, "signature": scores.signatures.get(name), "better": _WAYS[way]}
        counts = {"n": found["n"], "clusters": found["clusters"]}
        out["metrics"]["/".join(filter(None, name)) if several else metric] = known | counts | found["scores"][metric]
    return out


_WAYS = {1: "higher", -1: "lower", None: None}


def table(result: Any) -> list[list[str]]:
    """Head row and one row per metric."""
    rows = [["metric", "n", "tau (95%)", "left out", "a rater's", "gap (95%)", "distance", "a rater's"]]
    for name, found in result["metrics"].items():
        cells = [found["tau"][key] | {"scale": 1.0} for key in ("all", "left_out", "rater", "gap")]
        far = [tables.digits(found["distance"][key]["value"], 3) for key in ("left_out", "rater")]
        shown = [tables.with_interval(cells[0]), *(tables.digits(c["value"], 3) for c in cells[1:3])]
        rows.append([name, str(found["n"]), *shown, tables.with_interval(cells[3]), *far])
    return rows


def main(argv: Sequence[str]) -> None:
    options = flags.FLAGS
    if len(argv) != 3:
        raise UserError("give scores and ratings: python -m launch.metaeval SCORES.jsonl EXPERTS.csv")
    columns = {name: getattr(options, name) for name in ("id", "system", "rater", "value", "cluster")}
    ratings, clusters = read_ratings(Path(argv[2]), columns)
    try:
        better = dict.fromkeys(options.higher_is_better, 1) | dict.fromkeys(options.lower_is_better, -1)
        counted = options.ratings == "errors"
        result = compare(read_scores(Path(argv[1])), ratings, clusters, options.draws, counted, better)
    except ValueError as error:
        raise UserError(f"{argv[2]}: {error}") from None
    print(tables.markdown_table(table(result)))
    if result["left_out"]:
        print(f"{result['left_out']} reports left out: not rated by all {result['raters']} raters.")
    if unknown := [name for name, found in result["metrics"].items() if found["better"] is None]:
        named = ", ".join(unknown)
        print(f"No gap in tau for {named}: name them in --higher_is_better or --lower_is_better.")
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    flags.DEFINE_string("id", "id", "Column of the report's id in the ratings.")
    flags.DEFINE_string("system", None, "Column of the system that wrote it, when several were rated.")
    flags.DEFINE_string("rater", "rater", "Column of the rater.")
    flags.DEFINE_string("value", "value", "Column of the rating, an error count for instance.")
    flags.DEFINE_enum("ratings", "errors", ["errors", "quality"], "Whether raters count errors or rate quality.")
    flags.DEFINE_list("higher_is_better", [], "Metrics of which more is better, besides those that are known.")
    flags.DEFINE_list("lower_is_better", [], "Metrics of which less is better, besides those that are known.")
    flags.DEFINE_string("cluster", None, "Column of what intervals resample, instead of the id.")
    flags.DEFINE_integer("draws", 2000, "Bootstrap draws.", lower_bound=100)
    flags.DEFINE_string("out", None, "JSON file to write.")


if __name__ == "__main__":
    define_flags()
    errors.run(main, positional=True)
