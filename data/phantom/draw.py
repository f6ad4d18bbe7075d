"""Draws a phantom film: the normal chest, the findings on top of it, the view, the exposure and the noise."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from data.phantom.anatomy import SIGN, Anatomy, Chest, Plane, Stroke, cloud, curve, film, ramp, strokes
from data.phantom.findings import FINDINGS, Finding

Box = tuple[int, int, int, int]
Place = tuple[float, float]

_RATIO = {"mild": (0.555, 0.59), "moderate": (0.65, 0.69), "severe": (0.75, 0.80)}  # heart width over thorax width
_FLUID = {"small": (0.89, 0.95), "moderate": (0.58, 0.66), "large": (0.28, 0.38)}  # level, 0 apex to 1 dome
_RIM = {"small": (0.74, 0.82), "large": (0.36, 0.46)}  # where the collapsed lung ends, 0 mediastinum to 1 chest wall
_NODULE = {"small": (0.066, 0.078), "large": (0.118, 0.140)}  # diameter
_LOBE = {"upper lobe": (0.50, 0.30), "middle lobe": (0.30, 0.70), "lower lobe": (0.66, 0.84)}  # (across, down)
_ZONE = {"upper zone": (0.22, 0.36), "mid zone": (0.47, 0.60), "lower zone": (0.74, 0.86)}  # down


@dataclasses.dataclass
class _Canvas:
    """A film in the making: brightness without lung markings, and the markings, which air and fluid wipe out."""

    chest: Chest
    image: Plane
    markings: Plane
    heart: Plane

    def cover(self, opacity: Plane, level: float | Plane) -> None:
        """Blends the film towards `level` where that is brighter."""
        self.image = self.image + opacity * np.maximum(np.float32(level) - self.image, np.float32(0.03))
        self.markings = self.markings * (1 - opacity)


def draw(
    body: Anatomy, findings: list[Finding], view: str, seed: list[int], size: int
) -> tuple[NDArray[np.uint8], list[Finding]]:
    """Draws one film.

    Each finding and the noise have random numbers of their own: a film drawn with one finding less differs only by it.

    Args:
        body: the patient.
        findings: what is to be seen; boxes in it are ignored.
        view: "AP" (larger heart, shallow breath, low contrast, more noise) or "PA".
        seed: of this study.
        size: pixels on each side.

    Returns:
        The film uint8 [Y,X] with Y = X = size, and the findings with their boxes.
    """
    chest = Chest(body, size)
    rng = np.random.default_rng([*seed, 1000])
    supine = view == "AP"
    depth = rng.uniform(0.90, 0.96) if supine else rng.uniform(0.97, 1.0)
    widen = rng.uniform(1.05, 1.09) if supine else rng.uniform(0.98, 1.02)
    sizes = {f.finding: f.size for f in findings}
    ratio = body.ratio * widen
    if "cardiomegaly" in sizes:
        low, high = _RATIO[sizes["cardiomegaly"] or "mild"]
        ratio = np.random.default_rng([*seed, 0]).uniform(low, high) * (1.04 if supine else 1.0)
    image, markings, heart = film(chest, ratio, depth)
    canvas = _Canvas(chest, image, markings, heart)
    boxes: dict[str, Box] = {}
    for found in sorted(findings, key=lambda f: _ORDER.index(f.finding)):
        own = np.random.default_rng([*seed, FINDINGS.index(found.finding)])
        mask = heart if found.finding == "cardiomegaly" else _PAINTERS[found.finding](canvas, found, own)
        boxes[found.finding] = _box(mask)
    pixels = _expose(canvas.image + canvas.markings, rng, supine)
    return pixels, [dataclasses.replace(f, box=boxes[f.finding]) for f in findings]


def _expose(image: Plane, rng: np.random.Generator, supine: bool) -> NDArray[np.uint8]:
    """Tissue texture, contrast, brightness, film noise; to uint8."""
    size = image.shape[0]
    image = image * (1 + np.float32(0.035) * cloud(rng, size, 5) + np.float32(0.02) * cloud(rng, size, 28))
    contrast, lift = (rng.uniform(0.80, 0.92), 0.06) if supine else (rng.uniform(0.95, 1.1), 0.0)
    image = np.clip(image, 0, 1.2) ** np.float32(rng.uniform(0.9, 1.12))
    image = image * np.float32(contrast) + np.float32(lift + rng.uniform(-0.02, 0.03))
    grain = rng.standard_normal((size, size)).astype(np.float32)
    image = image + np.float32(rng.uniform(0.016, 0.024) if supine else rng.uniform(0.008, 0.016)) * grain
    return np.clip(image * 255, 0, 255).astype(np.uint8)


def _box(mask: Plane) -> Box:
    """The pixels of `mask` above a third of its maximum: (x0, y0, x1, y1), end exclusive."""
    above = mask > mask.max() / 3
    rows, columns = np.flatnonzero(above.any(1)), np.flatnonzero(above.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _effusion(canvas: _Canvas, found: Finding, rng: np.random.Generator) -> Plane:
    """Fluid fills the lower hemithorax up to a meniscus that rises to the wall."""
    chest, side = canvas.chest, found.side or "left"
    level = rng.uniform(*_FLUID[found.size or "small"])
    across = np.clip(chest.across, 0, 1)
    steep = np.float32(rng.uniform(0.24, 0.34))
    inside = ramp(chest.outer - chest.off, 0.012) * ramp(chest.off - chest.inner, 0.012) * chest.half[side]
    fluid = inside * ramp(chest.down[side] - np.float32(level) + steep * (across**4 - np.float32(0.25)), 0.05)
    fluid = fluid * ramp(chest.domes[side] + np.float32(0.05) - chest.y, 0.03)
    canvas.cover(np.float32(rng.uniform(0.88, 0.97)) * fluid, rng.uniform(0.64, 0.70))
    return fluid


def _pneumothorax(canvas: _Canvas, found: Finding, rng: np.random.Generator) -> Plane:
    """Air between the lung and the wall: black, without markings, behind a thin bright pleural line."""
    chest, side = canvas.chest, found.side or "left"
    rim = rng.uniform(*_RIM[found.size or "small"])
    top = 0.24 if found.size == "small" else 0.34  # how far down the apex has come
    lung = np.float32(rim) * np.clip(1 - (np.clip(top + 0.12 - chest.down[side], 0, 1) / 0.20) ** 2, 0, 1) ** 0.5
    lung = lung + np.float32(0.02) * np.sin(np.float32(11) * chest.y + np.float32(rng.uniform(0, 6)))
    beyond = chest.across - lung  # > 0 in the air
    width = np.maximum(chest.outer - chest.inner, np.float32(0.02))
    lungs = chest.lungs[side] * (1 - canvas.heart)
    air = lungs * ramp(beyond * width, 0.012)
    line = lungs * np.exp(-((beyond * width / np.float32(max(0.008, 0.8 * chest.pixel))) ** 2))
    canvas.markings = canvas.markings * (1 - air)
    canvas.image = canvas.image * (1 - np.float32(rng.uniform(0.62, 0.75)) * air)
    collapsed = lungs * (1 - air)
    canvas.image = canvas.image + np.float32(0.05 if found.size == "small" else 0.12) * collapsed
    canvas.image = canvas.image + np.float32(rng.uniform(0.20, 0.28)) * line * (1 - np.clip(canvas.image, 0, 1))
    return air


def _consolidation(canvas: _Canvas, found: Finding, rng: np.random.Generator) -> Plane:
    """A patchy white area in one lobe; in the upper and middle lobe it ends sharply at the minor fissure."""
    chest, side, lobe = canvas.chest, found.side or "left", found.place or "lower lobe"
    across, down = _LOBE[lobe]
    x, y = chest.point(side, across + rng.uniform(-0.08, 0.08), down + rng.uniform(-0.03, 0.03))
    wide, high = rng.uniform(0.115, 0.14), rng.uniform(0.095, 0.12)
    u, v = (chest.x - np.float32(x)) / np.float32(wide), (chest.y - np.float32(y)) / np.float32(high)
    ragged = np.float32(0.22) * cloud(rng, chest.size, 12)
    patch = ramp(np.float32(1.1) - np.sqrt(u * u + v * v) + ragged, 0.5) * chest.lungs[side]
    if side == "right" and lobe != "lower lobe":
        fissure = chest.body.apex + 0.55 * (chest.body.domes[0] - chest.body.apex)
        patch = patch * ramp((chest.y - np.float32(fissure)) * (1 if lobe == "middle lobe" else -1), 0.012)
    patchy = np.clip(np.float32(0.82) + np.float32(0.16) * cloud(rng, chest.size, 22), 0, 1)
    opacity = patch * patchy
    canvas.cover(np.float32(rng.uniform(0.92, 1.0)) * opacity, rng.uniform(0.60, 0.70))
    return patch


def _nodule(canvas: _Canvas, found: Finding, rng: np.random.Generator) -> Plane:
    """A round, slightly irregular white spot."""
    chest, side = canvas.chest, found.side or "left"
    x, y = chest.point(side, rng.uniform(0.42, 0.76), rng.uniform(*_ZONE[found.place or "mid zone"]))
    radius = rng.uniform(*_NODULE[found.size or "small"]) / 2
    dx, dy = chest.x - np.float32(x), chest.y - np.float32(y)
    angle, bumps = np.arctan2(dy, dx), rng.integers(3, 6)
    edge = np.float32(radius) * (1 + np.float32(0.05) * np.sin(bumps * angle + np.float32(rng.uniform(0, 6))))
    spot = ramp(edge - np.sqrt(dx * dx + dy * dy), max(0.010, 1.2 * chest.pixel))
    canvas.image = canvas.image + spot * np.maximum(
        np.float32(rng.uniform(0.74, 0.84)) - canvas.image, np.float32(0.22)
    )
    canvas.markings = canvas.markings * (1 - spot)
    return spot


def _lay(canvas: _Canvas, lines: list[Stroke], level: float) -> Plane:
    metal = strokes(canvas.chest.size, lines)
    canvas.image = canvas.image + metal * np.maximum(np.float32(level) - canvas.image, np.float32(0.1))
    return metal


def _tube(canvas: _Canvas, found: Finding, rng: np.random.Generator) -> Plane:
    """An endotracheal tube: a straight bright line down the windpipe, ending above the carina."""
    x = canvas.chest.body.centre + rng.normal(0, 0.004)
    lean = rng.normal(0, 0.008)
    path = curve([(x + lean, -0.03), (x + lean / 2, 0.12), (x, rng.uniform(0.27, 0.33))])
    return _lay(canvas, [(path, 0.024, 1.0)], rng.uniform(0.92, 1.0))


def _line(canvas: _Canvas, found: Finding, rng: np.random.Generator) -> Plane:
    """A central venous line: from the neck or below the clavicle of its side down to the superior vena cava."""
    chest, sign = canvas.chest, SIGN[found.side or "right"]
    centre = chest.body.centre
    if rng.random() < 0.5:
        start: list[Place] = [(centre + sign * rng.uniform(0.10, 0.12), -0.02), (centre + sign * 0.10, 0.10)]
    else:
        start = [(centre + sign * rng.uniform(0.30, 0.36), 0.30), (centre + sign * 0.21, 0.185)]
    join: list[Place] = [(centre + sign * 0.10, 0.20)]
    if found.side == "left":  # across the midline through the brachiocephalic vein
        join += [(centre + 0.02, 0.255), (centre - 0.045, 0.30)]
    vein = centre - 0.062
    path = curve([*start, *join, (vein, 0.36), (vein + rng.normal(0, 0.006), rng.uniform(0.46, 0.54))])
    return _lay(canvas, [(path, 0.016, 1.0)], rng.uniform(0.86, 0.96))


def _pacemaker(canvas: _Canvas, found: Finding, rng: np.random.Generator) -> Plane:
    """A generator below the clavicle of its side, and one or two leads through the vena cava into the heart."""
    chest, sign = canvas.chest, SIGN[found.side or "left"]
    centre = chest.body.centre
    x, y = centre + sign * rng.uniform(0.29, 0.33), rng.uniform(0.24, 0.30)
    box: Stroke = (np.asarray([(x - 0.035, y), (x + 0.035, y)]), rng.uniform(0.085, 0.105), 1.0)
    entry: list[Place] = [(x, y), (centre + sign * 0.17, 0.195), (centre + sign * 0.08, 0.23)]
    if sign > 0:
        entry.append((centre - 0.01, 0.29))
    vein: Place = (centre - 0.058, 0.40)
    low = chest.body.heart_y + rng.uniform(0.05, 0.08)
    ends: list[list[Place]] = [[(centre - 0.03, low - 0.04), (centre + 0.05, low + 0.01), (centre + 0.13, low)]]
    if rng.random() < 0.6:
        ends.append([(centre - 0.085, low - 0.10), (centre - 0.06, low - 0.05)])
    leads: list[Stroke] = [(curve([*entry, vein, *end]), 0.012, 1.0) for end in ends]
    return _lay(canvas, [*leads, box], rng.uniform(0.94, 1.0))


_PAINTERS = {
    "pleural_effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "consolidation": _consolidation,
    "nodule": _nodule,
    "endotracheal_tube": _tube,
    "central_line": _line,
    "pacemaker": _pacemaker,
}
_ORDER = ("cardiomegaly", "pneumothorax", "consolidation", "pleural_effusion", "nodule", *FINDINGS[5:])
