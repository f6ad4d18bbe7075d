"""Zero-shot classification of the 14 findings: is an image nearer to "pleural effusion" than to "no pleural effusion"? (Tiu et al. 2022)

A finding's score is the mean cosine with texts that affirm it less the mean with texts that deny it. AUROC is the chance that a positive image
scores above a negative one, ties counting half (Hanley and McNeil 1982); intervals resample patients.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import statistics
from evaluation.labels import CLASSES
from evaluation.lexicon import NO_FINDING
from rad_jax.errors import UserError

_WORDS = {
    "Enlarged Cardiomediastinum": "an enlarged cardiomediastinum",
    "Lung Opacity": "lung opacity",
    "Lung Lesion": "a lung lesion",
    "Edema": "pulmonary edema",
    "Pneumothorax": "a pneumothorax",
    "Pleural Effusion": "a pleural effusion",
    "Pleural Other": "pleural thickening",
    "Fracture": "a fracture",
    "Support Devices": "a support device",
}
_BLOCK = 200  # draws whose weights are held at once


def default_prompts() -> dict[str, tuple[list[str], list[str]]]:
    """Class -> texts that affirm it, and texts that deny it."""
    out = {}
    for name in CLASSES:
        words = _WORDS.get(name, name.lower())
        bare = words.removeprefix("an ").removeprefix("a ")
        affirm = [f"{bare.capitalize()}.", f"There is {words}."]
        out[name] = (affirm, [f"No {bare}.", f"There is no {bare}."])
    out[NO_FINDING] = (["Normal chest radiograph.", "The lungs are clear."], ["Abnormal chest radiograph."])
    return out


def read_prompts(path: Path | None) -> dict[str, tuple[list[str], list[str]]]:
    """The prompts of a JSON file, {class: {"positive": [...], "negative": [...]}}, or the default ones without a file.

    Raises UserError for a file that is missing or of another form.
    """
    if path is None:
        return default_prompts()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {name: (list(of["positive"]), list(of["negative"])) for name, of in content.items()}
        valid = all(a and b and all(isinstance(text, str) for text in a + b) for a, b in found.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        valid, found = False, {}
    if not valid or not found or set(found) - set(CLASSES):
        raise UserError(
            f'{path}: prompts are JSON, {{class: {{"positive": [...], "negative": [...]}}}} of CheXpert classes'
        )
    return found


def digest(prompts: Mapping[str, tuple[list[str], list[str]]]) -> str:
    """Eight hexadecimal digits of the prompts, for signatures."""
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:8]


def scores(images: np.ndarray, affirming: np.ndarray, denying: np.ndarray) -> np.ndarray:
    """float64 [n] of unit vectors: images [n, E] against texts [a, E] and [b, E]."""
    return images.astype(np.float64) @ (affirming.mean(axis=0) - denying.mean(axis=0)).astype(np.float64)


def auroc(values: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """AUROC float64 [m] of scores [n] and truth bool [n], for m rows of weights [m, n] (one row of ones without); NaN where a side is empty."""
    weights = np.ones((1, len(values))) if weights is None else weights
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    of_positive, of_negative = (
        np.add.reduceat(weights[:, order] * side[order], starts, axis=1) for side in (positive, ~positive)
    )
    below = np.cumsum(of_negative, axis=1) - of_negative / 2
    pairs = of_positive.sum(axis=1) * of_negative.sum(axis=1)
    return statistics.ratio((of_positive * below).sum(axis=1), pairs)


def evaluate(
    values: Mapping[str, np.ndarray],
    labels: np.ndarray,
    patients: Sequence[Hashable],
    draws: int = statistics.DRAWS,
    how: str = "prompts:given",
) -> dict[str, Any]:
    """AUROC of every class with its interval, and their mean over the classes that have both sides, as plain JSON, each with its signature.

    Args:
        values: class -> scores [n].
        labels: int [n, 14] in a corpus's code: 1 positive, -1 uncertain (left out), 0 or -2 (not stated) negative.
        patients: of every image.
        draws: resamples of the patients; all classes see the same ones.
        how: where the scores come from, for the signatures.
    """
    names = list(values)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(patients))}
    of = np.array([numbers[patient] for patient in patients])
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in names}
    generator = np.random.default_rng(statistics.SEED)
    for start in range(0, draws, _BLOCK):
        picks = generator.integers(0, len(numbers), size=(min(_BLOCK, draws - start), len(numbers)))
        weights = np.stack([np.bincount(row, minlength=len(numbers)) for row in picks])[:, of]
        for name in names:
            drawn[name].append(_of_class(values[name], labels[:, CLASSES.index(name)], weights))
    rules = f"score:cosines-affirming-less-denying|uncertain:left-out|not-stated:negative|ties:half|{how}"
    signature = f"{rules}|n:{len(labels)}|unit:patient|ci:percentile-{draws}-seed{statistics.SEED}"
    out: dict[str, Any] = {}
    for name in names:
        column = labels[:, CLASSES.index(name)]
        value = float(_of_class(values[name], column, None)[0])
        known = bool(np.isfinite(value))
        interval = statistics.percentile_interval(np.concatenate(drawn[name])) if known else None
        counts = {"positive": int((column == 1).sum()), "uncertain": int((column == -1).sum()), "n": len(column)}
        own = {"signature": f"zero-shot-auroc|class:{name}|{signature}"}
        out[name] = {"auroc": value if known else None, "ci": interval, **counts, **own}
    scored = [name for name in names if out[name]["auroc"] is not None]
    means = np.mean([np.concatenate(drawn[name]) for name in scored], axis=0) if scored else np.zeros(0)
    mean = float(np.mean([out[name]["auroc"] for name in scored])) if scored else None
    whole = f"zero-shot-auroc|mean-of:{len(scored)}-of-{len(names)}-classes|{signature}"
    return {"mean_auroc": mean, "ci": statistics.percentile_interval(means), "signature": whole, "classes": out}


def _of_class(values: np.ndarray, column: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    certain = column != -1
    return auroc(values[certain], column[certain] == 1, None if weights is None else weights[:, certain])
