"""Packs a corpus: builds it beside its place, adds tokenizer and manifest, and moves it there whole.

A corpus folder holds the TFDS ArrayRecord data set, `corpus.json` (what it is), `index` (the rows of every selection), `shards.json`
(length and checksum of every shard), `skipped.csv` (what was left out and why) and the tokenizer. Until everything is written it lies in a
hidden folder beside, so nothing half-written is found. A pack that was stopped leaves its finished shards there, and the next one with the
same arguments goes on from them.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import tensorflow_datasets as tfds
from absl import logging
from PIL import features as pillow_features

import rad_jax
from data.corpora import builder_class
from data.records import SPLITS, CorpusBuilder, features
from data.selections import count_duplicates, count_patients, write_indices
from data.shards import BAD_ROWS, Skip, Stopped, sha256
from rad_jax import prompts
from rad_jax.corpus import SHARDS, fingerprint_of, known_by
from rad_jax.errors import UserError, check_format

MANIFEST = "corpus.json"
_LEAST_STUDIES, _LEAST_IMAGE = 10, 16


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What decides a corpus: two packs with equal arguments write the same corpus.

    Attributes:
        dataset: one of `corpora.CORPORA`.
        source: the folder that holds the corpus as its publisher lays it out; None for the phantom.
        image_size: short side of the stored images, in pixels.
        studies: number of phantom studies; seed: of the phantom.
        tokenizer: a file to copy, or None to train one of `vocab_size` pieces.
        structured: a file of launch.structure, whose texts are packed beside the corpus's own.
        dicom: one of `images.DICOM_STYLES`; the phantom has none.
    """

    dataset: str
    source: str | None
    image_size: int
    studies: int
    seed: int
    tokenizer: str | None
    vocab_size: int
    structured: str | None = None
    dicom: str = "window"

    def check(self) -> None:
        """Raises UserError when these cannot be packed."""
        builder_class(self.dataset)
        if self.dataset != "phantom" and not self.source:
            raise UserError(f"--dataset={self.dataset} needs --source, the folder that holds it: give one.")
        if self.dataset == "phantom" and self.source:
            raise UserError("--dataset=phantom is drawn and takes no --source: leave it out.")
        if self.dataset == "phantom" and self.structured:
            raise UserError("--dataset=phantom needs no structured reports: leave --structured out.")
        for name, value, least in (
            ("image_size", self.image_size, _LEAST_IMAGE),
            ("studies", self.studies, _LEAST_STUDIES),
            ("vocab_size", self.vocab_size, prompts.MIN_VOCAB_SIZE),
        ):
            if value < least:
                raise UserError(f"--{name}={value} is too small: use at least {least}.")

    def identity(self) -> dict[str, Any]:
        """The arguments that matter for this data set, files by their content, for comparison with an earlier pack."""
        known: dict[str, Any] = {"dataset": self.dataset, "image_size": self.image_size}
        if self.dataset == "phantom":
            known |= {"studies": self.studies, "seed": self.seed}
        else:
            defining = builder_class(self.dataset).defining(Path(self.source or ""))
            known |= {"source": _sha256_of(defining), "dicom": self.dicom}
        if self.structured:
            known["structured"] = _sha256(Path(self.structured))
        if self.tokenizer:
            return known | {"tokenizer": _sha256(Path(self.tokenizer))}
        return known | {"vocab_size": self.vocab_size}

    def builder(self, **options: Any) -> CorpusBuilder:
        """The TFDS builder of this data set; `options` as `CorpusBuilder` and TFDS have them."""
        options |= {"image_size": self.image_size}
        options |= (
            {"studies": self.studies, "seed": self.seed}
            if self.dataset == "phantom"
            else {"source": self.source, "structured": self.structured, "dicom": self.dicom}
        )
        made: CorpusBuilder = builder_class(self.dataset)(**options)
        return made


def pack(
    arguments: Arguments,
    out: Path,
    workers: int,
    progress: bool = True,
    *,
    bad_rows: float = BAD_ROWS,
    beam: Sequence[str] | None = None,
) -> tuple[dict[str, Any], bool]:
    """Packs a corpus into the folder `out`.

    Args:
        arguments: what to pack.
        out: the corpus folder; must not exist, be empty, or hold the corpus of the same arguments.
        workers: processes.
        progress: whether to show a bar.
        bad_rows: share of the inputs that may be missing or damaged.
        beam: options of Apache Beam, which then does the work instead of `workers`: ["--runner=DirectRunner", ...].

    Returns:
        The manifest, and whether it was packed now (False: it was there already).

    Raises:
        UserError: wrong arguments or input, or `out` holds something else.
        shards.Stopped: worker processes were killed, or too many inputs are damaged; the next call goes on.
    """
    arguments.check()
    out = out.expanduser().absolute()
    if out.exists():
        found = existing(out, arguments.identity())
        if found:
            return found, False
    if arguments.tokenizer:
        prompts.load_tokenizer(arguments.tokenizer)  # before the long work, not after it
    config = _beam_config(beam)
    with staging(out, arguments.identity() | _versions()) as (folder, work):
        builder = arguments.builder(data_dir=folder, work=work, workers=workers, progress=progress, bad_rows=bad_rows)
        _build(builder, folder, config)
        manifest = _manifest(arguments, builder, folder, _tokenizer(arguments, builder, folder))
        _write_skipped(builder, folder)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        folder.rename(out)
    return manifest, True


def existing(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the finished corpus in `out` if it has these arguments; None if `out` is an empty folder."""
    path = out / MANIFEST
    if not path.is_file():
        if out.is_dir() and not any(out.iterdir()):
            return None
        raise UserError(f"{out}: exists and is no corpus: give another --out, or remove it.")
    try:
        manifest = json.loads(path.read_text())
        found = manifest["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: remove the folder {out} and pack again.") from error
    check_format(manifest.get("format_version"), path)
    differ = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if differ:
        what = ", ".join(f"{k} {found.get(k)} instead of {wanted.get(k)}" for k in differ)
        raise UserError(f"{out}: holds a corpus of other arguments ({what}): give another --out, or remove it.")
    return manifest


@contextlib.contextmanager
def staging(out: Path, identity: dict[str, Any] | None = None) -> Iterator[tuple[Path, Path]]:
    """A folder beside `out` to build in, and one for finished shards, which outlives a pack that was stopped.

    A pack that ends with a corpus or with a mistake of the user's leaves nothing. What is left by one that was killed, stopped by a full disk
    or by damaged films, or lost its workers, is used by a pack of the same `identity` and removed by any other. A file lock, which the
    system drops with the process, tells a running pack from a killed one.
    """
    outer = out.parent / f".{out.name}.packing"
    outer.mkdir(parents=True, exist_ok=True)
    with (outer / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another pack is writing it: wait for that one, or give another --out.") from error
        folder, work, note = outer / "corpus", outer / "shards", outer / "arguments.json"
        shutil.rmtree(folder, ignore_errors=True)
        told = json.dumps(identity, sort_keys=True)
        if not note.is_file() or note.read_text() != told:
            shutil.rmtree(work, ignore_errors=True)
            note.write_text(told)
        folder.mkdir()
        work.mkdir(exist_ok=True)
        keep = False
        try:
            yield folder, work
        except BaseException as error:
            keep = isinstance(error, Stopped) or not isinstance(error, UserError)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if not (keep and any(work.glob("*.json"))):
                shutil.rmtree(outer, ignore_errors=True)


def _versions() -> dict[str, Any]:
    """What else decides the bytes of a record."""
    return {"rad_jax": rad_jax.__version__, "pillow": PIL.__version__, "features": sorted(features())}


def _beam_config(options: Sequence[str] | None) -> Any:
    """TFDS's settings for a pack on Beam; None without options.

    Raises:
        UserError: Beam is not installed.
    """
    if options is None:
        return None
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "--beam_pipeline_options needs Apache Beam, in an environment of its own: pip install apache-beam, or leave it out."
        ) from error
    return tfds.download.DownloadConfig(beam_options=PipelineOptions(list(options)))


def _build(builder: CorpusBuilder, folder: Path, config: Any) -> None:
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        # TFDS announces a download on stdout, and makes a folder for it; nothing is downloaded.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    except RuntimeError as error:  # what ArrayRecord makes of a failed write
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent.parent)) from error
        raise
    finally:
        logging.set_verbosity(verbosity)
    shutil.rmtree(folder / "downloads", ignore_errors=True)


def _tokenizer(arguments: Arguments, builder: CorpusBuilder, folder: Path) -> str:
    """Puts the tokenizer into the corpus; returns the name of its file."""
    if arguments.tokenizer:
        given = Path(arguments.tokenizer)
        name = "vocab.txt" if given.suffix == ".txt" else f"tokenizer{given.suffix}"
        shutil.copyfile(given, folder / name)
        return name
    rows = _training_text(builder)
    if not rows:
        raise UserError("the training split is empty, so no tokenizer can be trained: give one with --tokenizer.")
    prompts.train_tokenizer(rows, arguments.vocab_size, folder / "tokenizer.json")
    return "tokenizer.json"


def _training_text(builder: CorpusBuilder) -> list[tuple[str | None, str]]:
    """(indication, findings or else impression) of all texts of the training records."""
    if not builder.written["train"]:
        return []
    source = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    texts = [text for number in range(len(source)) for text in json.loads(source[number]["texts"])]
    return [(text["indication"] or None, text["findings"] or text["impression"] or "") for text in texts]


def _manifest(arguments: Arguments, builder: CorpusBuilder, folder: Path, tokenizer: str) -> dict[str, Any]:
    written = builder.written.total()
    provenance = {
        "rad_jax": rad_jax.__version__,
        "pillow": PIL.__version__,
        # What turned the films' bytes into pixels.
        "decoders": {codec: pillow_features.version(codec) for codec in ("jpg", "libjpeg_turbo", "zlib")}
        | {package: metadata.version(package) for package in ("pydicom", "python-gdcm")},
        "numpy": np.__version__,
        "tensorflow_datasets": tfds.__version__,
    }
    if arguments.dataset == "phantom":
        provenance["seed"] = arguments.seed
    else:
        provenance["source"] = str(arguments.source)
    splits = {split: builder.written[split] for split in SPLITS}
    selections = write_indices(builder, builder.selections, splits, folder)
    duplicates = count_duplicates(folder, SPLITS)
    return {
        "format_version": rad_jax.FORMAT_VERSION,
        "dataset": arguments.dataset,
        "access": builder.access,
        "builder_dir": str(Path(builder.data_dir).relative_to(folder)),
        "image_size": arguments.image_size,
        "tokenizer": tokenizer,
        "splits": splits,
        "selections": selections,
        "published": {
            name: {
                split: {"rows": selections[name]["splits"][split]["rows"], "published": count}
                for split, count in of_split.items()
            }
            for name, of_split in builder.published.items()
            if name in selections
        },
        "summary": {
            "read": written + len(builder.skipped),
            "written": written,
            "skipped": dict(Counter(skip.reason for skip in builder.skipped)),
            "counts": dict(builder.counts),
            "views": dict(builder.views.most_common()),
            "patients": count_patients(folder, SPLITS),
            "duplicate_images": duplicates["equal"],
            "near_duplicates": duplicates["near"],
            "bytes": sum(path.stat().st_size for path in Path(builder.data_dir).iterdir()),
        },
        "fingerprint": _fingerprint(Path(builder.data_dir), folder),
        "arguments": arguments.identity(),
        "provenance": provenance,
    }


def _fingerprint(builder_dir: Path, folder: Path) -> str:
    """`fingerprint_of` the shards; writes what each is `known_by` to `shards.json`."""
    found = {path.name: path for path in builder_dir.iterdir() if ".array_record" in path.name}
    known = {name: known_by(found[name]) for name in sorted(found)}
    (folder / SHARDS).write_text(json.dumps(known, indent=1) + "\n")
    return fingerprint_of(known)


def _sha256_of(paths: Sequence[Path]) -> str:
    """SHA-256 over names and contents of some files; of one file, that of its contents."""
    if len(paths) == 1:
        return _sha256(paths[0])
    return hashlib.sha256("".join(f"{path.name} {_sha256(path)}\n" for path in paths).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: check the path.") from error


def _write_skipped(builder: CorpusBuilder, folder: Path) -> None:
    with (folder / "skipped.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Skip))
        writer.writerows(dataclasses.astuple(skip) for skip in builder.skipped)
