"""What one record of a corpus is, and the TFDS builders that every corpus derives from.

A record is one image (8-bit grey PNG, short side at training size) with all its texts, ids, labels and provenance.
Nothing here needs TensorFlow: the image feature is given encoded bytes, and shards are written as ArrayRecord.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, hashing, splits

from data import dicom, likeness, shards
from data.labels import CHEXPERT, NOT_STATED
from data.reports import structure
from data.selections import COMMON, Selection
from data.shards import Skip as Skip
from data.splits import check_patients
from rad_jax import images
from rad_jax.chat import access as levels
from rad_jax.errors import UserError

SPLITS = ("train", "validation", "test")
REPORT = "report"  # the method of a text that is as its source has it


def features() -> tfds.features.FeaturesDict:
    """The features of every corpus; what is not known is an empty text, an age of -1.

    `texts` is a JSON list, one object for each text that the film has, as `text` makes it. `labels` follow `CHEXPERT`: 1 positive,
    0 negative, -1 uncertain, -2 not stated. `annotations` is a JSON list with one object per finding: finding, side, size, place,
    box [x0, y0, x1, y1] in pixels of the stored image. `sex` is M or F, `age` in years. `source_sha256` is that of the
    film's file, empty where there was none. `look` is `likeness.look` of the image.
    """
    strings = ("id", "patient", "study", "view", "sex", "texts", "annotations", "source", "source_sha256")
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png"),
            **{name: tfds.features.Text() for name in strings},
            "frontal": tfds.features.Scalar(dtype=np.bool_),
            "age": tfds.features.Scalar(dtype=np.int32),
            "orig_height": tfds.features.Scalar(dtype=np.int32),
            "orig_width": tfds.features.Scalar(dtype=np.int32),
            "labels": tfds.features.Tensor(shape=(len(CHEXPERT),), dtype=np.int8),
            "look": tfds.features.Tensor(shape=(likeness.BITS // 8,), dtype=np.uint8),
        }
    )


def text(
    findings: str | None,
    *,
    impression: str | None = None,
    indication: str | None = None,
    method: str = REPORT,
    prompt: str | None = None,
) -> dict[str, str | None]:
    """One text of a film; None is absent, and an empty indication is not an absent one.

    `method` says how the text was made; `prompt` is a question that the source gives with it.
    """
    return {
        "method": method,
        "findings": findings,
        "impression": impression,
        "indication": indication,
        "prompt": prompt,
    }


def boxed(finding: str, box: Sequence[float], side: str | None = None) -> dict[str, Any]:
    """An annotation of a published box [x0, y0, x1, y1]."""
    return {"finding": finding, "side": side, "size": None, "place": None, "box": list(box)}


def record(
    *,
    image: np.ndarray,
    id: str,
    patient: str,
    study: str,
    view: str,
    frontal: bool,
    texts: Sequence[Mapping[str, str | None]],
    source: str,
    shape: Sequence[int],
    sex: str = "",
    age: int = -1,
    labels: Sequence[int] = (NOT_STATED,) * len(CHEXPERT),
    annotations: Sequence[Mapping[str, Any]] = (),
    source_sha256: str = "",
) -> dict[str, Any]:
    """One record as `features` wants it; `image` is uint8 [Y, X] and `shape` (Y, X) of the original film."""
    return {
        "image": images.encode_png(image),
        "id": id,
        "patient": patient,
        "study": study,
        "view": view,
        "frontal": frontal,
        "sex": sex,
        "age": age,
        "texts": json.dumps(list(texts)),
        "labels": np.asarray(labels, np.int8),
        "annotations": json.dumps(list(annotations)),
        "source": source,
        "source_sha256": source_sha256,
        "orig_height": int(shape[0]),
        "orig_width": int(shape[1]),
        "look": likeness.look(image),
    }


@dataclasses.dataclass(frozen=True)
class Film:
    """A film on disk with what is known of it; fields as in `features`, boxes in pixels of the film itself.

    `report` is the whole report where there is more of it than `texts` hold; no record has it.
    """

    path: Path
    id: str
    patient: str
    study: str
    view: str
    frontal: bool
    texts: Sequence[Mapping[str, str | None]]
    source: str = ""
    sex: str = ""
    age: int = -1
    labels: Sequence[int] = (NOT_STATED,) * len(CHEXPERT)
    annotations: Sequence[Mapping[str, Any]] = ()
    report: str | None = None

    def document(self) -> structure.Document | None:
        """What a language model is given to structure; None where nobody wrote a report."""
        return structure.of_report(self.report) if self.report else structure.of_texts(self.texts)


def make(film: Film, size: int, dicom_style: str = "window") -> dict[str, Any] | Skip:
    """The record of a film, its short side scaled to `size` pixels, or why there is none; `dicom_style` is one of `images.DICOM_STYLES`.

    A DICOM header is believed where the corpus says nothing: it gives view, sex and age, and nothing else, and refuses what is no single grey
    film of a chest.
    """
    header = dicom.read_header(film.path)
    if header is not None and header.unusable:
        return Skip(film.id, film.path.name, header.unusable)
    if header is not None:
        film = _with_header(film, header)
    try:
        small, shape = images.load_short(film.path, size, dicom_style)
        known_by = shards.sha256(film.path)
    except OSError as error:  # it went away meanwhile
        return Skip(film.id, film.path.name, "unreadable image", error.strerror or "")
    except UserError as error:
        return Skip(film.id, film.path.name, "unreadable image", said(error, film.path))
    scale = [small.shape[1] / shape[1], small.shape[0] / shape[0]] * 2
    boxed = [
        {**a, "box": [round(v * s, 1) for v, s in zip(a["box"], scale, strict=True)]} if a.get("box") else {**a}
        for a in film.annotations
    ]
    names = {field.name for field in dataclasses.fields(film)} - {"path", "report"}
    known = {name: getattr(film, name) for name in names}
    return record(image=small, shape=shape, **known | {"annotations": boxed, "source_sha256": known_by})


def _with_header(film: Film, header: dicom.Header) -> Film:
    """The film with the header's view, sex and age, each where the corpus says nothing of it."""
    film = dataclasses.replace(film, sex=film.sex or header.sex, age=film.age if film.age >= 0 else header.age)
    if film.view or not header.view:
        return film
    view = "LATERAL" if header.lateral else header.view
    return dataclasses.replace(film, view=view, frontal=film.frontal and not header.lateral)


def said(error: Exception, path: Path) -> str:
    """The sentence of an error over a file, without the file's place, and without places in memory, which no two runs have alike."""
    return re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error).removeprefix(f"{path}: "))


class CorpusBuilder(tfds.core.ShardBasedBuilder):
    """Base of the builders: splits of jobs in, records or skips out, in shards that are written one by one.

    A subclass gives `jobs`, `maker`, `key` and `patient`. After `download_and_prepare`, `skipped` lists what was left out, `written`
    counts the records of each split, `views` those of each view, and `counts` is what else the corpus counted of its input.
    """

    selections: ClassVar[Mapping[str, Selection]] = COMMON
    access: ClassVar[str] = levels.PRIVATE  # one of `levels.LEVELS`: who may have texts and images
    language: ClassVar[str] = "en"  # of the reports, one of `reports.terms.LANGUAGES`
    # Selection -> split -> rows, where its authors say so.
    published: ClassVar[Mapping[str, Mapping[str, int]]] = {}

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    # Nothing is downloaded, so there are no checksums; looking for them needs a package that TFDS does not declare.
    _checksums_path = None

    def __init__(
        self,
        *,
        workers: int = 1,
        progress: bool = False,
        bad_rows: float = shards.BAD_ROWS,
        work: Path | None = None,
        **kwargs: Any,
    ):
        """Nothing is read yet.

        Args:
            workers: processes that make records.
            progress: show a bar on stderr.
            bad_rows: share of the inputs that may be missing or damaged, as `shards.check_broken` counts.
            work: folder in which finished shards wait for the others and outlive a run that was stopped; on the disk of `data_dir`.
            kwargs: for TFDS.
        """
        self.workers, self.progress, self.bad_rows, self.work = workers, progress, bad_rows, work
        self.skipped: list[Skip] = []
        self.written: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        super().__init__(file_format="array_record", **kwargs)

    @abc.abstractmethod
    def jobs(self) -> dict[str, list[Any]]:
        """Split -> what `make` is called with; inputs known to be unusable go to `self.skipped`."""

    def final_jobs(self) -> dict[str, list[Any]]:
        """`jobs` with what is added to them from outside."""
        return self.jobs()

    @abc.abstractmethod
    def maker(self) -> Callable[[Any], dict[str, Any] | Skip]:
        """A picklable function from a job to a record or a skip."""

    @abc.abstractmethod
    def key(self, job: Any) -> str:
        """The id of a job's record, which no other job of its split has."""

    @abc.abstractmethod
    def patient(self, job: Any) -> str:
        """Whose film a job's record will be."""

    def tasks(self, folder: Path) -> list[shards.Task]:
        """The shards of all splits, to be written to `folder`; within a split the records are in the order of their ids' hashes.

        Raises:
            UserError: there is nothing to write, two inputs have one id, or a patient is in two splits.
        """
        made, of_split = [], self.final_jobs()
        check_patients(
            {split: [(self.patient(job), self.key(job)) for job in jobs] for split, jobs in of_split.items()}
        )
        for split, jobs in of_split.items():
            order = hashing.Hasher(split)  # the order in which TFDS itself would write them
            hashed = {order.hash_key(self.key(job)): job for job in jobs}
            if len(hashed) < len(jobs):
                twice = Counter(map(self.key, jobs)).most_common(1)[0][0]
                raise UserError(f"split {split!r}: several inputs have the id {twice!r}: give each its own.")
            ordered = [hashed[number] for number in sorted(hashed)]
            for number, part in enumerate(shards.plan(len(ordered))):
                path = folder / f"{split}-{number:05d}.array_record"
                made.append(shards.Task(split, path, ordered[part], self.maker(), serialise))
        if not made:
            reasons = Counter(skip.reason for skip in self.skipped)
            raise UserError(f"no usable input in any split (skipped: {dict(reasons)}): mend the source.")
        return made

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes the shards, over processes or on Beam as `download_config` says, and moves them to where TFDS looks for them."""
        folder = self.work or Path(self.data_path)
        folder.mkdir(parents=True, exist_ok=True)
        tasks = self.tasks(folder)
        if download_config is not None and (download_config.beam_runner or download_config.beam_options):
            receipts = shards.run_on_beam(
                tasks, download_config.beam_runner, download_config.beam_options, self.bad_rows, self.skipped
            )
        else:
            receipts = shards.run(tasks, self.workers, self.progress, self.bad_rows, self.skipped)
        of_split: dict[str, list[tuple[shards.Task, shards.Receipt]]] = {}
        for task, receipt in zip(tasks, receipts, strict=True):
            of_split.setdefault(task.split, []).append((task, receipt))
            self.skipped += receipt.skipped
            self.views.update(receipt.views)
            self.written[task.split] += receipt.records
        self.info.set_splits(splits.SplitDict([self._place(split, parts) for split, parts in of_split.items()]))

    def _place(self, split: str, parts: Sequence[tuple[shards.Task, shards.Receipt]]) -> Any:
        """Gives a split's shards the names that TFDS wants, empty ones left out; returns what TFDS is to know of it."""
        if not self.written[split]:
            reasons = Counter(skip.reason for skip in self.skipped)
            raise UserError(
                f"split {split!r}: none of its {sum(receipt.wanted for _, receipt in parts)} inputs could be used "
                f"(skipped: {dict(reasons)}): mend the images, or leave the split out."
            )
        template = self._get_filename_template(split)
        full = [(task, receipt) for task, receipt in parts if receipt.records]
        for number, (task, _) in enumerate(full):
            place = template.sharded_filepath(shard_index=number, num_shards=len(full))
            shards.place(task, Path(place))
        return splits.SplitInfo(
            name=split,
            shard_lengths=[receipt.records for _, receipt in full],
            num_bytes=sum(receipt.bytes for _, receipt in full),
            filename_template=template,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
        raise NotImplementedError  # TFDS's own way, which knows neither receipts nor skips


@functools.cache
def _serialiser() -> tuple[Any, Any]:
    wanted = features()
    return wanted, example_serializer.ExampleSerializer(wanted.get_serialized_info())


def serialise(made: dict[str, Any]) -> bytes:
    """A record as TFDS stores it, whose own call leaves the order of the fields to chance."""
    wanted, serialiser = _serialiser()
    data: bytes = serialiser.get_tf_example(wanted.encode_example(made)).SerializeToString(deterministic=True)
    return data


class SourceBuilder(CorpusBuilder):
    """Base of the builders that read films from a folder; a subclass gives `defining` and `jobs`, which makes a `Film` of each."""

    films_needed = True  # False while only the reports are read

    def __init__(
        self,
        *,
        source: str | Path,
        image_size: int,
        structured: str | Path | None = None,
        dicom: str = "window",
        **kwargs: Any,
    ):
        """Args: source: the folder; image_size: pixels of the stored images' short side; structured: a file of launch.structure;
        dicom: one of `images.DICOM_STYLES`."""
        self.source, self.image_size, self.dicom = Path(source), image_size, dicom
        self.structured = structure.load(Path(structured)) if structured else {}
        super().__init__(**kwargs)

    @classmethod
    @abc.abstractmethod
    def defining(cls, source: Path) -> list[Path]:
        """The files that say what the corpus holds, in order, images left out.

        Raises:
            UserError: one that must be there is not; names it.
        """

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__ or "", features=features())

    def maker(self) -> Callable[[Film], dict[str, Any] | Skip]:
        return functools.partial(make, size=self.image_size, dicom_style=self.dicom)

    def key(self, job: Film) -> str:
        return job.id

    def patient(self, job: Film) -> str:
        return job.patient

    def final_jobs(self) -> dict[str, list[Film]]:
        of_split = self.jobs()
        if not self.structured:
            return of_split
        return {split: [self._with_structured(film) for film in films] for split, films in of_split.items()}

    def documents(self) -> dict[str, structure.Document]:
        """Key -> report, in order and each once, for a language model to structure. Films need not be there."""
        self.films_needed = False
        films = [film for of_split in self.jobs().values() for film in of_split]
        self.films_needed = True
        return {document.key: document for film in films if (document := film.document())}

    def keeps(self, report: str) -> bool:
        """Whether a report in which the rules find no text is kept all the same: to be structured, or because it has been."""
        return not self.films_needed or structure.of_report(report).key in self.structured

    def _with_structured(self, film: Film) -> Film:
        document = film.document()
        if document is None:
            return film
        row = self.structured.get(document.key)
        self.counts["films with a structured text" if row else "films with a report and no structured text"] += 1
        if row is None:
            return film
        names = ("impression", "indication")
        own = text(row["findings"], **{name: row[name] for name in names}, method=structure.METHOD)
        return dataclasses.replace(film, texts=[*film.texts, own])

    def present(self, films: Iterable[Film]) -> list[Film]:
        """The films whose file is there; the others are skipped."""
        if not self.films_needed:
            return list(films)
        found = []
        for film in films:
            if film.path.is_file():
                found.append(film)
            else:
                self.skipped.append(Skip(film.id, film.path.name, "missing image"))
        return found
