"""Profiles: which metrics, in which conventions, are printed together, as known evaluations do.

The same name means different numbers in different evaluations (BLEU-4 of raw text or cleaned text, uncertain labels as negative or positive,
a mean or a bootstrap median), so a profile fixes all of them, and every number carries a signature that says how it was made.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evaluation import bleu, cider, label_metrics, radgraph, rouge
from evaluation.metric import Metric, mean, mean_rows

# What needs weights that the user has to bring, and is not computed without them.
WEIGHTS = {
    "chexbert": "label files with --labels, or a CheXbert checkpoint with --weights",
    "radgraph": "RadGraph annotation files with --radgraph, or its model with --weights",
    "bertscore": "an encoder with --weights",
    "semb_score": "CheXbert's checkpoint with --weights",
    "radcliq": "RadGraph, CheXbert and distilroberta-base with --weights",
    "green": "the GREEN model",
    "ratescore": "the RaTEScore models",
    "chexprompt": "a language model as judge",
    "radfact": "a language model as judge",
    "meteor": "WordNet",
}
_AVERAGES = ("micro_14", "macro_14", "micro_5", "macro_5")
_PLUS = tuple(f"{name}_plus" for name in _AVERAGES)
_RADGRAPH = ("radgraph_simple", "radgraph_partial", "radgraph_complete")
_EVERY = tuple(f"{a}_{n}{p}" for p in ("", "_plus") for n in label_metrics.SETS for a in label_metrics.AVERAGES)


@dataclass(frozen=True)
class Profile:
    """bleu: (order, convention) pairs. rouge: the names wanted and how ("plain", "stemmer", "coco-clean"). labels: averages, without the
    labeler's name. rules, panels: whether the weight-free labeler is scored too, and `panels`. absent: metrics of the original that need weights or files.

    unit: "patient" resamples patients where they are known. median: print the median of the bootstrap, as LLaVA-Rad does, instead of the
    score itself (BLEU excepted).
    """

    bleu: tuple[tuple[int, str], ...] = ()
    rouge: tuple[str, ...] = ()
    rouge_kind: Literal["plain", "stemmer", "coco-clean"] = "plain"
    labels: tuple[str, ...] = ()
    cider: bool = False
    rules: bool = False
    panels: bool = False
    radgraph_case: Literal["kept", "lower"] = "kept"
    absent: tuple[str, ...] = ()
    unit: Literal["patient", "report"] = "patient"
    draws: int = 2000
    seed: int = 0
    median: bool = False


PROFILES = {
    # Ours: every report counts once, intervals over patients, the weight-free labels beside the words.
    "native": Profile(
        bleu=tuple((order, "sacrebleu") for order in (1, 2, 3, 4)),
        rouge=("rouge_1", "rouge_2", "rouge_l"),
        cider=True,
        labels=_EVERY,
        rules=True,
        panels=True,
        radgraph_case="lower",
        absent=(*_RADGRAPH, "bertscore", "semb_score", "radcliq_v0", "radcliq_v1", "green", "chexprompt"),
    ),
    # LLaVA-Rad's own script with its bootstrap on.
    "llava-rad": Profile(
        bleu=((1, "sacrebleu"), (4, "sacrebleu")),
        rouge=("rouge_l",),
        labels=_AVERAGES + _PLUS,
        absent=("radgraph_partial", "chexprompt"),
        unit="report",
        draws=500,
        seed=3,
        median=True,
    ),
    # RadEval: COCO's BLEU on raw text, stemmed ROUGE, uncertain labels positive.
    "radeval": Profile(
        bleu=tuple((order, "coco") for order in (1, 2, 3, 4)),
        rouge=("rouge_1", "rouge_2", "rouge_l"),
        rouge_kind="stemmer",
        labels=tuple(f"{name}_plus" for name in (*_AVERAGES, "weighted_14", "weighted_5")),
        absent=("bertscore", *_RADGRAPH, "radcliq_v1", "ratescore", "green"),
        unit="report",
    ),
    # ReXrank: the inputs of RadCliQ and RadCliQ.
    "rexrank": Profile(
        bleu=((2, "radcliq"),),
        absent=(
            "bertscore",
            "semb_score",
            "radgraph_entity_relation",
            "radcliq_v0",
            "radcliq_v1",
            "ratescore",
            "green",
        ),
        unit="report",
    ),
    # R2Gen and its family: COCO's scorers on lower-cased words. The references are taken as they are, not cut at 60 or 100 words.
    "r2gen": Profile(
        bleu=tuple((order, "coco-clean") for order in (1, 2, 3, 4)),
        rouge=("rouge_l",),
        rouge_kind="coco-clean",
        cider=True,
        labels=("micro_14", "macro_14"),
        absent=("meteor",),
        unit="report",
    ),
    # MAIRA-1 and -2.
    "maira": Profile(
        bleu=((1, "sacrebleu"), (4, "sacrebleu")),
        rouge=("rouge_l",),
        labels=(*_AVERAGES, "macro_14_plus", "micro_14_plus", "macro_5_plus", "micro_5_plus"),
        absent=("meteor", "radgraph_partial", "radgraph_entity_relation", "radcliq_v0", "radfact"),
        unit="report",
        draws=500,
    ),
}


def text_metrics(profile: Profile, predictions: Sequence[str], references: Sequence[str]) -> list[Metric]:
    """BLEU, ROUGE and CIDEr of a profile; ROUGE of rouge-score only where that is installed."""
    out, seen = [], {}
    for order, convention in profile.bleu:
        if convention not in seen:
            seen[convention] = bleu.count_rows(predictions, references, bleu.CONVENTIONS[convention])
        out.append(bleu.metric(predictions, references, order, convention, seen[convention]))
    words = "tok:alnum|case:lc"
    if profile.rouge_kind == "coco-clean":
        out.append(rouge.coco_metric(predictions, references, bleu.tokens_clean, words))
    elif profile.rouge and rouge.installed():
        found = rouge.metrics(predictions, references, stemmer=profile.rouge_kind == "stemmer")
        out += [metric for metric in found if metric.name in profile.rouge]
    if profile.cider:
        out.append(cider.metric(predictions, references, bleu.tokens_clean, words))
    return out


def extra_bleu(conventions: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> list[Metric]:
    """BLEU-1 to -4 in more conventions, named bleu_4_hf and so on."""
    out = []
    for name in conventions:
        rows = bleu.count_rows(predictions, references, bleu.CONVENTIONS[name])
        for order in range(1, bleu.ORDER + 1):
            metric = bleu.metric(predictions, references, order, name, rows)
            out.append(dataclasses.replace(metric, name=f"{metric.name}_{name}"))
    return out


def label_scores(
    profile: Profile, reference: np.ndarray, predicted: np.ndarray, labeler: str, how: str
) -> list[Metric]:
    """The averages that a profile prints of two label tables [n, 14]."""
    wanted = {f"{labeler}_{name}" for name in profile.labels}
    return [m for m in label_metrics.metrics(reference, predicted, labeler, how) if m.name in wanted]


def radgraph_scores(
    profile: Profile, references: Sequence[radgraph.Annotation], predicted: Sequence[radgraph.Annotation], how: str
) -> list[Metric]:
    """The forms of RadGraph F1 that a profile prints, from annotations; `how` says what made them."""
    found = radgraph.metrics(predicted, references, profile.radgraph_case == "kept", how)
    return [metric for metric in found if metric.name in profile.absent]


def given_scores(profile: Profile, scores: Mapping[str, Any], ids: Sequence[str]) -> list[Metric]:
    """Those of the scores that were computed before (metric -> `report.Given`) that a profile prints, over the reports `ids`."""
    return [
        Metric(name, given.signature, mean_rows(np.array([given.values[i] for i in ids], float)), mean, len(ids))
        for name, given in scores.items()
        if name in profile.absent
    ]


def absent(profile: Profile, labelled: bool, annotated: bool) -> dict[str, str]:
    """Metric name -> what it needs, for those of a profile that are not computed."""
    names = profile.absent if labelled else (*(f"chexbert_{name}" for name in profile.labels), *profile.absent)
    kept = [name for name in names if not (annotated and name.startswith("radgraph"))]
    return {name: next(need for start, need in WEIGHTS.items() if name.startswith(start)) for name in kept}
