"""One patient's chest and the normal film of it: lungs, ribs, spine, mediastinum, heart, diaphragm, vessels.

All geometry is in units of the image side, x to the right and y down, so a film looks the same at every size. The
patient's right is image left: `right` has sign -1 along x.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Plane = NDArray[np.floating[Any]]  # float32 [Y,X], brightness or opacity
Stroke = tuple[NDArray[np.float64], float, float]  # points [n,2], width, brightness in [0,1]

SIGN = {"right": -1.0, "left": 1.0}
_SUPERSAMPLE = 3


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The shape of one patient's chest, the same in all of the patient's studies."""

    centre: float  # x of the midline
    half: float  # half width of the inner thorax at its widest
    apex: float  # y of the lung apices
    domes: tuple[float, float]  # y of the right and left diaphragm
    ratio: float  # normal heart width over thorax width
    heart_y: float
    rib_spacing: float
    rib_phase: float
    rib_slope: float
    rib_strength: float
    spine_bend: float
    clavicle: float  # y of the medial clavicle ends
    knob: float  # radius of the aortic knob
    breast: float  # opacity of breast shadows
    bubble: float  # opacity of the gastric air bubble
    lung: float  # brightness of the lungs
    tree: int  # seed of the vessel tree


def anatomy(rng: np.random.Generator) -> Anatomy:
    """Draws a patient."""
    dome = rng.uniform(0.70, 0.76)
    return Anatomy(
        centre=0.5 + rng.normal(0, 0.01),
        half=rng.uniform(0.375, 0.425),
        apex=rng.uniform(0.085, 0.13),
        domes=(dome, dome + rng.uniform(0.012, 0.035)),
        ratio=rng.uniform(0.41, 0.455),
        heart_y=rng.uniform(0.60, 0.635),
        rib_spacing=rng.uniform(0.074, 0.09),
        rib_phase=rng.uniform(0, 1),
        rib_slope=rng.uniform(0.16, 0.30),
        rib_strength=rng.uniform(0.05, 0.085),
        spine_bend=rng.normal(0, 0.007),
        clavicle=rng.uniform(0.19, 0.225),
        knob=rng.uniform(0.036, 0.05),
        breast=float(rng.random() < 0.4) * rng.uniform(0.04, 0.09),
        bubble=float(rng.random() < 0.6) * rng.uniform(0.2, 0.4),
        lung=rng.uniform(0.16, 0.22),
        tree=int(rng.integers(2**31)),
    )


def ramp(distance: Plane, soft: float) -> Plane:
    """0 to 1 across `soft` (image sides) around distance 0: an edge of that softness."""
    return np.clip(distance / np.float32(soft) + np.float32(0.5), 0, 1).astype(np.float32, copy=False)


def cloud(rng: np.random.Generator, size: int, cells: int) -> Plane:
    """Smooth noise [Y,X] of unit variance at the knots of a `cells` x `cells` grid."""
    knots = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(knots).resize((size, size), Image.Resampling.BICUBIC), np.float32)


def strokes(size: int, lines: list[Stroke]) -> Plane:
    """Draws smooth polylines, antialiased, into [Y,X] in [0,1]."""
    scale = size * _SUPERSAMPLE
    canvas = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(canvas)
    for points, width, value in lines:
        pen.line(
            (points * scale).ravel().tolist(),
            fill=round(255 * value),
            width=max(1, round(width * scale)),
            joint="curve",
        )
    return np.asarray(canvas.reduce(_SUPERSAMPLE), np.float32) / 255


def curve(points: list[tuple[float, float]], steps: int = 8) -> NDArray[np.float64]:
    """A Catmull-Rom spline [n,2] through `points` (Catmull and Rom 1974)."""
    p = np.asarray([points[0], *points, points[-1]], np.float64)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    parts = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
    ]
    return np.concatenate([*parts, p[-1:]])


class Chest:
    """One patient's chest laid on a pixel grid: the masks that films and findings are drawn with.

    Attributes: `x`, `y` [Y,X] coordinates; `dx` [Y,X] signed distance from the midline; `lungs` side -> mask [Y,X];
    `across` [Y,X] 0 at the mediastinum to 1 at the chest wall; `down` side -> [Y,X] 0 at the apex to 1 at the dome.
    """

    def __init__(self, body: Anatomy, size: int):
        self.body, self.size = body, size
        line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
        self.x, self.y = np.broadcast_to(line, (size, size)), np.broadcast_to(line[:, None], (size, size))
        self.dx = self.x - np.float32(body.centre)
        self.off = np.abs(self.dx)
        self.inner, self.outer = self._inner(line)[:, None], self._outer(line)[:, None]
        self.across = (self.off - self.inner) / np.maximum(self.outer - self.inner, np.float32(0.02))
        self.pixel = 1.0 / size
        inside = ramp(self.outer - self.off, 0.015) * ramp(self.off - self.inner, 0.02)
        inside *= ramp(self.y - np.float32(body.apex), 0.02)
        self.domes = {side: self._dome(side) for side in SIGN}
        self.down = {side: (self.y - body.apex) / (self.domes[side] - body.apex) for side in SIGN}
        self.half = {side: self.dx * np.float32(sign) > 0 for side, sign in SIGN.items()}
        self.lungs = {side: inside * ramp(self.domes[side] - self.y, 0.012) * self.half[side] for side in SIGN}

    def _outer(self, y: NDArray[np.float32]) -> NDArray[np.float32]:
        """Distance from the midline to the chest wall: a superellipse above the widest level, nearly straight below."""
        body, widest = self.body, 0.66
        t = np.clip((widest - y) / (widest - body.apex), 0, 1)
        return (0.11 + (body.half - 0.11) * (1 - t**2.3) ** (1 / 2.3)).astype(np.float32)

    def _inner(self, y: NDArray[np.float32]) -> NDArray[np.float32]:
        return (0.062 + 0.02 * np.clip((y - 0.3) / 0.3, 0, 1)).astype(np.float32)

    def _dome(self, side: str) -> Plane:
        top = self.body.domes[0 if side == "right" else 1]
        t = (self.off - 0.42 * self.body.half) / (0.58 * self.body.half)
        return (top + np.where(t > 0, 0.105, 0.03) * t * t).astype(np.float32)

    def point(self, side: str, across: float, down: float) -> tuple[float, float]:
        """The (x, y) of a place in a lung: `across` from mediastinum to wall, `down` from apex to dome."""
        dome = self.body.domes[0 if side == "right" else 1]
        y = self.body.apex + down * (dome - self.body.apex)
        line = np.asarray([y], np.float32)
        inner, outer = float(self._inner(line)[0]), float(self._outer(line)[0])
        return self.body.centre + SIGN[side] * (inner + across * (outer - inner)), y

    def heart(self, ratio: float) -> Plane:
        """The heart [Y,X] in [0,1], `ratio` of the thorax wide: a tilted ellipse, two thirds of it on the left."""
        body, wide = self.body, ratio * self.body.half
        x = self.dx - np.float32(0.30 * wide)
        y = self.y - np.float32(body.heart_y + 0.02 + 0.08 * (ratio - 0.43))
        u = (x - np.float32(0.10) * y) / np.float32(wide)
        v = (y - np.float32(0.16) * x) / np.float32(0.085 + 0.38 * wide)
        u = u * (1 + np.float32(0.30) * np.clip(-v, 0, 1.2))  # narrower towards the great vessels
        return ramp((1 - np.sqrt(u * u + v * v)) * np.float32(wide), 0.02)


def vessels(chest: Chest) -> Plane:
    """Branching lung markings [Y,X] in [0,1], thick at the hila, thin outside; none in the outer rim."""
    rng = np.random.default_rng(chest.body.tree)
    branches, steps = 10, 6
    # [side, branch, step]; each branch leaves the hilum at its own angle and bends a little at each step.
    heading = np.linspace(-1.25, 1.35, branches)[:, None] + rng.normal(0, 0.16, (2, branches, steps)).cumsum(-1)
    length = rng.uniform(0.028, 0.05, heading.shape)
    fork = heading + rng.choice([-0.8, 0.8], heading.shape)
    lines: list[Stroke] = []
    for s, sign in enumerate(SIGN.values()):
        root = np.asarray([chest.body.centre + sign * 0.09, 0.46 + 0.01 * sign])
        walk = np.stack([sign * length[s] * np.cos(heading[s]), length[s] * np.sin(heading[s])], -1).cumsum(-2)
        points = root + np.concatenate([np.zeros((branches, 1, 2)), walk], 1)
        twigs = points[:, 1:] + 0.07 * np.stack([sign * np.cos(fork[s]), np.sin(fork[s])], -1)
        for path, ends in zip(points, twigs, strict=True):
            for k in range(steps):
                width = 0.020 * 0.75**k
                lines.append((path[k : k + 2], width, 0.75 - 0.09 * k))
                if k in (1, 3):
                    lines.append((np.stack([path[k + 1], ends[k]]), width * 0.55, 0.45))
    return strokes(chest.size, lines)


def ribs(chest: Chest) -> Plane:
    """Rib shadows [Y,X]: posterior arches sloping down and outwards, fainter anterior ones sloping the other way."""
    body, off = chest.body, chest.off
    arch = chest.y - np.float32(body.rib_slope) * off - np.float32(0.6) * np.maximum(off - np.float32(0.2), 0) ** 2
    wave = np.cos(np.float32(2 * np.pi) * (arch / np.float32(body.rib_spacing) + np.float32(body.rib_phase)))
    back = np.clip(wave * np.float32(1.6) - np.float32(0.25), 0, 1)
    front = chest.y + np.float32(0.75) * off
    wave = np.cos(np.float32(2 * np.pi) * (front / np.float32(1.25 * body.rib_spacing) + np.float32(body.rib_phase)))
    ahead = np.clip(wave * np.float32(1.4) - np.float32(0.3), 0, 1) * ramp(off - np.float32(0.14), 0.12)
    cage = ramp(chest.outer + np.float32(0.025) - off, 0.01) * ramp(off - np.float32(0.05), 0.04)
    cage = cage * ramp(chest.y - np.float32(body.apex), 0.03) * ramp(np.float32(0.86) - chest.y, 0.1)
    return cage * np.float32(body.rib_strength) * (back + np.float32(0.45) * ahead)


def film(chest: Chest, heart_ratio: float, depth: float) -> tuple[Plane, Plane, Plane]:
    """The normal chest: (brightness without lung markings, lung markings, heart), each [Y,X].

    Args:
        heart_ratio: heart width over thorax width.
        depth: 1 for a deep breath; less lifts the brightness of the lungs.
    """
    body, y, dx, off = chest.body, chest.y, chest.dx, chest.off
    shoulder = np.float32(0.015) + np.float32(0.42) * np.maximum(off - np.float32(0.13), 0)
    outside = ramp(y - shoulder, 0.03) * ramp(
        np.float32(body.half + 0.07) + np.float32(0.02) * np.sin(np.float32(9) * y) - off, 0.03
    )
    image = outside * (np.float32(0.50) + np.float32(0.10) * ramp(y - np.float32(0.75), 0.2))
    image = image + np.float32(0.06) * ramp(np.float32(0.10) - off, 0.12) * outside
    for side in SIGN:
        level = body.lung + (1 - depth) + 0.05 * np.clip(chest.down[side], 0, 1)
        image = image + chest.lungs[side] * (level.astype(np.float32) - image)
    heart = chest.heart(heart_ratio)
    bend = np.float32(body.spine_bend) * np.sin(np.float32(6) * y)
    spine = np.exp(-(((dx - bend) / np.float32(0.042)) ** 4))
    image += spine * (np.float32(0.07) + np.float32(0.025) * np.cos(np.float32(2 * np.pi / 0.058) * y)) * outside
    image += ribs(chest) * outside
    for sign in SIGN.values():
        slope = y - np.float32(body.clavicle) + np.float32(0.28) * (off - np.float32(0.03))
        bone = np.exp(-((slope / np.float32(0.014)) ** 4)) * ramp(off - np.float32(0.035), 0.02)
        image += np.float32(0.085) * bone * ramp(np.float32(0.33) - off, 0.05) * (dx * np.float32(sign) > 0)
    wind = np.exp(-(((dx - bend) / np.float32(0.022)) ** 4)) * ramp(np.float32(0.36) - y, 0.03)
    image -= np.float32(0.11) * wind * outside
    knob = np.sqrt((dx - np.float32(0.062)) ** 2 + (y - np.float32(0.335)) ** 2)
    image += ramp(np.float32(body.knob) - knob, 0.015) * np.maximum(np.float32(0.62) - image, 0)
    trunk = np.float32(0.085) + np.float32(0.25) * np.maximum(y - np.float32(0.40), 0)  # pulmonary trunk, left border
    artery = (
        ramp(trunk - dx, 0.02) * ramp(dx, 0.02) * ramp(y - np.float32(0.42), 0.03) * ramp(np.float32(0.6) - y, 0.03)
    )
    image += artery * np.maximum(np.float32(0.60) - image, 0)
    image += heart * np.maximum(np.float32(0.66) + np.float32(0.05) * (y - np.float32(0.6)) - image, 0)
    below = np.float32(0.68) * ramp(y - chest.domes["right"], 0.012) * chest.half["right"]
    below = below + np.float32(0.64) * ramp(y - chest.domes["left"], 0.012) * chest.half["left"]
    image += outside * np.maximum(below - image, 0)
    gas = np.sqrt(((dx - np.float32(0.18)) / 0.075) ** 2 + ((y - np.float32(body.domes[1] + 0.075)) / 0.04) ** 2)
    image -= np.float32(body.bubble) * ramp(np.float32(1) - gas, 0.4) * image
    if body.breast:
        shadow = np.sqrt(((off - np.float32(0.23)) / 0.16) ** 2 + ((y - np.float32(0.64)) / 0.14) ** 2)
        image += np.float32(body.breast) * ramp(np.float32(1) - shadow, 0.12)
    lungs = chest.lungs["right"] + chest.lungs["left"]
    return image, vessels(chest) * lungs * (1 - np.maximum(heart, artery)) * np.float32(0.28), heart
