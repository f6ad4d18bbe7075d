"""Has a language model judge a predictions file: CheXprompt's error counts, GREEN's or CRIMSON's score, or RadFact's precision and recall.

    python -m launch.judge PREDS.jsonl --judge=chexprompt --model=MODEL --out=DIR --dry_run
    python -m launch.judge PREDS.jsonl --judge=chexprompt --model=MODEL --out=DIR --data=CORPUS
    python -m launch.judge PREDS.jsonl --judge=green --model=MODEL --out=DIR --votes=3 --temperature=0.4
    python -m launch.judge PREDS.jsonl --judge=radfact --model=MODEL --out=DIR --access=public
    python -m launch.judge PREDS.jsonl --judge=chexprompt --model=MODEL --out=DIR --prompt=official.txt
    python -m launch.metaeval DIR/scores.jsonl EXPERTS.csv
    python -m launch.evaluate PREDS.jsonl --judged=DIR/scores.jsonl --out=EVALUATION

MODEL runs behind any endpoint of OpenAI's form; without --endpoint one on this machine, port 8000. A predictions file is private unless its
rows, --data or --access say otherwise, and what is not public goes to no other machine unless --attested_by names who made sure that it may.

DIR/results.json has every score with its signature (judge, prompt, model, votes), its interval and how many reports got none, in the form of
launch.evaluate; DIR/scores.jsonl the scores of every report. chexprompt_json counts like chexprompt and must point at every error; its
evidence, the statements of radfact and the findings of crimson are in DIR/evidence.jsonl (which holds report text). With --data the intervals
resample patients. --votes asks so often for each report, which means something where --temperature is above 0 or the model is hosted. --prompt
is a file of turns with {{reference}} and {{candidate}}, see evaluation/prompts. Answers are kept, so that the same command goes on where it was
stopped. It ends with an error when more than --max_failures answers stay unusable; the reports without a score are counted, listed in
scores.jsonl, and bound the shares from both sides.
"""

import datetime
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import rad_jax
from evaluation import chexprompt, crimson, green, judging, radfact, report, scoring, statistics, tables
from evaluation.predictions import Row, access_of, read_predictions
from rad_jax import errors
from rad_jax.chat import access, command
from rad_jax.chat import client as chat
from rad_jax.errors import UserError

JUDGES = {module.NAME: module.judge for module in (chexprompt, green, radfact, crimson)} | {
    "chexprompt_json": chexprompt.judge_with_evidence
}
MAX_TOKENS = 1024


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    flags.DEFINE_enum("judge", None, list(JUDGES), "Which judge.", required=True)
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_string("data", None, "Packed corpus of the predictions: patients, and who may have it.")
    flags.DEFINE_enum(
        "access",
        None,
        ["public", "credentialed", "private"],
        "Who may have the predictions, where neither they nor --data say.",
    )
    flags.DEFINE_integer("votes", 1, "Answers for every report.", lower_bound=1)
    flags.DEFINE_string("prompt", None, "File with another prompt than our own.")
    flags.DEFINE_integer("limit", None, "Only the first so many reports.", lower_bound=1)
    flags.DEFINE_integer("draws", statistics.DRAWS, "Bootstrap draws.", lower_bound=100)
    command.define_flags(MAX_TOKENS)


def main(argv: Sequence[str]) -> None:
    options = flags.FLAGS
    if len(argv) != 2:
        raise UserError(
            "give one predictions file: python -m launch.judge PREDS.jsonl --judge=chexprompt --model=MODEL --out=DIR"
        )
    print(judge_file(Path(argv[1]), options))


def judge_file(path: Path, options: Any) -> str:
    """Judges a predictions file as the flags say and writes the results; returns what to tell.

    Raises UserError for flags or files that cannot be used, and when too many answers fail.
    """
    if options.prompt and options.judge == radfact.NAME:
        raise UserError("--prompt belongs to judges of one prompt, and radfact has two: leave it out.")
    out = Path(options.out)
    read = read_predictions(path)
    rows = read.rows[: options.limit]
    clusters, level = known_of(rows, options.data, options.access)
    kind = JUDGES[options.judge](Path(options.prompt) if options.prompt else None)
    asked = command.client_of(options, out / "answers")
    pairs = [judging.Pair(row.id, row.reference, row.prediction) for row in rows if row.reference.strip()]
    if not pairs:
        raise UserError(f"{path}: every reference is empty, so there is nothing to judge by.")
    if options.dry_run:
        first = (question for pair in pairs for vote in range(options.votes) for question in kind.first(pair, vote))
        told_of = command.dry_run(asked, first, options, level)
        more = "\n  and one more for every statement that the reports are split into"
        return told_of + (more if options.judge == radfact.NAME else "")
    command.check_access(options, level)
    verdicts = judging.judge(kind, with_bar(asked, len(pairs) * options.votes), pairs, options.votes)
    refused = "".join(f"|refused:{name}" for name in asked.refused)
    signature = f"{kind.signature}|{asked.model.signature()}{refused}|votes:{options.votes}"
    lines = judging.rows(pairs, verdicts, path.stem, signature)
    setting = scoring.Setting(
        [clusters[pair.id] for pair in pairs], "patient" if options.data else "report", options.draws, statistics.SEED
    )
    result = summary(path, lines, setting, len(read.rows) - len(pairs))
    result["judge"] = command.record(asked, options, level)
    result["inputs"][0]["access"] = level
    out.mkdir(parents=True, exist_ok=True)
    scores = access.create(out / "scores.jsonl", level)  # it has the reports' ids
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if any(verdict.evidence for verdict in verdicts):
        pointed = [{"id": pair.id, "evidence": verdict.evidence} for pair, verdict in zip(pairs, verdicts, strict=True)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in pointed)
        access.create(out / "evidence.jsonl", level).write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return "\n".join(told(result)) + f"\nwritten: {out}/{{results.json,scores.jsonl}}"


def known_of(rows: Sequence[Row], data: str | None, stated: str | None) -> tuple[dict[str, str], str]:
    """Id -> patient (without a corpus the id itself), and who may have the predictions."""
    if data is None:
        return {row.id: row.id for row in rows}, access_of(rows, stated)
    from evaluation import corpus as corpora
    from rad_jax.corpus import Corpus

    corpus = Corpus.open(data)
    records = corpora.records_of(corpus, {row.id for row in rows})
    if missing := len(rows) - len(records):
        raise UserError(
            f"{data}: lacks {missing} of the {len(rows)} predicted ids: give the corpus that the predictions were made from."
        )
    studies = corpora.studies_of(corpus, records)
    return {name: study.patient for name, study in studies.items()}, access_of(rows, stated, corpus.access)


def with_bar(asked: chat.Client, total: int) -> judging.Ask:
    """The client's questions, with a bar; a judge may ask more than `total`."""
    from tqdm import tqdm

    def ask(questions: Iterable[chat.Question]) -> Iterator[tuple[chat.Question, chat.Answer]]:
        yield from tqdm(asked.ask(questions), total=total, desc="judging", unit="answer", disable=None)

    return ask


def summary(path: Path, lines: Sequence[dict[str, Any]], setting: scoring.Setting, left_out: int) -> dict[str, Any]:
    """The scores over all reports, as launch.evaluate's results.json has them."""
    judged = judging.Judged(lines[0]["signature"], {line["id"]: line["scores"] for line in lines})
    metrics = judging.metrics(judged, [line["id"] for line in lines])
    if not metrics:
        reasons = Counter(line["failed"] for line in lines)
        raise UserError(
            f"no report got a score ({chat.describe(reasons)}): mend the cause and run the same command again."
        )
    entries = scoring.entries(metrics, setting)
    shown = [entry | judging.extras(metric) for entry, metric in zip(entries, metrics, strict=True)]
    failed = Counter(line["failed"] for line in lines if "failed" in line)
    warnings = (
        [f"{sum(failed.values())} of {len(lines)} reports got no score: {chat.describe(failed)}."] if failed else []
    )
    warnings += [f"{left_out} rows left out, without a reference or beyond --limit."] if left_out else []
    return {
        "schema_version": report.SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tool": f"rad_jax {rad_jax.__version__}",
        "inputs": [{"path": str(path), "sha256": report.sha256(path), "n": len(lines), "unit": setting.unit}],
        "systems": [{"name": path.stem, "kind": "predictions"}],
        "metrics": [{"profile": "judge", "system": path.stem} | entry for entry in shown],
        "failed": dict(failed),
        "warnings": warnings,
    }


def told(result: dict[str, Any]) -> list[str]:
    """Warnings, and a table of the scores."""
    rows = [["score", "value (95%)", "sd", "n", "failed", "bounds"]]
    for entry in result["metrics"]:
        bounds = " to ".join(tables.digits(value, 3) for value in entry.get("bounds", ()))
        spread = tables.digits(entry["sd"], 3) if entry.get("sd") is not None else ""
        shown = tables.with_interval(entry | {"scale": 1.0})
        rows.append([entry["name"], shown, spread, str(entry["n"]), str(entry["n_failed"]), bounds])
    return [*result["warnings"], tables.markdown_table(rows)]


if __name__ == "__main__":
    define_flags()
    errors.run(main, positional=True)
