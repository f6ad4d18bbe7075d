"""The scores of the models in a folder of weights (`evaluation.weights`), computed for whole predictions files before they are evaluated.

Every different text goes through a model once, whichever files it is in. What a folder lacks is left out and stays a warning of the report.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import bertscore, bleu, radcliq, radgraph, report, weights
from evaluation.bert_labeler import BertLabeler
from evaluation.bertscore import BertScore
from evaluation.predictions import Predictions, Row
from evaluation.radgraph_model import RadGraphModel

_RADCLIQ_ENCODER = "distilroberta-base"


def fill(
    inputs: Sequence[report.Input],
    options: report.Options,
    folder: Path,
    corpus: tuple[Sequence[str], str] | None = None,
) -> tuple[list[report.Input], report.Options]:
    """The inputs and options with labels, annotations and scores of the models that `folder` holds, of the predictions and of the baselines;
    files given by the user stay.

    corpus: texts whose word frequencies weigh BERTScore, and the digest of their file.

    Raises UserError for weights that cannot be read or are not those of SHA256SUMS.
    """
    there = [part.name for part in weights.ITEMS if not part.missing(folder)]
    weights.check(folder, there)
    whole = {row.id: row.reference for item in inputs for row in item.read.rows}
    out = [*inputs, *(_of_baseline(name, answers, whole) for name, answers in options.baselines.items())]
    said = [text for item in out for text in _texts(item)]
    vectors: dict[str, np.ndarray] = {}
    signature: dict[str, str] = {}
    if "chexbert" in there:
        labeler = BertLabeler(folder / "chexbert/chexbert.pth", folder / "chexbert/vocab.txt")
        texts = list(dict.fromkeys(said))
        found = labeler.label(texts)
        vectors = dict(zip(texts, found.cls, strict=True))
        signature["semb_score"] = f"semb|model:{labeler.sha256[:8]}|agg:mean"
        if options.reference_labels is None:
            codes = dict(zip(texts, found.codes, strict=True))
            out = [dataclasses.replace(item, labels=_of_predictions(item, codes)) for item in out]
            known: dict[str, Any] = {name: codes[text] for name, text in whole.items()}
            options = dataclasses.replace(options, reference_labels=known, labels_how=labeler.sha256[:8])
    if "radgraph" in there and options.reference_annotations is None:
        model = RadGraphModel(folder / "radgraph")
        entities = _once(model.annotate, said)
        out = [dataclasses.replace(item, annotations=_of_predictions(item, entities)) for item in out]
        how = f"v1-{model.sha256[:8]}"
        known = {name: entities[text] for name, text in whole.items()}
        options = dataclasses.replace(options, reference_annotations=known, annotations_how=how)
    scorer = BertScore(folder / "bertscore") if "bertscore" in there else None
    frequencies = scorer.frequencies(*corpus) if scorer and corpus else None
    out = [
        dataclasses.replace(item, scores=item.scores | _scores(item, options, vectors, signature, scorer, frequencies))
        for item in out
    ]
    count = len(inputs)
    return out[:count], dataclasses.replace(options, of_baselines=out[count:])


def _of_baseline(name: str, answers: dict[str, str], references: dict[str, str]) -> report.Input:
    """A baseline's reports as if they came from a file."""
    rows = [Row(i, "", references[i], text, line=0) for i, text in answers.items() if i in references]
    return report.Input(name, Predictions(rows, []))


def _scores(
    item: report.Input,
    options: report.Options,
    vectors: dict[str, np.ndarray],
    signature: dict[str, str],
    scorer: BertScore | None,
    frequencies: bertscore.Frequencies | None,
) -> dict[str, report.Given]:
    """bertscore, semb_score, radgraph_entity_relation and radcliq_* of one file, as far as there are models for them."""
    ids = [row.id for row in item.read.rows]
    said, true = [row.prediction for row in item.read.rows], [row.reference for row in item.read.rows]
    columns: dict[str, np.ndarray] = {}
    how: dict[str, str] = dict(signature)
    if vectors:
        columns["semb_score"] = bertscore.semb_scores(
            np.array([vectors[t] for t in said]), np.array([vectors[t] for t in true])
        )
    if scorer is not None:
        columns["bertscore"] = scorer.score(said, true, frequencies)[:, 2]
        how["bertscore"] = scorer.signature(frequencies)
    name = "radgraph_entity_relation"
    if item.annotations is not None and options.reference_annotations is not None:
        pairs = [(item.annotations.get(i), options.reference_annotations.get(i)) for i in ids]
        columns[name] = np.array([radgraph.f1(a, b, "entity_relation", True) if a is not None and b is not None else np.nan for a, b in pairs])  # fmt: skip
    # RadCliQ's published models were fitted to scores without frequencies, of this one encoder.
    fits = scorer is not None and scorer.baseline is not None and scorer.baseline.name == _RADCLIQ_ENCODER
    if scorer is not None and fits and name in columns and "semb_score" in columns:
        plain = columns["bertscore"] if frequencies is None else scorer.score(said, true, None)[:, 2]
        words = bleu.count_rows(said, true, bleu.CONVENTIONS["radcliq"])
        columns["bleu_2"] = bleu.from_counts(words, 2, bleu.CONVENTIONS["radcliq"])
        table = np.stack([(columns | {"bertscore": plain})[part] for part in radcliq.INPUTS], axis=1)
        made = f"bertscore:{how['bertscore'].split('|')[1]}|{how['semb_score']}|radgraph:{options.annotations_how}"
        for metric in radcliq.metrics(table, made):
            columns[metric.name], how[metric.name] = metric.each(), metric.signature
    return {
        metric: report.Given(how[metric], dict(zip(ids, values.tolist(), strict=True)))
        for metric, values in columns.items()
        if metric in how
    }


def _texts(item: report.Input) -> Iterable[str]:
    return (text for row in item.read.rows for text in (row.reference, row.prediction))


def _once(function: Callable[[Sequence[str]], Sequence[Any]], texts: Iterable[str]) -> dict[str, Any]:
    different = list(dict.fromkeys(texts))
    return dict(zip(different, function(different), strict=True))


def _of_predictions(item: report.Input, by_text: dict[str, Any]) -> dict[str, Any]:
    return {row.id: by_text[row.prediction] for row in item.read.rows}
