"""A packed corpus on disk, read without TensorFlow.

A corpus is a folder with `corpus.json`, one ArrayRecord dataset, `shards.json` (what its shards are known by), and an index of each selection
that packing made; one record is one film with all its texts, one row of an index is one text of one film.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax import prompts
from rad_jax.errors import UserError, check_format

SHARDS = "shards.json"
# Behind a selection's name: the same rows, asked without an indication. It needs no index of its own.
WITHOUT = ".without_indication"
# Bytes at the end of a shard that say where its records end; sizes of ArrayRecord files are rounded up to as many.
_END = 64 << 10
_AGAIN = "copy or pack the corpus again"


@dataclasses.dataclass(frozen=True)
class Lost:
    """A shard that cannot be used: the records of its split that were in it, and a sentence about it."""

    split: str
    records: range
    sentence: str


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
        """Opens a corpus and checks that every shard is there, readable, and as long as packing left it, in bytes and in records.

        Args:
            path: its folder.
            damaged: one of DAMAGED; with "count" the rows of shards that are missing, damaged or another corpus's get weight 0, and
                `lost` names those.

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
        """Random access to the rows of a selection of a split; with `WITHOUT` behind its name, no question has an indication.

        Raises:
            UserError: no such split or selection, no row in it, or an index that is damaged.
        """
        rows = self.rows(split, selection)
        if "members" in self.meta:
            end = WITHOUT if selection.endswith(WITHOUT) else ""
            chosen = {int(n): self.meta["members"][n]["selection"] + end for n in np.unique(rows[:, 0])}
            return Mixture({n: self._members[n].source(split, name) for n, name in chosen.items()}, rows)
        import tensorflow_datasets as tfds

        records = self._builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        return Source(
            records,
            rows,
            "without" if selection.endswith(WITHOUT) else self.meta["selections"][selection]["question"],
            f"{split} split of {self.path}",
            [shard.records for shard in self._lost if shard.split == split],
        )

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
        known = json.dumps(self.meta["selections"][selection.removesuffix(WITHOUT)], sort_keys=True)
        known += WITHOUT if selection.endswith(WITHOUT) else ""
        return hashlib.sha256(f"{self.meta['fingerprint']} {known}".encode()).hexdigest()

    def rows(self, split: str, selection: str) -> np.ndarray:
        """Record and text numbers of a selection, int32 [n, 2]; of a mixture, numbers of members and of their rows."""
        self._check_split(split)
        known, selection = self.meta["selections"], selection.removesuffix(WITHOUT)
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

    @property
    def lost(self) -> list[str]:
        """A sentence for each shard that is missing, damaged or of another length; raises as `open`."""
        if "members" in self.meta:
            return [sentence for member in self._members for sentence in member.lost]
        return [shard.sentence for shard in self._lost]

    @functools.cached_property
    def shards(self) -> Mapping[str, Mapping[str, Any]]:
        """Name of every shard -> what `known_by` gave when it was packed; empty for a mixture.

        Raises:
            UserError: this list is missing or damaged.
        """
        if "members" in self.meta:
            return {}
        file = self.path / SHARDS
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            # Corpora of earlier builds do not tell the ends.
            return {
                name: {"bytes": int(of["bytes"]), "end": of.get("end"), "sha256": str(of["sha256"])}
                for name, of in known.items()
            }
        except OSError as error:
            raise UserError(f"{file}: this list of the corpus's shards is missing, {_AGAIN}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file}: this list of the corpus's shards is damaged, {_AGAIN}") from error

    @functools.cached_property
    def _lost(self) -> list[Lost]:
        try:
            infos = self._builder.info.splits
        except Exception as error:  # tfds raises many kinds over its own json files
            raise UserError(f"{self.path / self.meta['builder_dir']}: no readable dataset, {_AGAIN}") from error
        found = []
        for split, count in self.splits.items():
            info = infos.get(split)
            if (info.num_examples if info else 0) != count:
                raise UserError(f"{self.path}: corpus.json counts {count} {split} records, the dataset other, {_AGAIN}")
            first = 0
            for name, length in zip(info.filepaths, info.shard_lengths, strict=True) if info else ():
                shard, records = Path(name), range(first, first + length)
                first += length
                state = _state(shard, self.shards.get(shard.name), length)
                if state:
                    found.append(Lost(split, records, f"{shard}: this shard of the corpus is {state}, {_AGAIN}"))
        return found


class Source:
    """Random access to rows: number -> dict of a film's features and of one of its texts.

    Texts are str, empty where there is none; the image is PNG bytes. `findings`, `impression`, `indication` and `method` are of the row's
    text, `question` is what its selection asks. The first text of a film has the film's id, another one "id~method".
    """

    def __init__(self, records: Any, rows: np.ndarray, question: str, name: str, lost: Sequence[range] = ()):
        """Args: records: random access to them; rows: record and text numbers, int [n, 2]; question: kind of it, of the selection;
        name: what errors call it; lost: records of shards that must not be read, though they may be readable."""
        self._records, self._rows, self._question, self._name = records, rows, question, name
        self._lost = lost

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        record_number, slot = map(int, self._rows[number])
        if any(record_number in records for records in self._lost):
            raise UserError(f"record {record_number} of the {self._name} is in a shard that is lost, {_AGAIN}")
        try:
            record = self._records[record_number]
        except RuntimeError as error:  # a checksum of the shard does not hold
            raise UserError(f"record {record_number} of the {self._name} is damaged, {_AGAIN}") from error
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


def known_by(shard: Path) -> dict[str, Any]:
    """What a shard is known by: its length in `bytes`, SHA-256 of its `end`, which is quickly read, and of the whole of it, `sha256`."""
    with shard.open("rb") as file:
        return {**_ends(shard), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def fingerprint_of(shards: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over names and contents of shards, in the order of their names, as `Corpus.shards` has them."""
    lines = "".join(f"{name} {shards[name]['sha256']}\n" for name in sorted(shards))
    return hashlib.sha256(lines.encode()).hexdigest()


def _ends(shard: Path) -> dict[str, Any]:
    with shard.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _END, 0))
        return {"bytes": size, "end": hashlib.sha256(file.read()).hexdigest()}


def _state(shard: Path, known: Mapping[str, Any] | None, records: int) -> str:
    """What is wrong with a shard, or nothing.

    A shard of another corpus may well hold as many records.
    """
    try:
        found = _ends(shard)
    except OSError:
        return "missing"
    if known is None or found["bytes"] != known["bytes"] or known["end"] not in (None, found["end"]):
        return "damaged or another corpus's"
    return "" if _records(str(shard)) == records else "damaged"


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
    if kind == "without":
        return prompts.question(None)
    return prompts.question(text["indication"])
