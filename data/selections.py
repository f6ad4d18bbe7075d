"""Which texts of which films a data set is made of, and the index that packing writes of each such selection.

One film may have several texts. A row of an index is (record number, text number), int32 [rows, 2]; training shuffles and repeats the
rows of one selection, so that nothing is filtered while training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
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

    Where the texts were made by more than one method, SELECTION.METHOD holds the rows of each method too.

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
        for number in range(count):
            record = source[number]
            record |= {"view": record["view"].decode()}
            for slot, text in enumerate(json.loads(record["texts"])):
                methods[text["method"]] += 1
                for name, selection in selections.items():
                    if selection.keep(record, text):
                        for key in (name, f"{name}.{text['method']}"):
                            rows.setdefault((key, split), []).append((number, slot))
    written: dict[str, Any] = {}
    for name, selection in selections.items():
        for key in (name, *(f"{name}.{method}" for method in sorted(methods) if len(methods) > 1)):
            of_split = {split: _write(folder, key, split, rows.get((key, split), [])) for split in counts}
            written[key] = {"question": selection.question, "splits": of_split}
    return written


def _write(folder: Path, name: str, split: str, rows: list[tuple[int, int]]) -> dict[str, Any]:
    path = folder / INDEX / f"{name}-{split}.npy"
    np.save(path, np.asarray(rows, np.int32).reshape(-1, 2))
    return {"rows": len(rows), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
