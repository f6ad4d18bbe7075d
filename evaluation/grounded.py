"""RadFact's arithmetic, from verdicts on phrases to shares, with boxes where phrases have some (Bannur et al., MAIRA-2, 2024, section 4).

Who judges, and how it is asked, is in `radfact`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.pointing import Box

PIXELS = 224  # side of the raster on which boxes are compared
COVERED = 0.5  # share of a phrase's boxes that the evidence must cover


@dataclass(frozen=True)
class Phrase:
    """One finding of a report: does the other report entail it, and do its boxes agree with those of the evidence; None for no box."""

    entailed: bool
    box_entailed: bool | None = None


def radfact(phrases: Sequence[Phrase]) -> dict[str, float | None]:
    """One direction (precision of a candidate's phrases, recall of a reference's): shares, None where there is nothing to share.

    logical: entailed phrases of all; grounding: right boxes of the entailed phrases with boxes; spatial: entailed phrases with right boxes
    of all phrases with boxes.
    """
    boxed = [phrase for phrase in phrases if phrase.box_entailed is not None]
    entailed = [phrase for phrase in boxed if phrase.entailed]
    right = sum(bool(phrase.box_entailed) for phrase in entailed)
    shares: Mapping[str, tuple[int, int]] = {
        "logical": (sum(phrase.entailed for phrase in phrases), len(phrases)),
        "grounding": (right, len(entailed)),
        "spatial": (right, len(boxed)),
    }
    return {name: part / whole if whole else None for name, (part, whole) in shares.items()}


def box_overlap(boxes: Sequence[Box], evidence: Sequence[Box]) -> dict[str, float]:
    """iou, precision (NaN without area) and recall of the unions of boxes [x0, y0, x1, y1], in shares of the image, on `PIXELS` x `PIXELS`."""
    mine, theirs = (_union(part) for part in (boxes, evidence))
    common = int((mine & theirs).sum())
    return {
        "iou": common / int((mine | theirs).sum()) if (mine | theirs).any() else float("nan"),
        "precision": common / int(mine.sum()) if mine.any() else float("nan"),
        "recall": common / int(theirs.sum()) if theirs.any() else float("nan"),
    }


def boxes_entailed(boxes: Sequence[Box], evidence: Sequence[Box]) -> bool:
    """Whether the evidence's boxes cover more than `COVERED` of a phrase's."""
    return box_overlap(boxes, evidence)["precision"] > COVERED


def _union(boxes: Sequence[Box]) -> np.ndarray:
    """Bool [Y, X]; edges are rounded down to whole pixels, as RadFact does."""
    mask = np.zeros((PIXELS, PIXELS), bool)
    for x0, y0, x1, y1 in boxes:
        mask[int(y0 * PIXELS) : int(y1 * PIXELS), int(x0 * PIXELS) : int(x1 * PIXELS)] = True
    return mask
