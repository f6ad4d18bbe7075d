"""A loss curve as inline SVG: axes, ticks, the logged values and their running mean. No plotting library."""

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 300, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 8, 8, 38
_MOST_POINTS = 400
Point = tuple[float, float]
Scale = Callable[[float], float]


def last_finite(points: Sequence[Point]) -> Point | None:
    """The last point whose loss is a number, None when there is none."""
    return next(((step, loss) for step, loss in reversed(points) if math.isfinite(loss)), None)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers (1, 2, 2.5 or 5 times a power of ten apart) that lie in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def svg(points: Sequence[Point], name: str) -> str:
    """Draws (step, loss) points, gaps where the loss is not finite; `name` is read out by screen readers."""
    steps = np.array([step for step, _ in points], float)
    losses = np.array([loss for _, loss in points], float)
    finite = losses[np.isfinite(losses)]
    x0, x1 = float(steps.min()), float(max(steps.max(), steps.min() + 1))
    low, high = float(finite.min()), float(finite.max())
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - x0) / (x1 - x0)

    def y(loss: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - loss) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">']
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(x0, x1, most=4):
        anchor = "end" if x(tick) > WIDTH - 24 else "middle"
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="{anchor}">{tick:g}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    height = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="10" y="{height:.0f}" text-anchor="middle" transform="rotate(-90 10 {height:.0f})">loss</text>'
    )
    parts.append(_path("raw", steps, losses, x, y))
    parts.append(_path("smooth", steps, _running_mean(losses), x, y))
    return "".join(parts) + "</svg>"


def _running_mean(losses: np.ndarray) -> np.ndarray:
    """Mean [n] over a centred window of about a tenth of the curve, narrower at the ends; gaps stay gaps."""
    known = np.isfinite(losses)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, losses, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(losses))
    half = np.minimum(max(1, len(losses) // 20), np.minimum(centre, len(losses) - 1 - centre))
    low, high = centre - half, centre + half + 1
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(known, mean, np.nan)


def _path(style: str, steps: np.ndarray, losses: np.ndarray, x: Scale, y: Scale) -> str:
    stride = max(1, math.ceil(len(losses) / _MOST_POINTS))
    kept = sorted({*range(0, len(losses), stride), len(losses) - 1})
    commands, pen_down = [], False
    for i in kept:
        if math.isfinite(losses[i]):
            commands.append(f"{'L' if pen_down else 'M'}{x(steps[i]):.1f} {y(losses[i]):.1f}")
        pen_down = bool(math.isfinite(losses[i]))
    return f'<path class="{style}" d="{"".join(commands)}"/>'
