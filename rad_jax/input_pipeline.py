"""Packed corpus in, fixed-shape numpy batches out, through Grain.

Training reads the rows of a selection in an endless shuffled stream whose whole state is one integer, so that it
continues exactly on any number of processes. Evaluation reads them once, in order.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from rad_jax import images, prompts
from rad_jax.corpus import Corpus, Mixture, Source
from rad_jax.errors import UserError

Batch = dict[str, np.ndarray]

# What is made of a record; "prompt" is v1 up to where the answer begins, for generation; "text" is plain and v1 by turns, with the
# impression in place of the image, for pretraining.
TEMPLATES = ("text", "plain", "v1", "prompt", "clip")
CROPS, DAMAGED = ("centre", "random"), ("error", "count")
_WITHOUT_TARGETS = ("prompt", "clip")
# Rows that only fill up a batch have this record number and are made of this record, which gives them weight 0.
_PADDING = -1
_EMPTY: Mapping[str, Any] = {"image": b"", "findings": "", "impression": "", "question": prompts.question(None)}


def train_iterator(
    corpus: Corpus,
    split: str,
    *,
    template: str,
    batch_size: int,
    text_length: int,
    target_length: int,
    image_size: int,
    seed: int,
    selection: str,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    crop: str = "centre",
) -> grain.DatasetIterator:
    """An endless stream of shuffled batches, every row of the selection once per epoch, a new order each epoch.

    At every step the processes together hold the same rows whatever their number: process i has rows i, i + n, ...
    of the global batch. `get_state()` is {"global_next_index": rows given out}, equal on all processes, and
    `set_state` continues there on any number of processes.

    Args:
        corpus: an open corpus.
        split: its name.
        template: one of TEMPLATES.
        batch_size: rows of the global batch, a multiple of process_count.
        text_length: T, tokens per row; what is longer is cut and flagged.
        target_length: U, targets per row; what is longer is cut and flagged.
        image_size: side of the square in pixels, that of the corpus.
        seed: of the order.
        selection: of the corpus, which texts of which films.
        process_index: of this process.
        process_count: number of processes.
        num_threads: that prepare batches beside the training step; each works on a batch of its own.
        crop: one of CROPS: the square in the middle, or `images.random_crop` of the stored film, which depends on the seed, the epoch and
            the record alone.

    Returns:
        An iterator over batches, B = batch_size / process_count rows each:
        image uint8 [B, Y, X] (not for "text"); tokens int32 [B, T], with IMAGE_ID once for plain, v1 and prompt, padded
        with pad_id; length int32 [B], tokens before the padding; truncated int32 [B]; index int32 [B], row numbers;
        weight float32 [B], 0 for rows that do not count: record damaged, image not decodable, or no text to learn from; and unless the
        template is "prompt" or "clip": targets int32 [B, U], target_positions int32 [B, U], where in tokens the target
        is predicted, i.e. the place before its own, target_weights float32 [B, U].

    Raises:
        UserError: no such split or selection, no rows, or sizes that do not fit.
    """
    _check_batch(batch_size, process_count)
    if crop not in CROPS:
        raise UserError(f"config.data.crop={crop!r} is unknown, there are {', '.join(CROPS)}")
    rows = _Rows(corpus.source(split, selection), corpus, template, text_length, target_length, image_size)
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()

    def row(place: int, number: int) -> dict[str, Any]:
        if crop == "centre":
            return rows(number)
        return rows(number, np.random.default_rng([seed, place // len(rows), int(number)]))

    elastic = grain.experimental.ElasticIterator(
        order.map_with_index(row),
        batch_size,
        grain.sharding.ShardOptions(shard_index=process_index, shard_count=process_count),
        read_options=_read_options(num_threads),
    )
    return iter(elastic)


def eval_batches(
    corpus: Corpus,
    split: str,
    *,
    template: str,
    batch_size: int,
    text_length: int,
    target_length: int,
    image_size: int,
    selection: str,
    limit: int | None = None,
    order: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
) -> Iterator[Batch]:
    """The rows of a selection once, in order, in batches of full size; all processes get the same number of batches.

    Rows that fill up the last batch have weight 0 and index -1. Arguments and batches are those of `train_iterator`;
    `limit` takes only the first rows, `order` those row numbers one after another instead of the selection's.
    """
    _check_batch(batch_size, process_count)
    rows = _Rows(corpus.source(split, selection), corpus, template, text_length, target_length, image_size)
    numbers = np.arange(len(rows))[:limit] if order is None else order
    padded = np.concatenate([numbers, np.full(-len(numbers) % batch_size, _PADDING)])
    dataset = grain.MapDataset.source(padded)[process_index::process_count]
    batches = dataset.map(rows).batch(batch_size // process_count)
    return iter(batches.to_iter_dataset(read_options=_read_options(num_threads)))


def row_lengths(
    corpus: Corpus,
    split: str,
    selection: str,
    templates: Sequence[str],
    numbers: Sequence[int] | np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Tokens and targets of whole rows, int64 [n, 2] for each template; reads every text once, those of `numbers` or all."""
    source, tokenizer = corpus.source(split, selection), corpus.tokenizer()
    found: dict[str, list[tuple[int, int]]] = {template: [] for template in templates}
    for number in range(len(source)) if numbers is None else numbers:
        record = source[int(number)]
        for template in templates:
            example = render(tokenizer, template, record, int(number), limit=2**31)
            found[template].append((len(example.ids), sum(label != prompts.NO_LOSS for label in example.labels)))
    return {template: np.array(of, np.int64).reshape(-1, 2) for template, of in found.items()}


def prompt_lengths(corpus: Corpus, split: str, selection: str, numbers: np.ndarray) -> np.ndarray:
    """Tokens of the prompts of these rows, int64 [n]; reads each once."""
    return row_lengths(corpus, split, selection, ("prompt",), numbers)["prompt"][:, 0]


def longest(corpus: Corpus, split: str, selection: str, template: str) -> tuple[int, int]:
    """Most tokens and most targets that a row of this selection needs, each rounded up to a multiple of 8; reads every text once."""
    most = row_lengths(corpus, split, selection, (template,))[template].max(axis=0)
    text, targets = (-(-most // 8) * 8).tolist()
    return text, targets


def render(
    tokenizer: prompts.Tokenizer, template: str, record: Mapping[str, Any], number: int, limit: int
) -> prompts.Example:
    """A row's text as one of TEMPLATES; only "clip" cuts, to `limit` tokens."""
    findings = record["findings"]
    if template == "clip":
        return prompts.render_clip(tokenizer, findings or record["impression"], limit)
    question = record["question"]
    if template == "text":
        # A language model that has learned to write findings from an impression knows how to write them from what the projector says.
        impression = tokenizer.encode(record["impression"])
        if number % 2:
            return prompts.render_plain(tokenizer, findings, impression)
        return prompts.render_v1(tokenizer, question, findings, impression)
    if template == "plain":
        return prompts.render_plain(tokenizer, findings)
    return prompts.render_v1(tokenizer, question, None if template == "prompt" else findings)


class _Rows:
    """Turns a row number into a row: the fields of a batch without the axis B."""

    def __init__(
        self,
        source: Source | Mixture,
        corpus: Corpus,
        template: str,
        text_length: int,
        target_length: int,
        image_size: int,
    ):
        if template not in TEMPLATES:
            raise ValueError(f"unknown template {template!r}, there are {', '.join(TEMPLATES)}")
        if image_size != corpus.image_size:
            raise UserError(
                f"{corpus.path}: packed for images of {corpus.image_size} pixels, the config asks for {image_size}, "
                f"pack it again with --image_size={image_size}"
            )
        self._source = source
        self._tokenizer = corpus.tokenizer()
        self._template = template
        self._text_length = text_length
        self._target_length = target_length
        self._image_size = image_size
        shortest = len(self._render(_EMPTY, 0).ids)
        if text_length < shortest:
            raise UserError(
                f"text_length={text_length} is too short, the empty {template} prompt has {shortest} tokens"
            )

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, number: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """With `rng`, a random crop of the film."""
        try:
            record = self._source[int(number)] if number >= 0 else _EMPTY
        except UserError:  # damaged: a row of no weight, which is counted
            record = _EMPTY
        row = self._text_row(record, int(number))
        if self._template != "text":
            row["image"], decoded = self._image(record["image"], rng)
            row["weight"] *= np.float32(decoded)
        if "target_weights" in row:
            row["target_weights"] *= row["weight"]
        row["index"] = np.int32(number)
        return row

    def _render(self, record: Mapping[str, Any], number: int) -> prompts.Example:
        # For "clip" one more token than fits, to see whether it does.
        return render(self._tokenizer, self._template, record, number, self._text_length + 1)

    def _text_row(self, record: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Tokens and targets, cut at the end to T and U; weight 0 without a text to learn from or a whole prompt."""
        example = self._render(record, number)
        truncated = len(example.ids) > self._text_length
        if truncated and self._template == "clip":
            example = render(self._tokenizer, "clip", record, number, self._text_length)
        ids = example.ids[: self._text_length]
        row: dict[str, Any] = {
            "tokens": _padded(ids, self._text_length, self._tokenizer.pad_id),
            "length": np.int32(len(ids)),
        }
        has_text = bool(record["findings"] or (self._template == "clip" and record["impression"]))
        usable = not truncated if self._template == "prompt" else has_text
        if self._template not in _WITHOUT_TARGETS:
            labels = np.asarray(example.labels[: self._text_length], np.int32)
            places = np.flatnonzero(labels != prompts.NO_LOSS)
            truncated |= len(places) > self._target_length
            places = places[: self._target_length]
            usable &= len(places) > 0
            row["targets"] = _padded(labels[places], self._target_length, self._tokenizer.pad_id)
            row["target_positions"] = _padded(places - 1, self._target_length, 0)
            row["target_weights"] = _padded(np.ones(len(places)), self._target_length, 0).astype(np.float32)
        row["truncated"] = np.int32(truncated)
        row["weight"] = np.float32(usable)
        return row

    def _image(self, data: bytes, rng: np.random.Generator | None) -> tuple[np.ndarray, bool]:
        """The square uint8 [Y, X], black where the stored image cannot be decoded, and whether it could."""
        try:
            film = images.decode_png(data)
            if rng is not None:
                return images.random_crop(film, self._image_size, rng), True
            return images.centre_crop(film, self._image_size), True
        except (UserError, ValueError):  # damaged, or smaller than the corpus says
            return np.zeros((self._image_size, self._image_size), np.uint8), False


def _padded(values: Sequence[int] | np.ndarray, length: int, fill: int) -> np.ndarray:
    """int32 [length], `values` followed by `fill`."""
    out = np.full(length, fill, np.int32)
    out[: len(values)] = values
    return out


def _check_batch(batch_size: int, process_count: int) -> None:
    if batch_size % process_count:
        raise UserError(f"batch_size={batch_size} cannot be shared by {process_count} processes, use a multiple")


def _read_options(num_threads: int) -> grain.ReadOptions:
    """A small buffer of whole batches: Grain's own default of 500 elements would be 500 batches."""
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
