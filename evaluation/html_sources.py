"""What the evaluation's page shows beside the scores: the worst cases, their films, and the maps of their words."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import html_report, report
from evaluation.html_cases import Case, Looked, worst
from rad_jax.errors import UserError


def write_page(
    result: Any, inputs: Sequence[report.Input], path: Path, count: int, data: Path | None, attention: Path | None
) -> None:
    """report.html with the `count` worst cases; redacted for a count of 0.

    Raises UserError for attention maps of other texts.
    """
    access = result["inputs"][0]["access"]
    names = [system["name"] for system in result["systems"] if system["kind"] == "predictions"]
    texts = {name: {row.id: row.prediction for row in item.read.rows} for name, item in zip(names, inputs, strict=True)}
    kept = set(texts[names[0]]).intersection(*texts.values())
    rows = [row for row in inputs[0].read.rows if row.id in kept and row.reference.strip()]
    cases = [Case(row.id, row.reference, {name: texts[name][row.id] for name in names}) for row in rows]
    shown = worst(cases, count)
    if shown and data is not None:
        shown = with_films(shown, data)
    if shown and attention is not None:
        shown = with_attention(shown, attention)
    html_report.write(path, html_report.render(result, shown, redacted=count == 0, access=access), access)


def with_films(cases: Sequence[Case], data: Path) -> list[Case]:
    """The cases with what the model saw, where the corpus has a readable image."""
    from evaluation import corpus as corpora
    from rad_jax import images
    from rad_jax.corpus import Corpus

    corpus = Corpus.open(data)
    records = corpora.records_of(corpus, {case.id for case in cases})
    out = []
    for case in cases:
        try:
            film = images.decode_png(records[case.id]["image"])
            seen = images.encode_png(images.centre_crop(film, corpus.image_size))
        except (KeyError, UserError):
            seen = None
        out.append(dataclasses.replace(case, image_png=seen))
    return out


def with_attention(cases: Sequence[Case], folder: Path) -> list[Case]:
    """The cases with the maps of launch.ground --every_word in `folder`, where it has them.

    Raises UserError when the folder has none, or the maps of another text.
    """
    try:
        words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        maps = np.load(folder / "words.npz")
    except FileNotFoundError:
        raise UserError(f"--attention: no words.npz in {folder}: write it with launch.ground --every_word") from None
    out = []
    for case in cases:
        known = words.get(case.id)
        if known is not None and known["text"] != next(iter(case.texts.values())):
            raise UserError("--attention: the maps are of other texts than the first predictions file holds")
        looked = (
            None if known is None else Looked([(a, b) for a, b in known["spans"]], maps[case.id].astype(np.float32))
        )
        out.append(dataclasses.replace(case, looked=looked))
    return out
