"""Compares scores with the ratings of radiologists: does a metric, or a judge, agree with experts as they agree with each other?

    python -m launch.metaeval OUT/per_report.jsonl EXPERTS.csv --out=metaeval.json
    python -m launch.metaeval SCORES.jsonl ratings.csv --id=study_number --system=candidate_type --rater=rater_index --value=num_errors

SCORES.jsonl has lines {"id": ..., "system": ..., "scores": {metric: number}}, as launch.evaluate writes them. EXPERTS.csv has one line per
report and rater: id, rater, value and, when several systems were rated, system. (The second line above is for ReXVal; RadPref keeps a JSON file
for each rater, to be written as such lines first.) Lines of one rater on one report are summed, so that a file
with a line per kind of error works too. Reports that a rater or a score lacks are left out and counted. --cluster names a column that groups
reports, such as the patient; intervals resample these, or else the ids.

tau is Kendall's tau-b with the mean of the raters, distance the mean absolute difference (for scores on the raters' scale); beside them the
same of a rater against the others, and the gap between the two.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from evaluation import metaeval, tables
from rad_jax import errors
from rad_jax.errors import UserError

Key = tuple[str, str]


def read_scores(path: Path) -> dict[Key, dict[str, float]]:
    """(id, system) -> scores that are numbers; the profiles of a report are joined, the first of a name counts.

    Raises UserError for a missing or unusable file.
    """
    if not path.is_file():
        raise UserError(f"no scores at {path}: launch.evaluate writes per_report.jsonl")
    out: dict[Key, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            key = (str(row["id"]), str(row.get("system", "")))
            scores = {str(name): float(value) for name, value in row["scores"].items() if value is not None}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}, line {number}: no object with id and scores") from None
        out[key] = scores | out.get(key, {})
    return out


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
    scores: dict[Key, dict[str, float]], ratings: dict[Key, dict[str, float]], clusters: dict[Key, str], draws: int
) -> Any:
    """`metaeval.evaluate` over the reports that every rater rated, each metric over those it has a score of."""
    raters = sorted({rater for row in ratings.values() for rater in row})
    rated = [key for key, row in ratings.items() if len(row) == len(raters)]
    if len({system for _, system in rated}) == 1 and not rated[0][1]:  # ratings of one system name none
        if len({system for _, system in scores}) > 1:
            raise UserError("the scores are of several systems and the ratings name none: give --system")
        scores = {(name, ""): row for (name, _), row in scores.items()}
    names = list(dict.fromkeys(name for key in rated for name in scores.get(key, ())))
    if not names:
        raise UserError(
            "no rated report has a score: the ids, and the systems where several were rated, must be the same in both files"
        )
    out: dict[str, Any] = {"raters": len(raters), "left_out": len(ratings) - len(rated), "metrics": {}}
    for name in names:
        keys = [key for key in rated if name in scores.get(key, ())]
        values = np.array([scores[key][name] for key in keys])
        table = np.array([[ratings[key][rater] for rater in raters] for key in keys])
        found = metaeval.evaluate({name: values}, table, [clusters[key] for key in keys], draws=draws)
        out["metrics"][name] = {"n": found["n"], "clusters": found["clusters"]} | found["scores"][name]
    return out


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
        result = compare(read_scores(Path(argv[1])), ratings, clusters, options.draws)
    except ValueError as error:
        raise UserError(f"{argv[2]}: {error}") from None
    print(tables.markdown_table(table(result)))
    if result["left_out"]:
        print(f"{result['left_out']} reports left out: not rated by all {result['raters']} raters.")
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    flags.DEFINE_string("id", "id", "Column of the report's id in the ratings.")
    flags.DEFINE_string("system", None, "Column of the system that wrote it, when several were rated.")
    flags.DEFINE_string("rater", "rater", "Column of the rater.")
    flags.DEFINE_string("value", "value", "Column of the rating, an error count for instance.")
    flags.DEFINE_string("cluster", None, "Column of what intervals resample, instead of the id.")
    flags.DEFINE_integer("draws", 2000, "Bootstrap draws.", lower_bound=100)
    flags.DEFINE_string("out", None, "JSON file to write.")


if __name__ == "__main__":
    define_flags()
    errors.run(main, positional=True)
