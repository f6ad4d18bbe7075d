"""The evaluation of predictions files: every number with its signature, n and interval, as one JSON object.

Schema (version 1): schema_version, created, tool, inputs[{path, sha256, n, unit (what is resampled, by profile), access, ...}], systems[{name, kind}],
metrics[{name, profile, system, signature, value, ci, bootstrap_median, half_width, n, n_failed, scale, per_finding?}],
published[{system, metric, profile, value, n, source, verified}], subgroups[{column, group, system, reports, name, value, ci, ...}],
comparisons[{metric, profile, a, b, diff, ci, p, p_holm, p_min, n, n_dropped, n_better, n_worse, effect, ...}], warnings[].
The metrics of the first file come first, so the first entry of a name is its score.
"""

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import rad_jax
from evaluation import (
    findings,
    judging,
    panels,
    profiles,
    published,
    radgraph,
    rouge,
    rule_labeler,
    scoring,
    statistics,
)
from evaluation.metric import Metric
from evaluation.predictions import Predictions, malformed_sentence
from rad_jax.errors import UserError

SCHEMA_VERSION = 1
LEAST_IN_GROUP = 20
Parser = Callable[[str], Sequence[findings.Finding]]
Json = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What the corpus knows of one predicted study. truth is None where the corpus holds no annotations."""

    patient: str
    truth: list[findings.Finding] | None


@dataclass(frozen=True)
class Given:
    """A score that was computed before: every report's own by id, and the signature of how."""

    signature: str
    values: dict[str, float]


@dataclass(frozen=True)
class Input:
    """One predictions file: a system. Where given, labels: id -> codes [14] of its texts by another labeler, annotations: id -> RadGraph entities
    of its texts, and scores by metric."""

    name: str
    read: Predictions
    path: Path | None = None
    labels: dict[str, np.ndarray] | None = None
    annotations: dict[str, radgraph.Annotation] | None = None
    scores: dict[str, Given] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What to compute. bleu: more conventions of `bleu.CONVENTIONS`, under the first profile. studies: id -> what the corpus knows; None for no corpus. parse: reads findings, for a corpus with truth.

    baselines: name -> {id: report}, scored like the predictions; of_baselines: what models say of them, where there are any. reference_labels, reference_annotations: as an
    `Input`'s, of the references; labels_how, annotations_how: what made them, for signatures.
    groups: id -> {column: value}, for subgroups. judged: system -> a judge's scores, one for every judge; they go to the first profile.
    """

    profiles: Sequence[str] = ("native",)
    bleu: Sequence[str] = ()
    studies: dict[str, Study] | None = None
    parse: Parser | None = None
    baselines: dict[str, dict[str, str]] = field(default_factory=dict)
    of_baselines: Sequence[Input] = ()
    reference_labels: dict[str, np.ndarray] | None = None
    reference_annotations: dict[str, radgraph.Annotation] | None = None
    labels_by: str = "chexbert"
    labels_how: str = "given"
    annotations_how: str = "given"
    min_support: int = findings.MIN_SUPPORT
    interval: scoring.IntervalKind = "percentile"
    draws: int | None = None
    trials: int = statistics.TRIALS
    access: str = "unstated"
    groups: dict[str, dict[str, str]] | None = None
    judged: Sequence[dict[str, judging.Judged]] = ()


@dataclass(frozen=True)
class Scored:
    """The metrics of every system under one profile: system -> metrics, the same names in the same order."""

    profile: str
    setting: scoring.Setting
    systems: dict[str, list[Metric]]


def findings_of_annotations(annotations: str) -> list[findings.Finding]:
    """Finding tuples of a record's `annotations` JSON."""
    return [(a["finding"], a.get("side"), a.get("size"), a.get("place")) for a in json.loads(annotations)]


def evaluate(inputs: Sequence[Input], options: Options) -> tuple[Json, list[Json]]:
    """Everything that can be said about the files, and every report's own scores, as plain JSON.

    Raises UserError when files share no study or disagree on a reference.
    """
    result, scored, ids = score(inputs, options)
    for part in scored:
        profile = profiles.PROFILES[part.profile]
        for name, metrics in part.systems.items():
            rows = scoring.entries(metrics, part.setting, profile.median)
            of_judges = {key for judged in options.judged if name in judged for key in judged[name].names()}
            rows = [
                row | (judging.extras(metric) if metric.name in of_judges else {})
                for row, metric in zip(rows, metrics, strict=True)
            ]
            result["metrics"] += [{"profile": part.profile, "system": name} | row for row in rows]
    result["metrics"].sort(key=lambda row: [s["name"] for s in result["systems"]].index(row["system"]))
    result["published"] = published.beside(result["metrics"])
    result["subgroups"] = subgroups(scored, ids, options)
    result["comparisons"] = compare(scored, options.trials)
    return result, per_report(scored, ids)


def score(inputs: Sequence[Input], options: Options) -> tuple[Json, list[Scored], list[str]]:
    """The result without its numbers, the metrics of every profile, and the ids that their rows stand for."""
    ids = _common(inputs, options.studies)
    references = _references(inputs, ids)
    texts = {item.name: _texts(item, ids) for item in inputs}
    texts |= {name: [answers[i] for i in ids] for name, answers in options.baselines.items()}
    known = None if options.studies is None else [options.studies[i] for i in ids]
    result: Json = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tool": f"rad_jax {rad_jax.__version__}",
        "inputs": [_input(item, ids, references, options) for item in inputs],
        "systems": [
            {"name": name, "kind": "baseline" if name in options.baselines else "predictions"} | panels.distinctness(said)
            for name, said in texts.items()
        ],
        "metrics": [],
        "published": [],
        "subgroups": [],
        "comparisons": [],
        "warnings": [],
    }  # fmt: skip
    files = [*inputs, *options.of_baselines]
    labelled = {
        name: (np.array(true, np.int8), np.array(said, np.int8))
        for name, (true, said) in _given(
            "--labels", {i.name: i.labels for i in files}, options.reference_labels, ids
        ).items()
    }
    own_annotations = {i.name: i.annotations for i in files}
    annotated = _given("--radgraph", own_annotations, options.reference_annotations, ids)
    work = _Work(ids, references, texts, known, labelled, annotated, {i.name: i.scores for i in files}, options)
    scored = [work.score(name, first=i == 0) for i, name in enumerate(options.profiles)]
    unit = ",".join(dict.fromkeys(part.setting.unit for part in scored))
    result["inputs"] = [item | {"unit": unit} for item in result["inputs"]]
    result["warnings"] = _warnings(result, known, bool(labelled), bool(annotated), set(inputs[0].scores), options)
    return result, scored, ids


def per_report(scored: Sequence[Scored], ids: Sequence[str]) -> list[Json]:
    """One row per report, system and profile: the report's own score in every metric, None where it does not count."""
    out = []
    for part in scored:
        for name, metrics in part.systems.items():
            with np.errstate(invalid="ignore", divide="ignore"):
                each = {m.name: np.where(m.rows.any(axis=1), m.each(), np.nan).tolist() for m in metrics}
            for i, report_id in enumerate(ids):
                own = {metric: scoring.number(values[i]) for metric, values in each.items()}
                out.append({"id": report_id, "system": name, "profile": part.profile, "scores": own})
    return out


def subgroups(scored: Sequence[Scored], ids: Sequence[str], options: Options) -> list[Json]:
    """The first profile's metrics over the reports of every group that has at least `LEAST_IN_GROUP` of them.

    A report without a reference counts in no score of the text, here as elsewhere.
    """
    if options.groups is None:
        return []
    part, out = scored[0], []
    values = [options.groups.get(i, {}) for i in ids]
    for column in dict.fromkeys(name for row in values for name in row):
        for value in sorted({row.get(column, "") for row in values} - {""}):
            inside = np.array([row.get(column) == value for row in values])
            if inside.sum() < LEAST_IN_GROUP:
                continue
            clusters = [cluster for cluster, kept in zip(part.setting.clusters, inside, strict=True) if kept]
            setting = scoring.Setting(clusters, *list(vars(part.setting).values())[1:])
            for name, metrics in part.systems.items():
                own = [
                    Metric(
                        **{
                            **vars(m),
                            "rows": m.rows[inside],
                            "scored": None if m.scored is None else m.scored[inside],
                            "n": int(m.rows[inside].any(axis=1).sum()),
                            "per_finding": {},
                        }
                    )
                    for m in metrics
                ]
                rows = scoring.entries(own, setting)
                out += [
                    {"column": column, "group": value, "system": name, "reports": int(inside.sum())} | row
                    for row in rows
                ]
    return out


def compare(scored: Sequence[Scored], trials: int) -> list[Json]:
    """Every other system against the first, metric by metric; Holm's adjustment is over all of them together."""
    out = []
    for part in scored:
        first, *others = part.systems
        for other in others:
            pair = _shared(part.systems[first], part.systems[other])
            rows = scoring.compare((first, other), *pair, part.setting, trials) if pair[0] else []
            out += [{"profile": part.profile} | row for row in rows]
    scoring.adjust(out)
    return out


def _shared(first: Sequence[Metric], second: Sequence[Metric]) -> tuple[list[Metric], list[Metric]]:
    """Both systems' metrics of the same name: a baseline has no label file of the user's."""
    by_name = {metric.name: metric for metric in second}
    kept = [metric for metric in first if metric.name in by_name]
    return kept, [by_name[metric.name] for metric in kept]


@dataclass(frozen=True)
class _Work:
    ids: list[str]
    references: list[str]
    texts: dict[str, list[str]]
    known: list[Study] | None
    labelled: dict[str, tuple[np.ndarray, np.ndarray]]  # system -> given label tables of references and predictions
    annotated: dict[str, tuple[list[Any], list[Any]]]  # the same of RadGraph's entities
    scores: dict[str, dict[str, Given]]
    options: Options

    def score(self, name: str, first: bool) -> Scored:
        """All systems under one profile; metrics against a corpus's truth go to the first profile."""
        profile = profiles.PROFILES[name]
        by_patient = profile.unit == "patient" and self.known is not None
        clusters: Sequence[Any] = [s.patient for s in self.known or ()] if by_patient else range(len(self.ids))
        draws = self.options.draws or profile.draws
        unit = "patient" if by_patient else "report"
        setting = scoring.Setting(clusters, unit, draws, profile.seed, self.options.interval)
        kept = [i for i, reference in enumerate(self.references) if reference.strip()]
        truth, found = self._findings() if first else ([], {})
        named = {finding[0] for texts in found.values() for row in texts for finding in row}
        rules = rule_labeler.label_all([self.references[i] for i in kept]) if profile.rules else None
        systems: dict[str, list[Metric]] = {}
        for system, texts in self.texts.items():
            said = [texts[i] for i in kept]
            metrics = profiles.text_metrics(profile, said, [self.references[i] for i in kept]) if kept else []
            if first and kept:
                metrics += profiles.extra_bleu(self.options.bleu, said, [self.references[i] for i in kept])
            if profile.median:
                metrics = [_with_rouge_median(m, draws, profile.seed) for m in metrics]
            if rules is not None and kept:
                how = f"labeler:rules-v{rule_labeler.VERSION}"
                coded = rule_labeler.label_all(said)
                metrics += profiles.label_scores(profile, rules, coded, "rules", how)
                if profile.panels:
                    metrics += panels.metrics(said, [self.references[i] for i in kept], coded, rules)
            if system in self.labelled:
                true, given = (table[kept] for table in self.labelled[system])
                by = self.options.labels_by
                metrics += profiles.label_scores(profile, true, given, by, f"labeler:{by}-{self.options.labels_how}")
            if system in self.annotated:
                true_entities, own = ([table[i] for i in kept] for table in self.annotated[system])
                metrics += profiles.radgraph_scores(profile, true_entities, own, self.options.annotations_how)
            metrics += profiles.given_scores(profile, self.scores.get(system, {}), [self.ids[i] for i in kept])
            for judged in self.options.judged if first else ():  # judges are not asked without a reference either
                metrics += judging.metrics(judged[system], [self.ids[i] for i in kept]) if system in judged else []
            metrics = [_spread(metric, kept, len(self.ids)) for metric in metrics]
            if found:
                against = findings.metrics(truth, found[system], min_support=self.options.min_support, classes=named)
                metrics = against + metrics
            systems[system] = metrics
        return Scored(name, setting, systems)

    def _findings(self) -> tuple[list[list[findings.Finding]], dict[str, list[Sequence[findings.Finding]]]]:
        """The corpus's truth and what every system's texts say; nothing where the corpus has no truth."""
        truth = [study.truth for study in self.known or () if study.truth is not None]
        parse = self.options.parse
        if parse is None or not truth or len(truth) < len(self.ids):
            return [], {}
        return truth, {system: [parse(text) for text in texts] for system, texts in self.texts.items()}


def _with_rouge_median(metric: Metric, draws: int, seed: int) -> Metric:
    if not metric.name.startswith("rouge"):
        return metric
    middle = rouge.bootstrap_of_means(metric.rows[:, 0], draws, seed)[1]
    return Metric(**{**vars(metric), "point": float(middle)})


def _spread(metric: Metric, kept: list[int], count: int) -> Metric:
    """The metric over all `count` reports: those that do not count have rows of zeros."""
    rows = np.zeros((count, metric.rows.shape[1]))
    rows[kept] = metric.rows
    scored = metric.scored
    if scored is not None:
        scored = np.zeros(count, bool)
        scored[kept] = metric.scored
    return Metric(**{**vars(metric), "rows": rows, "scored": scored})


def lookup(result: Json, name: str, system: str | None = None, profile: str | None = None) -> Json | None:
    """The first entry of a metric, of a system and profile where given."""
    for row in result["metrics"]:
        if row["name"] == name and system in (None, row["system"]) and profile in (None, row["profile"]):
            return row
    return None


def require(result: Json, names: Sequence[str]) -> None:
    """Raises UserError when one of the metrics has no value."""
    for name in names:
        entry = lookup(result, name)
        if entry is None or entry["value"] is None:
            raise UserError(f"--require: {name} was not computed, see the warnings")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _common(inputs: Sequence[Input], studies: dict[str, Study] | None) -> list[str]:
    shared = {row.id for row in inputs[0].read.rows}.intersection(*({r.id for r in i.read.rows} for i in inputs[1:]))
    ids = [row.id for row in inputs[0].read.rows if row.id in shared and (studies is None or row.id in studies)]
    if not ids:
        raise UserError("the files have no study in common: give predictions of the same test set")
    return ids


def _references(inputs: Sequence[Input], ids: list[str]) -> list[str]:
    """The reference of every id; the files must have the same."""
    tables = [{row.id: row.reference for row in item.read.rows} for item in inputs]
    differing = [i for i in ids if any(table[i] != tables[0][i] for table in tables[1:])]
    if differing:
        raise UserError(
            f"the references of {len(differing)} studies differ between the files: systems are compared on the same references"
        )
    return [tables[0][i] for i in ids]


def _texts(item: Input, ids: list[str]) -> list[str]:
    table = {row.id: row.prediction for row in item.read.rows}
    return [table[i] for i in ids]


def _given(
    flag: str, systems: dict[str, dict[str, Any] | None], references: dict[str, Any] | None, ids: list[str]
) -> dict[str, tuple[list[Any], list[Any]]]:
    """system -> what files say of its references and of its predictions, report by report, for systems that came with files.

    Raises UserError when a file lacks a study.
    """
    out = {}
    for name, table in systems.items():
        if references is None or table is None:
            continue
        for file in (references, table):
            if missing := sum(i not in file for i in ids):
                raise UserError(f"{flag}: a file lacks {missing} of the {len(ids)} studies to be scored")
        out[name] = ([references[i] for i in ids], [table[i] for i in ids])
    return out


def _input(item: Input, ids: list[str], references: list[str], options: Options) -> Json:
    """Where a file came from and which of its rows count."""
    scored, studies = set(ids), options.studies
    rows = [row for row in item.read.rows if row.id in scored]
    return {
        "path": None if item.path is None else str(item.path),
        "sha256": None if item.path is None else sha256(item.path),
        "n": len(ids),
        "access": options.access,
        "read": len(item.read.rows) + len(item.read.malformed),
        "malformed": [{"line": line, "reason": reason} for line, reason in item.read.malformed],
        "not_in_corpus": [row.line for row in item.read.rows if studies is not None and row.id not in studies],
        "not_in_others": sum(row.id not in scored and (studies is None or row.id in studies) for row in item.read.rows),
        "empty_predictions": sum(not row.prediction.strip() for row in rows),
        "empty_references": sum(not reference.strip() for reference in references),
    }


def _warnings(
    result: Json, known: list[Study] | None, labelled: bool, annotated: bool, given: set[str], options: Options
) -> list[str]:
    """What a reader of the numbers must know first: rows left out, empty texts, scores left out. One sentence each."""
    out = []
    for count in result["inputs"]:
        where = "" if len(result["inputs"]) == 1 else f"{Path(count['path'] or 'predictions').name}: "
        if count["malformed"]:
            pairs = [(row["line"], row["reason"]) for row in count["malformed"]]
            out.append(f"{where}{malformed_sentence(pairs, count['read'])}.")
        if count["not_in_corpus"]:
            left = len(count["not_in_corpus"])
            out.append(f"{where}{left} of {count['read']} rows left out because the corpus does not hold their id.")
        if count["not_in_others"]:
            out.append(
                f"{where}{count['not_in_others']} of {count['read']} rows left out, another file lacks their id."
            )
        if count["empty_predictions"]:
            out.append(f"{where}{count['empty_predictions']} of {count['n']} predictions are empty and score as such.")
    if empty := result["inputs"][0]["empty_references"]:
        out.append(f"{empty} of {result['inputs'][0]['n']} references are empty: not in scores of the text.")
    if options.parse is None or known is None or any(study.truth is None for study in known):
        out.append("Scores against annotations are left out: they need --data=CORPUS of a corpus whose truth is known.")
    if not rouge.installed() and any(profiles.PROFILES[name].rouge for name in options.profiles):
        out.append("ROUGE is left out: rouge-score is not installed (pip install rad_jax[eval]).")
    needs: dict[str, str] = {}
    # "chexprompt" is there when a judge of that name gave chexprompt_total and others.
    judges = tuple(
        {name.split("_")[0] for judged in options.judged for system in judged.values() for name in system.names()}
    )
    for name in options.profiles:
        absent = profiles.absent(profiles.PROFILES[name], labelled, annotated)
        needs |= {
            metric: need for metric, need in absent.items() if metric not in given and not metric.startswith(judges)
        }
    for need in dict.fromkeys(needs.values()):
        names = [name for name in needs if needs[name] == need]
        out.append(f"{', '.join(names)} left out: {'it needs' if len(names) == 1 else 'they need'} {need}.")
    return out
