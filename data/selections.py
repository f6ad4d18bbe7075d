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
    has 8 bytes of SHA-256 of every stored image, uint64 [records], by which equal images are found in this corpus and in others.

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
        images = np.zeros(count, np.uint64)
        for number in range(count):
            record = source[number]
            images[number] = int.from_bytes(hashlib.sha256(record["image"]).digest()[:8])
            record |= {"view": record["view"].decode()}
            for slot, text in enumerate(json.loads(record["texts"])):
                methods[text["method"]] += 1
                for name, selection in selections.items():
                    if selection.keep(record, text):
                        for key in (name, f"{name}.{text['method']}"):
                            rows.setdefault((key, split), []).append((number, slot))
        np.save(folder / INDEX / f"images-{split}.npy", images)
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


def duplicates(folder: Path, splits: Sequence[str]) -> dict[str, int]:
    """Records whose image is that of an earlier one: in the same split, and in another."""
    seen: set[int] = set()
    within = across = 0
    for split in splits:
        images = read_images(folder, split).tolist()
        within += len(images) - len(set(images))
        across += sum(image in seen for image in set(images))
        seen |= set(images)
    return {"in the same split": within, "in two splits": across}


def write_index(folder: Path, name: str, split: str, rows: np.ndarray) -> dict[str, Any]:
    """Writes one index, int32 [n, 2]; returns the number of its rows and the file's SHA-256."""
    path = folder / INDEX / f"{name}-{split}.npy"
    path.parent.mkdir(exist_ok=True)
    np.save(path, rows.astype(np.int32).reshape(-1, 2))
    return {"rows": len(rows), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
