"""Which texts of which films a data set is made of, and the index that packing writes of each such selection.

One film may have several texts. A row of an index is (record number, text number), int32 [rows, 2]; training shuffles and repeats the
rows of one selection, so that nothing is filtered while training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data import likeness
from rad_jax.errors import UserError

INDEX = "index"  # folder of the indices in a corpus


@dataclasses.dataclass(frozen=True)
class Selection:
    """A rule for (record, text).

    Attributes:
        keep: whether a text of a record belongs to it.
        question: what is asked in the prompt: "indication" (LLaVA-Rad's question with the text's indication), "stored" (the text's own
            prompt) or "view" (a question that names the view).
    """

    keep: Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
    question: str = "indication"


# What every corpus has.
COMMON: Mapping[str, Selection] = {
    "all": Selection(lambda record, text: bool(text["findings"])),
    "frontal": Selection(lambda record, text: bool(text["findings"]) and record["frontal"]),
    # For images and texts that are to find each other, an impression will do.
    "pairs": Selection(lambda record, text: bool(text["findings"] or text["impression"])),
}


def write_indices(
    builder: Any, selections: Mapping[str, Selection], counts: Mapping[str, int], folder: Path
) -> dict[str, Any]:
    """Writes FOLDER/index/SELECTION-SPLIT.npy for all selections and splits, and reads every record once for it.

    Where the texts were made by more than one method, SELECTION.METHOD holds the rows of each method too. FOLDER/index/images-SPLIT.npy
    has 8 bytes of SHA-256 of every stored image, uint64 [records], by which equal images are found in this corpus and in others,
    looks-SPLIT.npy its look, uint8 [records, 32], by which those are found that differ a little, and patients-SPLIT.npy 8 bytes of SHA-256
    of the patient, uint64 [records].

    Args:
        builder: a built TFDS builder.
        selections: by name.
        counts: records of each split.
        folder: the corpus.

    Returns:
        Selection -> {"question": ..., "splits": {split: {"rows": ..., "sha256": ... of the file}}}.
    """
    (folder / INDEX).mkdir()
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    methods: Counter[str] = Counter()
    for split, count in counts.items():
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}) if count else ()
        patients = np.zeros(count, np.uint64)
        images, looks = np.zeros(count, np.uint64), np.zeros((count, likeness.BITS // 8), np.uint8)
        for number in range(count):
            record = source[number]
            images[number], patients[number] = _short_hash(record["image"]), _short_hash(record["patient"])
            looks[number] = record["look"]
            record |= {"view": record["view"].decode()}
            for slot, text in enumerate(json.loads(record["texts"])):
                methods[text["method"]] += 1
                for name, selection in selections.items():
                    if selection.keep(record, text):
                        for key in (name, f"{name}.{text['method']}"):
                            rows.setdefault((key, split), []).append((number, slot))
        np.save(folder / INDEX / f"images-{split}.npy", images)
        np.save(folder / INDEX / f"looks-{split}.npy", looks)
        np.save(folder / INDEX / f"patients-{split}.npy", patients)
    written: dict[str, Any] = {}
    for name, selection in selections.items():
        for key in (name, *(f"{name}.{method}" for method in sorted(methods) if len(methods) > 1)):
            of_split = {
                split: write_index(folder, key, split, np.asarray(rows.get((key, split), []))) for split in counts
            }
            written[key] = {"question": selection.question, "splits": of_split}
    return written


def read_images(folder: Path, split: str) -> np.ndarray:
    """What `write_indices` keeps of a split's images, uint64 [records]."""
    return np.load(folder / INDEX / f"images-{split}.npy")


def count_patients(folder: Path, splits: Sequence[str]) -> dict[str, int]:
    """Patients who have records, of each split.

    Raises:
        UserError: one has records in two splits.
    """
    of_split = [np.unique(np.load(folder / INDEX / f"patients-{split}.npy")) for split in splits]
    twice = sum(map(len, of_split)) - len(np.unique(np.concatenate(of_split)))
    if twice:
        raise UserError(f"{twice} patients have records in more than one split: keep each patient in one.")
    return {split: len(found) for split, found in zip(splits, of_split, strict=True)}


def _short_hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def read_looks(folder: Path, split: str) -> np.ndarray:
    """What `write_indices` keeps of their looks, uint8 [records, 32]."""
    return np.load(folder / INDEX / f"looks-{split}.npy")


def duplicates(places: Sequence[tuple[Path, str]]) -> dict[str, np.ndarray]:
    """Films that were there before, in some splits of some corpora.

    Args:
        places: (folder of a corpus, split), in the order in which films count as earlier.

    Returns:
        "equal" and "near", int64 [pairs, 4]: place and number of a film, place and number of the earliest with the same image, or of
        the earliest that looks like it. An equal film is not a near one too.
    """
    images = [read_images(*place) for place in places]
    looks = np.concatenate([read_looks(*place) for place in places])
    where = np.concatenate([np.full(len(found), number) for number, found in enumerate(images)])
    numbers = np.concatenate([np.arange(len(found)) for found in images])
    _, first, which = np.unique(np.concatenate(images), return_index=True, return_inverse=True)
    origin = first[which.reshape(-1)]
    equal = np.flatnonzero(origin != np.arange(len(origin)))
    kept = np.sort(first)
    before = likeness.earlier(looks[kept])
    near = np.flatnonzero(before >= 0)

    def pairs(films: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.stack([where[films], numbers[films], where[others], numbers[others]], axis=1)

    return {"equal": pairs(equal, origin[equal]), "near": pairs(kept[near], kept[before[near]])}


def count_duplicates(folder: Path, splits: Sequence[str]) -> dict[str, dict[str, int]]:
    """How many films of a corpus are equal to an earlier one, and how many look like one: within their split, and across splits."""
    return {
        kind: {
            "in the same split": int((pairs[:, 0] == pairs[:, 2]).sum()),
            "in two splits": int((pairs[:, 0] != pairs[:, 2]).sum()),
        }
        for kind, pairs in duplicates([(folder, split) for split in splits]).items()
    }


def write_index(folder: Path, name: str, split: str, rows: np.ndarray) -> dict[str, Any]:
    """Writes one index, int32 [n, 2]; returns the number of its rows and the file's SHA-256."""
    path = folder / INDEX / f"{name}-{split}.npy"
    path.parent.mkdir(exist_ok=True)
    np.save(path, rows.astype(np.int32).reshape(-1, 2))
    return {"rows": len(rows), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
