"""What one record of a corpus is, and the TFDS builders that every corpus derives from.

A record is one image (8-bit grey PNG, short side at training size) with all its texts, ids, labels and provenance.
Nothing here needs TensorFlow: the image feature is given encoded bytes, and shards are written as ArrayRecord.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from data import dicom
from data.labels import CHEXPERT, NOT_STATED
from data.reports import structure
from data.selections import COMMON, Selection
from rad_jax import images
from rad_jax.chat import access as levels
from rad_jax.errors import UserError

SPLITS = ("train", "validation", "test")
REPORT = "report"  # the method of a text that is as its source has it


@dataclasses.dataclass(frozen=True)
class Skip:
    """An input that became no record, and why; `reason` is one of few phrases, so that it can be counted."""

    id: str
    image: str
    reason: str


def features() -> tfds.features.FeaturesDict:
    """The features of every corpus; what is not known is an empty text, an age of -1.

    `texts` is a JSON list, one object for each text that the film has, as `text` makes it. `labels` follow `CHEXPERT`: 1 positive,
    0 negative, -1 uncertain, -2 not stated. `annotations` is a JSON list with one object per finding: finding, side, size, place,
    box [x0, y0, x1, y1] in pixels of the stored image. `sex` is M or F, `age` in years.
    """
    strings = ("id", "patient", "study", "view", "sex", "texts", "annotations", "source")
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png"),
            **{name: tfds.features.Text() for name in strings},
            "frontal": tfds.features.Scalar(dtype=np.bool_),
            "age": tfds.features.Scalar(dtype=np.int32),
            "orig_height": tfds.features.Scalar(dtype=np.int32),
            "orig_width": tfds.features.Scalar(dtype=np.int32),
            "labels": tfds.features.Tensor(shape=(len(CHEXPERT),), dtype=np.int8),
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
    image: bytes,
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
) -> dict[str, Any]:
    """One record as `features` wants it; `image` is an encoded PNG and `shape` (Y, X) of the original film."""
    return {
        "image": image,
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
        "orig_height": int(shape[0]),
        "orig_width": int(shape[1]),
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


def make(film: Film, size: int) -> dict[str, Any] | Skip:
    """The record of a film, its short side scaled to `size` pixels, or why there is none.

    A DICOM header is believed where the corpus says nothing: it gives the view, and refuses what is no single grey film of a chest.
    """
    header = dicom.read_header(film.path)
    if header is not None and header.unusable:
        return Skip(film.id, film.path.name, header.unusable)
    if header is not None and header.view and not film.view:
        view = "LATERAL" if header.lateral else header.view
        film = dataclasses.replace(film, view=view, frontal=film.frontal and not header.lateral)
    try:
        pixels = images.load_grey(film.path)
    except UserError:
        return Skip(film.id, film.path.name, "unreadable image")
    small = images.resize_short(pixels, size)
    scale = [small.shape[1] / pixels.shape[1], small.shape[0] / pixels.shape[0]] * 2
    boxed = [
        {**a, "box": [round(v * s, 1) for v, s in zip(a["box"], scale, strict=True)]} if a.get("box") else {**a}
        for a in film.annotations
    ]
    names = {field.name for field in dataclasses.fields(film)} - {"path", "report"}
    known = {name: getattr(film, name) for name in names}
    return record(image=images.encode_png(small), shape=pixels.shape, **known | {"annotations": boxed})


class CorpusBuilder(tfds.core.GeneratorBasedBuilder):
    """Base of the builders: splits of jobs in, records or skips out, over a pool of processes.

    A subclass gives `jobs` and `maker`. After `download_and_prepare`, `skipped` lists what was left out, `written`
    counts the records of each split, `views` those of each view, and `counts` is
    what else the corpus counted of its input.
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

    def __init__(self, *, workers: int = 1, progress: bool = False, **kwargs: Any):
        """Args: workers: processes that make records; progress: show a bar on stderr; the rest goes to TFDS."""
        self.workers, self.progress = workers, progress
        self.skipped: list[Skip] = []
        self.written: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.training_text: list[tuple[str, str]] = []  # (indication, findings) of the training records
        super().__init__(**kwargs)

    @abc.abstractmethod
    def jobs(self) -> dict[str, list[Any]]:
        """Split -> what `make` is called with, in order; inputs known to be unusable go to `self.skipped`."""

    def final_jobs(self) -> dict[str, list[Any]]:
        """`jobs` with what is added to them from outside."""
        return self.jobs()

    @abc.abstractmethod
    def maker(self) -> Callable[[Any], dict[str, Any] | Skip]:
        """A picklable function from a job to a record or a skip."""

    def download_and_prepare(self, **kwargs: Any) -> None:
        """As TFDS, with one pool of processes for all splits."""
        with _mapper(self.workers) as self._map:
            super().download_and_prepare(**kwargs)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        splits = {split: jobs for split, jobs in self.final_jobs().items() if jobs}
        if not splits:
            reasons = Counter(skip.reason for skip in self.skipped)
            raise UserError(f"no usable input in any split (skipped: {dict(reasons)}): mend the source.")
        total = sum(map(len, splits.values()))
        self._bar = tqdm.tqdm(total=total, desc="packing", unit="study", disable=not self.progress)
        return {split: self._generate_examples(split, jobs) for split, jobs in splits.items()}

    def _generate_examples(self, split: str, jobs: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for result in self._map(self.maker(), jobs):
            self._bar.update()
            if self._bar.n == self._bar.total:
                self._bar.close()
            if isinstance(result, Skip):
                self.skipped.append(result)
                continue
            self.written[split] += 1
            self.views[result["view"] or "unknown"] += 1
            if split == "train":
                texts = json.loads(result["texts"])
                self.training_text += [(t["indication"] or "", t["findings"] or t["impression"] or "") for t in texts]
            yield result["id"], result
        if not self.written[split]:
            # TFDS would stop on an empty split with an error of its own, which says nothing about the cause.
            reasons = Counter(skip.reason for skip in self.skipped)
            raise UserError(
                f"split {split!r}: none of its {len(jobs)} inputs could be used (skipped: {dict(reasons)}): "
                "mend the images, or leave the split out."
            )


class SourceBuilder(CorpusBuilder):
    """Base of the builders that read films from a folder; a subclass gives `defining` and `jobs`, which makes a `Film` of each."""

    films_needed = True  # False while only the reports are read

    def __init__(self, *, source: str | Path, image_size: int, structured: str | Path | None = None, **kwargs: Any):
        """Args: source: the folder; image_size: pixels of the stored images' short side; structured: a file of launch.structure."""
        self.source, self.image_size = Path(source), image_size
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
        return functools.partial(make, size=self.image_size)

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


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]]:
    """An ordered map over processes. They are spawned, because TFDS runs threads and forking those can hang."""
    if workers <= 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield lambda function, jobs: pool.imap(function, jobs, chunksize=max(1, min(16, len(jobs) // workers)))
