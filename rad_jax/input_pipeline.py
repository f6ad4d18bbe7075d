"""Packed corpus in, fixed-shape numpy batches out: TFDS and ArrayRecord read through Grain, without TensorFlow.

A corpus is a folder with `corpus.json`, one ArrayRecord dataset, and an index of each selection that packing made; one
record is one film with all its texts, one row of an index is one text of one film. Training reads the rows of a
selection in an endless shuffled stream whose whole state is one integer, so that it continues exactly on any number of
processes. Evaluation reads them once, in order.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from rad_jax import images, prompts
from rad_jax.errors import UserError, check_format

Batch = dict[str, np.ndarray]

# What is made of a record; "prompt" is v1 up to where the answer begins, for generation; "text" is plain and v1 by turns, with the
# impression in place of the image, for pretraining.
TEMPLATES = ("text", "plain", "v1", "prompt", "clip")
CROPS, DAMAGED = ("centre", "random"), ("error", "count")
_WITHOUT_TARGETS = ("prompt", "clip")
# Rows that only fill up a batch have this record number and are made of this record, which gives them weight 0.
_PADDING = -1
_EMPTY: Mapping[str, Any] = {"image": b"", "findings": "", "impression": "", "question": prompts.question(None)}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A packed corpus on disk.

    Attributes:
        path: its folder.
        meta: the contents of corpus.json.
        damaged: one of DAMAGED, what to do about shards that are.
    """

    path: Path
    meta: Mapping[str, Any]
    damaged: str = "error"

    @classmethod
    def open(cls, path: str | os.PathLike[str], damaged: str = "error") -> "Corpus":
        """Opens a corpus and checks that every shard is there, readable and as long as the dataset says.

        Args:
            path: its folder.
            damaged: one of DAMAGED; with "count" the rows of shards that are missing or damaged get weight 0, and `lost` names those.

        Raises:
            UserError: no corpus there, one of another format version, or shards that are missing or damaged.
        """
        path = Path(path)
        file = path / "corpus.json"
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{path}: no packed corpus here ({file.name} is missing), make one with launch.pack"
            ) from error
        except ValueError as error:
            raise UserError(f"{file}: damaged, pack the corpus again") from error
        check_format(meta.get("format_version"), file)
        if "selections" not in meta:
            raise UserError(f"{file}: has no selections, pack the corpus again")
        corpus = cls(path, meta, damaged)
        if "members" in meta:
            corpus._check_members()
        elif corpus.lost and damaged == "error":
            raise UserError(corpus.lost[0])
        return corpus

    @property
    def image_size(self) -> int:
        """Short side of the stored images in pixels."""
        return self.meta["image_size"]

    @property
    def access(self) -> str:
        """Who may have its texts and images, one of `chat.access.LEVELS`; private where the corpus does not say."""
        return self.meta.get("access", "private")

    @property
    def splits(self) -> Mapping[str, int]:
        """Number of records of each split."""
        return self.meta["splits"]

    def tokenizer(self) -> prompts.Tokenizer:
        """The tokenizer saved with the corpus."""
        return prompts.load_tokenizer(self.path / self.meta["tokenizer"])

    def source(self, split: str, selection: str = "all") -> "Source | Mixture":
        """Random access to the rows of a selection of a split.

        Raises:
            UserError: no such split or selection, no row in it, or an index that is damaged.
        """
        rows = self.rows(split, selection)
        if "members" in self.meta:
            chosen = {int(n): self.meta["members"][n]["selection"] for n in np.unique(rows[:, 0])}
            return Mixture({n: self._members[n].source(split, name) for n, name in chosen.items()}, rows)
        import tensorflow_datasets as tfds

        records = self._builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        return Source(records, rows, self.meta["selections"][selection]["question"], f"{split} split of {self.path}")

    def identity(self, split: str, selection: str) -> dict[str, Any]:
        """What a run and its texts remember of their data: where the rows come from, how many, and a fingerprint of all of it.

        The fingerprint begins with the number of rows.
        """
        rows = len(self.rows(split, selection))
        return {
            "dataset": self.meta["dataset"],
            "split": split,
            "selection": selection,
            "rows": rows,
            "fingerprint": f"{rows}-{self.fingerprint(selection)}",
        }

    def fingerprint(self, selection: str) -> str:
        """SHA-256 over the shards' and over the indices of a selection: equal where its rows are."""
        known = json.dumps(self.meta["selections"][selection], sort_keys=True)
        return hashlib.sha256(f"{self.meta['fingerprint']} {known}".encode()).hexdigest()

    def rows(self, split: str, selection: str) -> np.ndarray:
        """Record and text numbers of a selection, int32 [n, 2]; of a mixture, numbers of members and of their rows."""
        self._check_split(split)
        known = self.meta["selections"]
        if selection not in known:
            raise UserError(f"{self.path}: no selection {selection!r}, there are {', '.join(known)}")
        expected, path = known[selection]["splits"][split], self.path / "index" / f"{selection}-{split}.npy"
        if not expected["rows"]:
            raise UserError(f"{self.path}: the selection {selection!r} has no rows in the split {split!r}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: this index of the corpus is missing, copy or pack the corpus again") from error
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise UserError(f"{path}: this index of the corpus is damaged, copy or pack the corpus again")
        return np.load(io.BytesIO(data))

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(str(self.path / self.meta["builder_dir"]))

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise UserError(f"{self.path}: no split {split!r}, there are {', '.join(self.splits)}")
        if not self.splits[split]:
            raise UserError(f"{self.path}: split {split!r} has no records")

    @functools.cached_property
    def _members(self) -> list["Corpus"]:
        return [Corpus.open(self.path / member["path"], self.damaged) for member in self.meta["members"]]

    def _check_members(self) -> None:
        """Opens the corpora of a mixture, and refuses one that was packed anew since."""
        for corpus, member in zip(self._members, self.meta["members"], strict=True):
            if corpus.fingerprint(member["selection"]) != member["fingerprint"]:
                raise UserError(f"{corpus.path}: is not the corpus that {self.path} was mixed from, mix it again")

    @functools.cached_property
    def lost(self) -> list[str]:
        """A sentence for each shard that is missing, damaged or of another length, as reading a record would show; raises as `open`."""
        if "members" in self.meta:
            return [sentence for member in self._members for sentence in member.lost]
        again = "copy or pack the corpus again"
        try:
            infos = self._builder.info.splits
        except Exception as error:  # tfds raises many kinds over its own json files
            raise UserError(f"{self.path / self.meta['builder_dir']}: no readable dataset, {again}") from error
        found = []
        for split, count in self.splits.items():
            info = infos.get(split)
            if (info.num_examples if info else 0) != count:
                raise UserError(f"{self.path}: corpus.json counts {count} {split} records, the dataset other, {again}")
            for name, length in zip(info.filepaths, info.shard_lengths, strict=True) if info else ():
                state = "missing" if not os.path.exists(name) else "damaged" if _records(str(name)) != length else ""
                if state:
                    found.append(f"{name}: this shard of the corpus is {state}, {again}")
        return found


class Source:
    """Random access to rows: number -> dict of a film's features and of one of its texts.

    Texts are str, empty where there is none; the image is PNG bytes. `findings`, `impression`, `indication` and `method` are of the row's
    text, `question` is what its selection asks. The first text of a film has the film's id, another one "id~method".
    """

    def __init__(self, records: Any, rows: np.ndarray, question: str, name: str):
        self._records, self._rows, self._question, self._name = records, rows, question, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        record_number, slot = map(int, self._rows[number])
        try:
            record = self._records[record_number]
        except RuntimeError as error:  # a checksum of the shard does not hold
            raise UserError(
                f"record {record_number} of the {self._name} is damaged, copy or pack the corpus again"
            ) from error
        row = {
            key: value.decode() if isinstance(value, bytes) and key != "image" else value
            for key, value in record.items()
        }
        text = json.loads(row.pop("texts"))[slot]
        if slot:
            row["id"] = f"{row['id']}~{text['method']}"
        row |= {name: text[name] or "" for name in ("findings", "impression", "indication", "method")}
        row["question"] = _question(self._question, row["view"], text)
        return row


class Mixture:
    """Random access to the rows of several sources by (source, row of it), int [n, 2]."""

    def __init__(self, sources: Mapping[int, "Source | Mixture"], rows: np.ndarray):
        self._sources, self._rows = sources, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        source, row = map(int, self._rows[number])
        return self._sources[source][row]


def _records(shard: str) -> int:
    """Records of a shard; -1 of one that cannot be read."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(shard)
        count = reader.num_records() if reader.ok() else -1
        reader.close()  # shows damage that the rest does not
        return count
    except RuntimeError:
        return -1


def _question(kind: str, view: str, text: Mapping[str, Any]) -> str:
    """What the prompt asks, of a kind that a selection names."""
    if kind == "view":
        return prompts.view_question(view)
    if kind == "stored":
        return text["prompt"] or ""
    return prompts.question(text["indication"])


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


def prompt_lengths(corpus: Corpus, split: str, selection: str, numbers: np.ndarray) -> np.ndarray:
    """Tokens of the prompts of these rows, int64 [n]; reads each once."""
    source, tokenizer = corpus.source(split, selection), corpus.tokenizer()
    prompts_of = (render(tokenizer, "prompt", source[int(number)], int(number), 2**31) for number in numbers)
    return np.array([len(prompt.ids) for prompt in prompts_of], int)


def longest(corpus: Corpus, split: str, selection: str, template: str) -> tuple[int, int]:
    """Most tokens and most targets that a row of this selection needs, each rounded up to a multiple of 8; reads every text once."""
    source, tokenizer = corpus.source(split, selection), corpus.tokenizer()
    text = targets = 0
    for number in range(len(source)):
        example = render(tokenizer, template, source[number], number, limit=2**31)
        text = max(text, len(example.ids))
        targets = max(targets, sum(label != prompts.NO_LOSS for label in example.labels))
    return -(-text // 8) * 8, 0 if template in _WITHOUT_TARGETS else -(-targets // 8) * 8


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
