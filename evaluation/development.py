"""Scores a model while it trains: writes findings for a fixed slice of studies on the training mesh, and judges them with an interval."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from evaluation import bleu, findings, label_metrics, rouge, rule_labeler, scoring, statistics
from evaluation.corpus import ANNOTATED
from evaluation.metric import Metric
from evaluation.report import Parser, findings_of_annotations
from rad_jax import generate, input_pipeline, sharding
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError
from rad_jax.models.llava import Llava
from rad_jax.state import Tree, join

_SUPPORT = 5  # cases that a class needs to count; a slice is small
_WIDTH = 8  # prompts are padded to a multiple


class Development:
    """Called with the weights, it gives the row of `train.Beside.evaluate`. What does not change from call to call is made here, once.

    The metric is the one that `options.metric` names. Without a name it is the finding macro F1 where the corpus holds the truth, else micro
    F1 of the rules' 14 labels; where no class has enough cases, ROUGE-L. "rouge_l" is always in the row. Intervals resample patients (95 %).

    Args:
        options: config.evaluate.
        model: the one that trains.
        corpus: with the split and selection that `options` name.
        mesh: the devices.
        parse: reads findings from text, for a corpus with truth.

    Raises:
        UserError: the model cannot write findings of an image, there are no such studies, or no such metric of them.
    """

    def __init__(self, options: Any, model: Any, corpus: Corpus, mesh: Mesh, parse: Parser):
        if not isinstance(model, Llava) or model.config.vision is None:
            raise UserError("config.evaluate.every: this model writes no findings of an image; set it to 0.")
        self._mesh, self._options, self._tokenizer, self._parse = mesh, options, corpus.tokenizer(), parse
        # As launch.generate: the kernels of training do not read a cache.
        llm = dataclasses.replace(model.config.llm, attention="xla")
        vision = dataclasses.replace(model.config.vision, attention="xla")
        self._model = Llava(dataclasses.replace(model.config, llm=llm, vision=vision))
        source = corpus.source(options.split, options.selection)
        numbers = np.arange(min(options.studies, len(source)))
        self._records = [source[int(number)] for number in numbers]
        lengths = input_pipeline.prompt_lengths(corpus, options.split, options.selection, numbers)
        shares = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batches: Callable[[], Iterator[dict[str, np.ndarray]]] = functools.partial(
            input_pipeline.eval_batches,
            corpus,
            options.split,
            template="prompt",
            batch_size=-(-min(options.batch_size, len(numbers)) // shares) * shares,
            text_length=-(-int(lengths.max()) // _WIDTH) * _WIDTH,
            target_length=0,
            image_size=model.config.vision.image_size,
            selection=options.selection,
            order=numbers,
        )
        annotated = corpus.meta["dataset"] in ANNOTATED
        self._truth = [findings_of_annotations(r["annotations"]) for r in self._records] if annotated else None
        clusters = [record["patient"] or record["id"] for record in self._records]
        self._setting = scoring.Setting(clusters, "patient", statistics.DRAWS, statistics.SEED)
        self._slice = f"{options.split}/{options.selection}, {options.max_new_tokens} tokens"
        self._named = options.get("metric", "")
        if self._named:
            references = [record["findings"] for record in self._records]
            known = [m.name for m in (*self._found(references, references), self._words(references, references))]
            if self._named not in known:
                raise UserError(f"config.evaluate.metric={self._named} is unknown here: choose {', '.join(known)}.")

    def __call__(self, trainable: Tree, frozen: Tree, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """Writes and scores; None when `stopped`, which is asked before every batch, on all processes."""
        variables, texts = join(trainable, frozen), [""] * len(self._records)
        for batch in self._batches():
            if stopped():
                return None
            inputs = {name: batch[name] for name in ("image", "tokens", "length", "index")}
            with jax.set_mesh(self._mesh), nn.logical_axis_rules(sharding.RULES):
                ids = generate.generate(
                    self._model,
                    variables,
                    sharding.place_whole(inputs, self._mesh),
                    jax.random.key(0),
                    max_new_tokens=self._options.max_new_tokens,
                    eos_id=self._tokenizer.eos_id,
                )
            for number, row in zip(batch["index"].tolist(), sharding.gather(ids).tolist(), strict=True):
                if number >= 0:
                    end = row.index(self._tokenizer.eos_id) if self._tokenizer.eos_id in row else len(row)
                    texts[number] = self._tokenizer.decode(row[:end]).strip()
        return self.score(texts)

    def score(self, texts: list[str]) -> dict[str, Any]:
        """The row for these texts, in the order of the studies."""
        references = [record["findings"] for record in self._records]
        words, found = self._words(texts, references), self._found(texts, references)
        usual = next(m for m in found if m.name in ("finding_macro_f1", "rules_micro_14"))
        chosen = next(m for m in (usual, words) if np.isfinite(m.total()))
        if self._named:
            chosen = next(m for m in (*found, words) if m.name == self._named)
        (entry,) = scoring.entries([chosen], self._setting)
        low, high = entry["ci"]
        named = {"metric": chosen.name, "value": entry["value"], "low": low, "high": high}
        return {
            **named,
            "signature": entry["signature"],
            "slice": self._slice,
            "studies": len(texts),
            "rouge_l": words.total(),
        }

    def _words(self, texts: list[str], references: list[str]) -> Metric:
        return rouge.coco_metric(texts, references, bleu.tokens_clean, "tok:alnum|case:lc")

    def _found(self, texts: list[str], references: list[str]) -> Sequence[Metric]:
        if self._truth is not None:
            said = [self._parse(text) for text in texts]
            return findings.metrics(self._truth, said, min_support=_SUPPORT)
        how = f"labeler:rules-v{rule_labeler.VERSION}"
        coded = rule_labeler.label_all(references), rule_labeler.label_all(texts)
        return label_metrics.metrics(*coded, "rules", how)
