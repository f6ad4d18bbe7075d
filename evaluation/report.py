"""The evaluation of one predictions file: every number with its signature, n and interval, as JSON and Markdown."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation import findings, text_metrics
from evaluation.predictions import Predictions, malformed_sentence

Parser = Callable[[str], Sequence[findings.Finding]]
Json = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What the corpus knows of one predicted study. truth is None where the corpus holds no annotations."""

    patient: str
    truth: list[findings.Finding] | None


def findings_of_annotations(annotations: str) -> list[findings.Finding]:
    """Finding tuples of a record's `annotations` JSON."""
    return [(a["finding"], a.get("side"), a.get("size"), a.get("place")) for a in json.loads(annotations)]


def text_scores(predictions: Sequence[str], references: Sequence[str], patients: Sequence[str] | None) -> Json:
    """BLEU-1, BLEU-4 and ROUGE-L as plain JSON."""
    return {
        "bleu1": asdict(text_metrics.bleu(predictions, references, 1, patients)),
        "bleu4": asdict(text_metrics.bleu(predictions, references, 4, patients)),
        "rouge_l": asdict(text_metrics.rouge_l(predictions, references, patients)),
    }


def finding_scores(predicted: Sequence[Sequence[findings.Finding]], studies: Sequence[Study], min_support: int) -> Json:
    """Finding-level scores as plain JSON; every study must have a truth."""
    truth = [study.truth or [] for study in studies]
    scores = findings.score(truth, predicted, clusters=[s.patient for s in studies], min_support=min_support)
    how = f"match:class-per-study|{text_metrics.interval_signature('patient')}"
    return {
        "macro_f1": {
            "value": scores.macro_f1,
            "interval": scores.macro_f1_interval,
            "n": scores.studies,
            "classes": list(scores.macro_classes),
            "signature": f"finding-macro-f1|classes:{len(scores.macro_classes)}|min-support:{min_support}|{how}",
        },
        "laterality": {
            "value": scores.laterality,
            "interval": scores.laterality_interval,
            "n": scores.laterality_total,
            "right": scores.laterality_right,
            "signature": f"laterality|over:true-positives-with-a-side|match:exact-sides|no-side:wrong|{how}",
        },
        "per_finding": {name: asdict(score) for name, score in scores.per_finding.items()},
        "patients": scores.clusters,
    }


def evaluate(
    predictions: Predictions,
    *,
    studies: dict[str, Study] | None = None,
    parse: Parser | None = None,
    baselines: dict[str, dict[str, str]] | None = None,
    min_support: int = findings.MIN_SUPPORT,
) -> Json:
    """Everything that can be said about the rows, as plain JSON.

    studies: id -> what the corpus knows; rows whose id is not there are listed and left out of every number. None: no
    corpus, so
        only the texts are compared and intervals resample reports.
    parse: reads findings from a text; used where the corpus has a truth.
    baselines: name -> {id: report}, scored like the predictions and on the same rows.
    """
    rows = [row for row in predictions.rows if studies is None or row.id in studies]
    known = None if studies is None else [studies[row.id] for row in rows]
    texts = {"prediction": [row.prediction for row in rows]}
    for name, answers in (baselines or {}).items():
        texts[name] = [answers[row.id] for row in rows]
    result: Json = {
        "rows": {
            "read": len(predictions.rows) + len(predictions.malformed),
            "scored": len(rows),
            "malformed": [{"line": line, "reason": reason} for line, reason in predictions.malformed],
            "not_in_corpus": [row.line for row in predictions.rows if studies is not None and row.id not in studies],
            "empty_predictions": sum(not row.prediction.strip() for row in rows),
            "empty_references": sum(not row.reference.strip() for row in rows),
        },
        "notes": [],
        "systems": {name: {} for name in texts},
    }
    if missing := text_metrics.missing_packages():
        result["notes"].append(
            f"BLEU and ROUGE-L are left out: {' and '.join(missing)} not installed (pip install rad_jax[eval])."
        )
    for name, reports in texts.items():
        system = result["systems"][name]
        if not missing:
            system["text"] = _text_of_referenced(reports, [row.reference for row in rows], known)
        if parse and known and all(study.truth is not None for study in known):
            system["findings"] = finding_scores([parse(report) for report in reports], known, min_support)
    if not any("findings" in system for system in result["systems"].values()):
        result["notes"].append(
            "Finding-level scores are left out: they need --data=CORPUS of a corpus whose truth is known."
        )
    return result


def _text_of_referenced(reports: list[str], references: list[str], known: list[Study] | None) -> Json | None:
    """Word overlap over the rows that have a reference to overlap with; None when no row has."""
    kept = [i for i, reference in enumerate(references) if reference.strip()]
    patients = None if known is None else [known[i].patient for i in kept]
    return text_scores([reports[i] for i in kept], [references[i] for i in kept], patients) if kept else None


def warnings(result: Json) -> list[str]:
    """What a reader of the numbers must know first: rows left out, empty texts, scores left out. One sentence each."""
    count = result["rows"]
    out = []
    if count["malformed"]:
        pairs = [(row["line"], row["reason"]) for row in count["malformed"]]
        out.append(malformed_sentence(pairs, count["read"]) + ".")
    if count["not_in_corpus"]:
        out.append(
            f"{len(count['not_in_corpus'])} of {count['read']} rows left out because the corpus does not hold their id."
        )
    if count["empty_predictions"]:
        out.append(f"{count['empty_predictions']} of {count['scored']} predictions are empty and score as such.")
    if count["empty_references"]:
        out.append(f"{count['empty_references']} of {count['scored']} references are empty: not in BLEU and ROUGE-L.")
    return out + result["notes"]


def summary_table(result: Json) -> list[list[str]]:
    """Head row and one row per system: name, then every headline number with its interval."""
    head = ["system", "finding macro F1", "laterality", "BLEU-1", "BLEU-4", "ROUGE-L"]
    rows = [head]
    for name, system in result["systems"].items():
        found, text = system.get("findings") or {}, system.get("text") or {}
        cells = [
            found.get("macro_f1"),
            found.get("laterality"),
            text.get("bleu1"),
            text.get("bleu4"),
            text.get("rouge_l"),
        ]
        rows.append([name, *(_with_interval(cell, 1 if 3 <= i <= 4 else 3) for i, cell in enumerate(cells, start=1))])
    used = [i for i in range(len(head)) if any(row[i] != "-" for row in rows[1:])]
    return [[row[i] for i in used] for row in rows]


def finding_table(result: Json, system: str = "prediction") -> list[list[str]]:
    """Head row and one row per finding class; empty when the corpus has no truth."""
    scores = result["systems"][system].get("findings")
    if not scores:
        return []
    rows = [["finding", "precision", "recall", "F1 (95%)", "support", "predicted"]]
    for name, s in scores["per_finding"].items():
        f1 = _with_interval({"value": s["f1"], "interval": s["f1_interval"]}, 3)
        numbers = [_number(s["precision"], 3), _number(s["recall"], 3), f1, str(s["support"]), str(s["predicted"])]
        rows.append([name.replace("_", " "), *numbers])
    return rows


def markdown(result: Json) -> str:
    """The whole result as Markdown."""
    count = result["rows"]
    parts = [
        "# Evaluation",
        f"{count['scored']} of {count['read']} rows scored. Brackets: 95% interval.",
        *warnings(result),
        "## Summary",
        markdown_table(summary_table(result)),
    ]
    if table := finding_table(result):
        parts += ["## Findings", markdown_table(table)]
    signatures = [
        f"- `{score['signature']}|n:{score['n']}`"
        for part in ("text", "findings")
        for score in (result["systems"]["prediction"].get(part) or {}).values()
        if isinstance(score, dict) and "signature" in score
    ]
    if signatures:
        parts += ["## Signatures", "\n".join(signatures)]
    if count["malformed"]:
        lines = [f"- line {row['line']}: {row['reason']}" for row in count["malformed"]]
        parts += ["## Rows left out", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: list[list[str]]) -> str:
    """Rows (the first is the head) as a padded Markdown table, readable in a terminal as it is."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _with_interval(score: Json | None, digits: int) -> str:
    if score is None or score["value"] is None:
        return "-"
    text = _number(score["value"], digits)
    if score["interval"]:
        text += f" [{score['interval'][0]:.{digits}f}, {score['interval'][1]:.{digits}f}]"
    return text


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
