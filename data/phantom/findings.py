"""What can be seen on a phantom film: the vocabulary, one study's findings, and how they are drawn by lot.

A finding is a name plus at most one side, size and place. Sides are the patient's: the patient's right is image left.
"""

from __future__ import annotations

import dataclasses

import numpy as np

SIDES = ("right", "left")

# name -> (sides, sizes, places); an empty tuple means that the finding has no such attribute.
VOCABULARY: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "cardiomegaly": ((), ("mild", "moderate", "severe"), ()),
    "pleural_effusion": (SIDES, ("small", "moderate", "large"), ()),
    "pneumothorax": (SIDES, ("small", "large"), ()),
    "consolidation": (SIDES, (), ("upper lobe", "middle lobe", "lower lobe")),
    "nodule": (SIDES, ("small", "large"), ("upper zone", "mid zone", "lower zone")),
    "endotracheal_tube": ((), (), ()),
    "central_line": (SIDES, (), ()),
    "pacemaker": (SIDES, (), ()),
}
FINDINGS = tuple(VOCABULARY)
DEVICES = ("endotracheal_tube", "central_line", "pacemaker")

PREVALENCE = 0.14
MOST = 4  # findings in one study


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding of one study; `box` is (x0, y0, x1, y1) in pixels of the film, end exclusive, None before drawing."""

    finding: str
    side: str | None = None
    size: str | None = None
    place: str | None = None
    box: tuple[int, int, int, int] | None = None

    @property
    def key(self) -> tuple[str, str | None, str | None, str | None]:
        """(finding, side, size, place): what a report says of it."""
        return self.finding, self.side, self.size, self.place


def sample(rng: np.random.Generator) -> list[Finding]:
    """Draws the findings of one study: each with probability `PREVALENCE`, at most `MOST`, none that hides another."""
    while True:
        names = [name for name in FINDINGS if rng.random() < PREVALENCE]
        if len(names) <= MOST:
            break
    while True:
        found = [_attributes(rng, name) for name in names]
        if not _hidden({f.finding: f for f in found}):
            return found


def _attributes(rng: np.random.Generator, name: str) -> Finding:
    sides, sizes, places = VOCABULARY[name]
    side = str(rng.choice(sides)) if sides else None
    if name == "consolidation" and side == "left":
        places = ("upper lobe", "lower lobe")  # the left lung has no middle lobe
    return Finding(name, side, str(rng.choice(sizes)) if sizes else None, str(rng.choice(places)) if places else None)


def _hidden(found: dict[str, Finding]) -> bool:
    """Whether one finding would cover another, so that a reader could not see both."""
    fluid, air = found.get("pleural_effusion"), found.get("pneumothorax")
    patch, nodule = found.get("consolidation"), found.get("nodule")
    if fluid and air and fluid.side == air.side:
        return True
    for opacity in (patch, nodule):
        if not opacity:
            continue
        level = (opacity.place or "").split()[0]
        if air and air.side == opacity.side and air.size == "large":
            return True
        if fluid and fluid.side == opacity.side:
            reached: dict[str, tuple[str, ...]] = {
                "small": ("lower",),
                "moderate": ("lower", "middle"),
                "large": ("lower", "middle", "mid"),
            }
            if level in reached[fluid.size or "large"] or (fluid.size == "large" and opacity is patch):
                return True
    if patch and nodule and patch.side == nodule.side:
        zones = {"upper lobe": ("upper",), "middle lobe": ("mid", "lower"), "lower lobe": ("lower",)}
        return (nodule.place or "").split()[0] in zones[patch.place or "upper lobe"]
    return False
