"""What a report generator must beat: answers that hardly look at the picture.

Three of them: the normal report that occurs most often in training, whatever the image; a training report drawn at random; and the report of the
training image whose 16 x 16 thumbnail is nearest, which sees exposure and rough shape and nothing else.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from evaluation import labels, lexicon, rule_labeler

THUMBNAIL = 16
_BLOCK = 256
_NO_FINDING, _DEVICES = (labels.CLASSES.index(name) for name in (lexicon.NO_FINDING, lexicon.DEVICES))


def is_normal(report: str) -> bool:
    """Whether the rule labeler reads "No Finding" and no device in a report."""
    codes = rule_labeler.label(report)
    return bool(codes[_NO_FINDING] == labels.POSITIVE and codes[_DEVICES] != labels.POSITIVE)


def most_frequent_report(reports: Iterable[str]) -> tuple[str, bool]:
    """The normal report that occurs most often (white space does not count), of equals the alphabetically first, and True; where no report
    is normal, the most frequent of all, and False.

    Raises ValueError when every report is empty.
    """
    counts = Counter(text for text in (" ".join(report.split()) for report in reports) if text)
    if not counts:
        raise ValueError("no training report that is not empty")
    ordered = sorted(counts, key=lambda text: (-counts[text], text))
    normal = next((text for text in ordered if is_normal(text)), None)  # labels no more reports than it must
    return (ordered[0], False) if normal is None else (normal, True)


def random_reports(reports: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """`count` of the training reports, each drawn from all of them; ValueError when there is none."""
    if not reports:
        raise ValueError("no training report to draw")
    return [reports[i] for i in np.random.default_rng(seed).integers(0, len(reports), count)]


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Mean grey values on a 16 x 16 grid, float32 [256] in [0, 255], of an image uint8 [Y, X]."""
    small = Image.fromarray(image).convert("F").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1)


def nearest(train: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Index, int64 [q], of the training row [n, d] nearest in L2 to each query row [q, d]; of equals the first.

    Raises ValueError when there is no training row.
    """
    if len(train) == 0:
        raise ValueError("no training image to compare with")
    train64 = train.astype(np.float64)
    norms = (train64**2).sum(axis=1)
    blocks = [query[i : i + _BLOCK].astype(np.float64) for i in range(0, len(query), _BLOCK)]
    return np.concatenate(
        [np.argmin(norms - 2.0 * block @ train64.T, axis=1) for block in blocks] or [np.zeros(0, int)]
    )


def nearest_reports(train: np.ndarray, reports: Sequence[str], query: np.ndarray) -> list[str]:
    """For each query thumbnail [q, 256], the report of the nearest training thumbnail [n, 256]."""
    if len(train) != len(reports):
        raise ValueError(f"{len(train)} training thumbnails but {len(reports)} reports")
    return [reports[i] for i in nearest(train, query)]
