"""What is in a packed corpus: counted from its records, for people to look at before a pod is spent on it."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from data.labels import CHEXPERT
from data.selections import duplicates
from data.shards import sha256
from rad_jax.corpus import SHARDS, Corpus, fingerprint_of
from rad_jax.errors import UserError
from rad_jax.input_pipeline import row_lengths

STATES = {1: "positive", 0: "negative", -1: "uncertain"}  # of a label; -2 is not stated
_COUNTED = ("view", "sex")
STAGES = {"clip": "stage 1", "plain": "stage 2", "v1": "stage 3"}  # template -> who reads it
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
_KEPT = 0.99  # of the rows should be whole
_WHOLE, _BLOCK = 8, 128  # multiples of text, and of a whole row: a TPU works in 128


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was found.

    Attributes:
        corpus: that was looked at.
        films: records that were counted, of each split.
        tokens: tokens of each findings section, of each split, int64.
        rows: tokens and targets of whole rows of the training split's selection, int64 [n, 2], for each template of STAGES; empty if it has none.
        labels: (label, state) -> films; states are those of STATES.
        counts: "view", "sex", "method" (of the texts) and "sections" -> value -> how often.
        patients: of each split.
        boxes: films with boxes.
        samples: some records, evenly spaced over each split, with "split" and decoded texts.
        skipped: rows of skipped.csv.
    """

    corpus: Corpus
    films: Mapping[str, int]
    tokens: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]
    labels: Counter[tuple[str, str]]
    counts: Mapping[str, Counter[str]]
    patients: Mapping[str, int]
    boxes: int
    samples: Sequence[Mapping[str, Any]]
    skipped: Sequence[Mapping[str, str]]

    @property
    def name(self) -> str:
        return self.corpus.path.name


def members(path: Path, damaged: str = "error") -> list[Corpus]:
    """The corpus in a folder, or those that it is a mixture of, opened as `Corpus.open` does."""
    corpus = Corpus.open(path, damaged)
    parts = corpus.meta.get("members")
    return [Corpus.open(path / part["path"], damaged) for part in parts] if parts else [corpus]


def verify(corpus: Corpus, progress: bool = True) -> list[str]:
    """A sentence for each shard whose contents are not those that were packed. Reads all of them.

    Args:
        corpus: no mixture.
        progress: show a bar on stderr, in bytes.

    Raises:
        UserError: the list of the shards is missing, damaged, or not the one of this corpus.
    """
    again, folder = "copy or pack the corpus again", corpus.path / corpus.meta["builder_dir"]
    if fingerprint_of(corpus.shards) != corpus.meta["fingerprint"]:
        raise UserError(f"{corpus.path / SHARDS}: this list of shards is damaged or another corpus's, {again}.")
    found = []
    total = sum(shard["bytes"] for shard in corpus.shards.values())
    what = f"verifying {corpus.path.name}"
    with tqdm.tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, shard in corpus.shards.items():
            path = folder / name
            try:
                state = "" if sha256(path) == shard["sha256"] else "damaged or another corpus's"
            except FileNotFoundError:
                state = "missing"
            except OSError as error:
                state = f"unreadable ({error.strerror})"
            if state:
                found.append(f"{path}: this shard of the corpus is {state}, {again}.")
            bar.update(shard["bytes"])
    return found


def look(corpus: Corpus, films: int, samples: int, selection: str = "frontal", progress: bool = True) -> Facts:
    """Reads up to `films` records of each split, evenly spaced, and keeps `samples` of all splits together.

    As many rows of the training split's `selection` are measured.

    Raises:
        UserError: a record is damaged.
    """
    tokenizer = corpus.tokenizer()
    builder = tfds.builder_from_directory(str(corpus.path / corpus.meta["builder_dir"]))
    lengths: dict[str, np.ndarray] = {}
    patients: dict[str, set[str]] = {}
    labels: Counter[tuple[str, str]] = Counter()
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*_COUNTED, "method", "sections")}
    kept: list[dict[str, Any]] = []
    boxes = 0
    splits = {split: count for split, count in corpus.splits.items() if count}
    for split, count in splits.items():
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        numbers = _spaced(count, films)
        shown = set(_spaced(count, -(-samples // len(splits))))
        found: list[int] = []
        patients[split] = set()
        for number in tqdm.tqdm(sorted(shown | set(numbers)), desc=f"reading {split}", disable=not progress):
            record = _decoded(source, number, corpus)
            if number in shown:
                kept.append(record | {"split": split})
            patients[split].add(record["patient"])
            boxes += any(a.get("box") for a in record["annotations"])
            for name in _COUNTED:
                counts[name][record[name] or "not known"] += 1
            for label, value in zip(CHEXPERT, record["labels"], strict=True):
                if int(value) in STATES:
                    labels[label, STATES[int(value)]] += 1
            for text in record["texts"]:
                counts["method"][text["method"]] += 1
                counts["sections"].update(name for name in ("findings", "impression", "indication") if text[name])
                if text["findings"]:
                    found.append(len(tokenizer.encode(text["findings"])))
        lengths[split] = np.asarray(found, np.int64)
    with (corpus.path / "skipped.csv").open(newline="") as file:
        skipped = list(csv.DictReader(file))
    return Facts(
        corpus=corpus,
        films={split: len(set(_spaced(count, films))) for split, count in splits.items()},
        tokens=lengths,
        rows=_row_lengths(corpus, selection, films),
        labels=labels,
        counts=counts,
        patients={split: len(of) for split, of in patients.items()},
        boxes=boxes,
        samples=kept[:samples],
        skipped=skipped,
    )


def shared(corpora: Sequence[Corpus]) -> list[dict[str, Any]]:
    """Equal and similar films in two splits, of one corpus or of two: what is held out in the one must not be learned in the other.

    Returns:
        Rows of first, second ("NAME split"), equal, near, and `leak`: whether one is a training split and the other is not.
    """
    places = [(corpus, split) for corpus in corpora for split, count in corpus.splits.items() if count]
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for kind, pairs in duplicates([(corpus.path, split) for corpus, split in places]).items():
        for later, _, earlier, _ in pairs.tolist():
            if later == earlier:
                continue
            names = [f"{corpus.path.name} {split}" for corpus, split in (places[earlier], places[later])]
            leak = (places[earlier][1] == "train") != (places[later][1] == "train")
            row = {"first": names[0], "second": names[1], "equal": 0, "near": 0, "leak": leak}
            rows.setdefault((earlier, later), row)[kind] += 1
    return [rows[key] for key in sorted(rows)]


def histogram(lengths: np.ndarray, bins: int = 30) -> list[tuple[int, int, int]]:
    """(least, greatest, texts) of equally wide bins, whole numbers of tokens."""
    if not len(lengths):
        return []
    width = max(1, -(-(int(lengths.max()) + 1) // bins))
    counts = np.bincount(lengths // width)
    return [(k * width, (k + 1) * width - 1, int(count)) for k, count in enumerate(counts)]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long the rows of a template are, and what to set.

    Attributes:
        text, targets: tokens, and targets among them, at each of QUANTILES: the least number that so many rows do not exceed.
        text_length, target_length: the settings; 0 targets where the template has none.
        row: with the image tokens.
        kept: share of the rows that are then whole.
    """

    text: list[int]
    targets: list[int]
    text_length: int
    target_length: int
    row: int
    kept: float


def lengths(rows: np.ndarray, image_tokens: int) -> Lengths:
    """Quantiles, and the shortest setting that leaves 99 of 100 rows whole.

    A row of words and image is as long as a multiple of 128, all of it used for text; the targets are those of the rows that fit it.

    Args:
        rows: tokens with one for the image, and targets, int64 [n, 2], n > 0.
        image_tokens: that the one becomes; 0 where words and image have a tower each.
    """
    text, targets = (np.quantile(rows, QUANTILES, axis=0, method="inverted_cdf").astype(int).T).tolist()
    needed = int(np.quantile(rows[:, 0], _KEPT, method="inverted_cdf"))
    extra = max(image_tokens - 1, 0)
    row = _up(needed + extra, _BLOCK if image_tokens else _WHOLE)
    fits = rows[:, 0] <= row - extra
    target = min(_up(int(rows[fits, 1].max()), _WHOLE), row - extra)
    return Lengths(text, targets, row - extra, target, row, float(fits.mean()))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _row_lengths(corpus: Corpus, selection: str, most: int) -> dict[str, np.ndarray]:
    known = corpus.meta["selections"].get(selection)
    count = known["splits"].get("train", {"rows": 0})["rows"] if known else 0
    return row_lengths(corpus, "train", selection, tuple(STAGES), _spaced(count, most)) if count else {}


def _spaced(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist() if most else []


def _decoded(source: Any, number: int, corpus: Corpus) -> dict[str, Any]:
    try:
        record = source[number]
    except RuntimeError as error:
        raise UserError(f"{corpus.path}: record {number} is damaged: copy or pack the corpus again.") from error
    found = {k: v.decode() if isinstance(v, bytes) and k != "image" else v for k, v in record.items()}
    return found | {name: json.loads(found[name]) for name in ("texts", "annotations")}
