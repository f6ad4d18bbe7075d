"""What a run of launch.demo came to: `summarise` gathers the numbers of its steps, `write_page` shows them with a dozen studies."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import page, report
from evaluation.corpus import ANNOTATED, FREQUENT, records_of
from evaluation.overlay import overlay
from evaluation.report import Parser, findings_of_annotations
from rad_jax import images, metrics
from rad_jax.corpus import Corpus

CARDS = 12
STAGES = {
    "lm": "Language model (text)",
    "stage1": "Stage 1: contrastive towers",
    "stage2": "Stage 2: projector",
    "stage3": "Stage 3: LoRA",
}
FLOORS = {"findings_macro_f1": 0.60, "laterality_accuracy": 0.85, "retrieval_r5": 0.40}


def summarise(out: Path, seconds: dict[str, float], install_seconds: float | None) -> dict[str, Any]:
    """The numbers of a demo; those that need a corpus with known truth are absent otherwise."""
    results = {pixels: _read(out / f"evaluation_{pixels}/results.json") for pixels in ("real", "noise", "shuffled")}
    retrieval, grounding = _read(out / "retrieval.json"), _read(out / "grounding/grounding.json")
    verified = _read(out / "bundle/receipt.json")["differences"]
    summary: dict[str, Any] = {"studies": results["real"]["inputs"][0]["n"]}
    if (macro := report.lookup(results["real"], "finding_macro_f1")) is not None:
        laterality = report.lookup(results["real"], "laterality") or {}
        summary |= {
            "findings_macro_f1": macro["value"],
            "findings_macro_f1_interval": macro["ci"],
            "findings_classes": sum(finding["in_macro"] for finding in macro["per_finding"].values()),
            "laterality_accuracy": laterality["value"],
            "laterality_interval": laterality["ci"],
            "laterality_n": laterality["n"],
            "noise_macro_f1": _value(results["noise"], "finding_macro_f1"),
            "shuffled_macro_f1": _value(results["shuffled"], "finding_macro_f1"),
            "baseline_frequent_f1": _value(results["real"], "finding_macro_f1", FREQUENT),
            "baseline_thumbnail_f1": _value(results["real"], "finding_macro_f1", "nearest thumbnail"),
            "pointing_accuracy": grounding["accuracy"],
            "pointing_chance": grounding["chance"],
            "pointing_shuffled": grounding["shuffled"]["shuffled_accuracy"],
            "pointing_p": grounding["shuffled"]["p"],
        }
    return summary | {
        "bleu1": _value(results["real"], "bleu_1"),
        "bleu4": _value(results["real"], "bleu_4"),
        "rouge_l": _value(results["real"], "rouge_l"),
        "retrieval_r5": retrieval["image_to_text"]["r5"],
        "retrieval_candidates": retrieval["image_to_text"]["n"],
        "loss": {stage: _first_and_last(out / stage) for stage in STAGES},
        "export_max_abs_logit_diff": verified["max_abs_logit_diff"],
        "export_text_equal": verified["text_equal"],
        "install_seconds": install_seconds,
        "stage_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
        "html": str(out / "index.html"),
    }


def write_page(out: Path, summary: dict[str, Any], parse: Parser) -> None:
    """Writes OUT/index.html; `parse` reads findings from text, for a corpus whose truth is known."""
    corpus = Corpus.open(out / "data")
    synthetic = corpus.meta["dataset"] in ANNOTATED
    results = _read(out / "evaluation_real/results.json")
    description = (
        "Procedurally drawn chest radiographs: every finding, its side, size and place are known exactly. Not real patients."
        if synthetic
        else "Images and reports from your own folder; no finding-level truth is known."
    )
    counts = ", ".join(f"{count} {split}" for split, count in corpus.splits.items())
    context = page.Context(
        title="rad_jax: findings from chest radiographs",
        subtitle="A small LLaVA-Rad trained from nothing on this machine: contrastive towers, projector, LoRA.",
        corpus=page.Corpus(
            name=corpus.meta["dataset"], synthetic=synthetic, description=description, facts=[("Studies", counts)]
        ),
        tiles=_tiles(summary),
        curves=[
            page.Curve(name=name, points=[(row["step"], row["loss"]) for row in metrics.read(out / stage)])
            for stage, name in STAGES.items()
        ],
        tables=_tables(results),
        studies=_studies(out, corpus, parse if synthetic else None),
        timings=list(summary["stage_seconds"].items()),
        config_text=json.dumps(_read(out / "stage3/config.json")["config"], indent=1),
        machine=[("Processor", f"{os.cpu_count()} cores, {platform.machine()}"), ("Python", platform.python_version())],
        notes=["Scores are of held-out patients. A research tool: not for diagnosis."],
    )
    page.write_page(out / "index.html", context)


def _tiles(summary: dict[str, Any]) -> list[page.Tile]:
    def tile(label: str, name: str, note: str, marks: list[tuple[float, str]]) -> page.Tile:
        value = summary[name]
        return page.Tile(label=label, value=f"{value:.2f}", note=note, fraction=value, marks=marks)

    tiles = []
    if "findings_macro_f1" in summary:
        frequent, thumbnail = summary["baseline_frequent_f1"], summary["baseline_thumbnail_f1"]
        floors = FLOORS
        marks = [(floors["findings_macro_f1"], "floor"), (thumbnail, "nearest thumbnail")]
        note = f"{summary['findings_classes']} findings, {summary['studies']} studies; most frequent normal report {frequent:.2f}"
        tiles.append(tile("Finding macro F1", "findings_macro_f1", note, marks))
        note = f"of {summary['laterality_n']} findings with a side"
        tiles.append(
            tile(
                "Right side named",
                "laterality_accuracy",
                note,
                [(floors["laterality_accuracy"], "floor"), (0.5, "chance")],
            )
        )
        half = [(summary["findings_macro_f1"] / 2, "half of the score above")]
        tiles.append(tile("Macro F1 on noise", "noise_macro_f1", "must fall: the model looks", half))
        tiles.append(tile("Macro F1 on another's image", "shuffled_macro_f1", "must fall: the model looks", half))
        chance = [(summary["pointing_chance"], "chance")]
        if summary["pointing_shuffled"] is not None:
            chance.append((summary["pointing_shuffled"], "maps of other patients"))
        tiles.append(tile("Pointing game", "pointing_accuracy", "attention maximum inside the true box", chance))
    candidates = summary["retrieval_candidates"]
    marks = [(min(1.0, 5 / candidates), "chance")] + ([(FLOORS["retrieval_r5"], "floor")] if len(tiles) else [])
    tiles.append(tile("Retrieval R@5", "retrieval_r5", f"image to report among {candidates}", marks))
    difference = f"{summary['export_max_abs_logit_diff']:.0e}"
    equal = "equal" if summary["export_text_equal"] else "different"
    tiles.append(page.Tile(label="PyTorch export", value=difference, note=f"greatest logit difference; texts {equal}"))
    return tiles


def _tables(results: dict[str, Any]) -> list[page.Table]:
    tables = []
    if (macro := report.lookup(results, "finding_macro_f1")) is not None:
        rows = [
            [name.replace("_", " "), s["precision"], s["recall"], s["f1"], s["support"]]
            for name, s in macro["per_finding"].items()
        ]
        tables.append(
            page.Table(title="Findings", columns=["finding", "precision", "recall", "F1", "support"], rows=rows, bar=3)
        )
    rows = []
    for system in results["systems"]:
        scores = [_value(results, name, system["name"]) for name in ("finding_macro_f1", "laterality")]
        words = [_value(results, name, system["name"]) for name in ("bleu_1", "bleu_4")]
        shares = [None if value is None else value / 100 for value in words]
        name = "this model" if system["kind"] == "predictions" else system["name"]
        rows.append([name, *scores, *shares, _value(results, "rouge_l", system["name"])])
    columns = ["system", "finding macro F1", "laterality", "BLEU-1", "BLEU-4", "ROUGE-L"]
    return [*tables, page.Table(title="Against simple baselines", columns=columns, rows=rows)]


def _value(results: dict[str, Any], name: str, system: str | None = None) -> float | None:
    entry = report.lookup(results, name, system)
    return None if entry is None else entry["value"]


def _studies(out: Path, corpus: Corpus, parse: Parser | None) -> list[page.Study]:
    """The first studies of the predictions, those with findings first."""
    lines = (out / "predictions_real.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    records = records_of(corpus, {row["id"] for row in rows})
    rows.sort(key=lambda row: -min(2, len(json.loads(records[row["id"]]["annotations"]))))
    words, maps = _read(out / "grounding/grounding.json")["words"], np.load(out / "grounding/maps.npz")
    return [_study(row, records[row["id"]], words.get(row["id"]), maps, parse) for row in rows[:CARDS]]


def _study(
    row: dict[str, str], record: dict[str, Any], word: dict[str, Any] | None, maps: Any, parse: Parser | None
) -> page.Study:
    image = images.decode_png(record["image"])
    image = images.centre_crop(image, min(image.shape))
    study = page.Study(
        id=row["id"],
        image_png=images.encode_png(image),
        attention_png=overlay(image, maps[row["id"]]) if word else None,
        word=word["word"] if word else None,
        boxes=word["boxes"] if word else [],
        indication=record["indication"],
        reference=row["reference"],
        prediction=row["prediction"],
        right=None,
        missed=None,
        invented=None,
    )
    if parse is not None:
        truth = findings_of_annotations(record["annotations"])
        study.update(page.judge(row["reference"], row["prediction"], truth, parse))  # type: ignore[typeddict-item]
    return study


def _first_and_last(workdir: Path) -> list[float]:
    losses = [row["loss"] for row in metrics.read(workdir)]
    return [losses[0], losses[-1]]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
