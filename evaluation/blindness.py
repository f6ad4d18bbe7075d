"""How much of a score needs the image: the same model's texts when it is shown the film, another study's film, or nothing.

A report generator scores well without looking when most studies are normal and sentences are common. What is left of a score when the image is
taken away is not evidence of reading images. All systems are resampled together, by patients where they are known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation import scoring, statistics
from evaluation.metric import Metric

REAL = "real"


def panel(systems: Mapping[str, Sequence[Metric]], setting: scoring.Setting) -> list[dict[str, Any]]:
    """One row of plain JSON per metric and way of blinding.

    Args:
        systems: `REAL` and the ways of blinding, each with the same metrics in the same order.
        setting: clusters and draws.

    Returns:
        metric, blinded, signature, real, blind, lost (real minus blind, with its interval) and kept (blind through real, with its interval; None where
        the real score is 0).
    """
    out = []
    for i, real in enumerate(systems[REAL]):
        for name, metrics in systems.items():
            if name != REAL:
                out.append({"metric": real.name, "blinded": name, **_pair(real, metrics[i], setting)})
    return out


def _pair(real: Metric, blind: Metric, setting: scoring.Setting) -> dict[str, Any]:
    rows = np.concatenate([real.rows, blind.rows], axis=1)
    totals = statistics.resample(rows, setting.clusters, draws=setting.draws, seed=setting.seed)
    with_image, without = (metric.value(part) for metric, part in zip((real, blind), np.split(totals, [real.rows.shape[1]], axis=1), strict=True))  # fmt: skip
    seen, unseen = real.total(), blind.total()
    kept = float(statistics.ratio(np.array([unseen]), np.array([seen]))[0])
    return {
        "real": scoring.number(seen),
        "blind": scoring.number(unseen),
        "scale": real.scale,
        "lost": scoring.number(seen - unseen),
        "lost_ci": statistics.percentile_interval(with_image - without),
        "kept": scoring.number(kept),
        "kept_ci": statistics.percentile_interval(statistics.ratio(without, with_image)),
        "n": real.n,
        "signature": f"{real.signature}|{setting.signature()}",
    }


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """Head row and one row per metric in `names`, ways of blinding in columns, for `tables.markdown_table`."""
    ways = list(dict.fromkeys(row["blinded"] for row in rows))
    cells = {(row["metric"], row["blinded"]): row for row in rows}
    out = [["metric", "film", *(f"{way}: score; kept (95%)" for way in ways)]]
    for name in names:
        if (name, ways[0]) not in cells:
            continue
        places = 1 if cells[name, ways[0]]["scale"] == 100.0 else 3
        line = [name, _digits(cells[name, ways[0]]["real"], places)]
        for way in ways:
            row = cells[name, way]
            ends = f" [{row['kept_ci'][0]:.2f}, {row['kept_ci'][1]:.2f}]" if row["kept_ci"] else ""
            line.append(f"{_digits(row['blind'], places)}; {_digits(row['kept'], 2)}{ends}")
        out.append(line)
    return out


def _digits(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"
