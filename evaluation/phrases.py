"""Phrase grounding on films with boxes: does a model look where a phrase is?

A CSV names films, phrases and boxes (image, phrase, x, y, w, h in pixels of the film; more rows of one film and phrase are a union). A row may
name a mask instead: a picture of the size of its box, whose pixels that are not black are inside. Regions go through the resize and
crop that the film goes through; what the crop cuts off counts nowhere. Heads are chosen on some of the patients and scored on the
others; intervals resample patients.
"""

import csv
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import heads, looking, pointing, statistics
from rad_jax import images, prompts
from rad_jax.errors import UserError

COLUMNS = ("image", "phrase", "x", "y", "w", "h")
QUESTION = prompts.question(None)  # what a LLaVA is asked before it is told the phrase
VALIDATION = 0.3  # share of the patients on whose films heads are chosen
DRAWS = 2000


@dataclass(frozen=True)
class Region:
    """A phrase on a film. image: PNG of the square the model sees; mask: bool [Y, X] of the same size."""

    film: str
    patient: str
    phrase: str
    image: bytes
    mask: np.ndarray


@dataclass(frozen=True)
class Regions:
    """The usable ones in the order of the file, and (film, phrase, reason) of the others."""

    kept: list[Region]
    skipped: list[tuple[str, str, str]]


def read(path: Path, size: int, patients: dict[str, str]) -> Regions:
    """Regions of a CSV for a model that sees squares of `size` pixels; a film without an entry in `patients` is its own patient.

    Raises UserError for a missing file or column, or when nothing is usable.
    """
    if not path.is_file():
        raise UserError(f"no boxes at {path}: give a CSV with {', '.join(COLUMNS)}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}: a file of boxes has {', '.join(COLUMNS)}")
        groups: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in reader:
            groups.setdefault((row["image"], row["phrase"]), []).append(row)
    kept, skipped = [], []
    films: dict[str, np.ndarray | None] = {}
    for (film, phrase), rows in groups.items():
        if film not in films:
            films[film] = _load(path.parent / film)
        pixels = films[film]
        mask = None if pixels is None else _mask(rows, pixels.shape, path.parent)
        if pixels is None or mask is None:
            skipped.append((film, phrase, "unreadable image" if pixels is None else "unreadable box or mask"))
            continue
        seen = images.mask_seen(mask, size)
        if seen.all() or not seen.any():
            skipped.append((film, phrase, "outside the crop" if not seen.any() else "covers the whole crop"))
            continue
        square = images.encode_png(images.centre_crop(images.resize_short(pixels, size), size))
        kept.append(Region(film, patients.get(film, film), phrase, square, seen))
    if not kept:
        raise UserError(
            f"{path}: none of its {len(groups)} phrases can be used ({skipped[0][2] if skipped else 'empty'})"
        )
    return Regions(kept, skipped)


def _load(path: Path) -> np.ndarray | None:
    try:
        return images.load_grey(path)
    except UserError:
        return None


def _mask(rows: Sequence[dict[str, str]], shape: Sequence[int], folder: Path) -> np.ndarray | None:
    """Bool [Y, X] of the film; None when a row is no box of it."""
    out = np.zeros(tuple(shape), bool)
    for row in rows:
        try:
            x, y, w, h = (round(float(row[name])) for name in ("x", "y", "w", "h"))
            stated = (int(row.get("img_h") or shape[0]), int(row.get("img_w") or shape[1]))
        except ValueError:
            return None
        if w <= 0 or h <= 0 or stated != tuple(shape):
            return None
        part = np.ones((h, w), bool)
        if row.get("mask"):
            drawn = _load(folder / row["mask"])
            if drawn is None:
                return None
            part = drawn > 0
        x0, y0 = max(x, 0), max(y, 0)
        part = part[y0 - y : shape[0] - y, x0 - x : shape[1] - x]
        out[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] |= part
    return out


def read_patients(path: Path | None) -> dict[str, str]:
    """image -> patient of a CSV; nothing without one. Raises UserError for a missing file or column."""
    if path is None:
        return {}
    if not path.is_file():
        raise UserError(f"no patients at {path}: give a CSV with image and patient")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"image", "patient"} <= set(reader.fieldnames or ()):
            raise UserError(f"{path}: it needs the columns image and patient")
        return {row["image"]: row["patient"] for row in reader if row["patient"]}


def validation_patients(patients: Sequence[str]) -> set[str]:
    """Those on whom heads are chosen: the first `VALIDATION` by a hash of their names. Raises UserError for fewer than two patients."""
    ordered = sorted(set(patients), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    if len(ordered) < 2:
        raise UserError("heads are chosen on other patients than they are scored on: give films of two or more")
    return set(ordered[: min(len(ordered) - 1, max(1, round(VALIDATION * len(ordered))))])


def scores(maps: Sequence[np.ndarray], regions: Sequence[Region]) -> dict[str, Any]:
    """Means over regions of one map [h, w] each, with intervals that resample patients, for all and for every phrase; and the control with
    other patients' maps of the same phrase. `above_chance` is the pointing accuracy less the share of the image inside."""
    rows = np.array([row(map_, region.mask) for map_, region in zip(maps, regions, strict=True)])
    patients = [region.patient for region in regions]
    phrases = list(dict.fromkeys(region.phrase for region in regions))
    control = pointing.against_shuffled(maps, [r.mask for r in regions], [r.phrase for r in regions], patients)
    inside = {name: [i for i, region in enumerate(regions) if region.phrase == name] for name in phrases}
    return {
        **means(rows, patients),
        "phrases": {name: means(rows[own], [patients[i] for i in own]) for name, own in inside.items()},
        "shuffled": vars(control),
    }


NAMES = ("accuracy", "chance", "above_chance", "mass", "contrast", "mean_iou")


def signature(what: str, of: str, size: int, averaged: bool, covering: bool) -> str:
    """How the scores of maps are made.

    Args:
        what: looks: "llava" or "tower".
        of: what the maps are of.
        size: side of the square it sees.
        averaged: whether some heads are averaged, or all are weighted (`heads.Heads`).
        covering: whether what covering parts of the film loses is among the maps.
    """
    rules = f"less:their-mean-map|pointing:all-maxima-inside|iou:mean-of-{len(pointing.THRESHOLDS)}-thresholds"
    maps = f"{what}-attention" + (f"+covering-at-most-{looking.PARTS}x{looking.PARTS}" if covering else "")
    read = f"mean-of-at-most-{heads.MOST}" if averaged else f"ridge-{heads.RIDGE:g}"
    made = f"grounding|map:{maps}|of:{of}|heads:{read}-on-other-patients|{rules}|image:{size}px"
    return f"{made}|unit:patient|ci:percentile-{DRAWS}-seed{statistics.SEED}"


def row(map_: np.ndarray, mask: np.ndarray) -> list[float]:
    """The `NAMES` of one map [h, w], scaled to [0, 1]; NaN of those that a mask of the whole square does not have."""
    if mask.all():
        return [float(pointing.hit(map_, mask)), 1.0, float(pointing.hit(map_, mask)) - 1.0, *[float("nan")] * 3]
    span = float(np.ptp(map_))
    score = pointing.map_score((map_ - map_.min()) / (span if span > 0 else 1.0), mask)
    hit, chance = float(pointing.hit(map_, mask)), float(mask.mean())
    return [hit, chance, hit - chance, score.mass, score.contrast, score.mean_iou]


def means(rows: np.ndarray, patients: Sequence[str]) -> dict[str, Any]:
    """Value and interval of every score over the rows [n, 6], patients drawn; a flat map has no contrast and is left out of that mean."""
    known = np.isfinite(rows)
    sums = np.concatenate([np.where(known, rows, 0.0), known.astype(float)], axis=1)
    ratio: Callable[[np.ndarray], np.ndarray] = lambda totals: statistics.ratio(totals[:, :6], totals[:, 6:])  # noqa: E731
    drawn = ratio(statistics.resample(sums, patients, draws=DRAWS))
    values = ratio(sums.sum(axis=0, keepdims=True))[0]
    out: dict[str, Any] = {"n": len(rows), "patients": len(set(patients))}
    for i, name in enumerate(NAMES):
        finite = bool(np.isfinite(values[i]))
        out[name] = {"value": float(values[i]), "ci": statistics.percentile_interval(drawn[:, i])} if finite else None
    return out
