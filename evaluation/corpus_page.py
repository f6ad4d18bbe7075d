"""The page of a corpus: films with their texts, labels and boxes, lengths, counts, what was left out, and what is there twice.

In the style of the demo's page, and like it one file that asks the network for nothing and runs no script.
"""

import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, TypedDict

from PIL import Image

from evaluation import page
from rad_jax.chat import access

_STYLE = """
.hist { display: block; width: 100%; height: auto; margin-top: 6px; }
.hist rect { fill: var(--accent); }
.hist line { stroke: var(--line); }
.hist text { fill: var(--soft); font-size: 12px; font-family: inherit; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 18px; align-items: start; }
.samples .report dd { white-space: pre-line; max-height: 16em; overflow-y: auto; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; align-items: start; }
@media (min-width: 561px) { .tiles { grid-template-columns: repeat(auto-fill, minmax(min(100%, 170px), 1fr)); } }
.warning { border-left-color: var(--invented); }
"""
_SIDE = 336  # pixels of a film on the page


class Sample(TypedDict):
    """One film: `boxes` are (what, [x0, y0, x1, y1]) in pixels of `image_png`, `texts` (section, words), `labels` words as "no Edema"."""

    title: str
    facts: str
    image_png: bytes
    boxes: Sequence[tuple[str, Sequence[float]]]
    labels: Sequence[str]
    texts: Sequence[tuple[str, str]]


class Part(TypedDict):
    """One corpus: tiles and tables as on the demo's page, histograms as title -> (least, greatest, texts) of each bin."""

    name: str
    tiles: Sequence[page.Tile]
    histograms: Mapping[str, Sequence[tuple[int, int, int]]]
    tables: Sequence[page.Table]
    samples: Sequence[Sample]


def write(
    path: str | os.PathLike[str],
    parts: Sequence[Part],
    warnings: Sequence[str],
    shared: page.Table | None,
    level: str = access.PRIVATE,
) -> Path:
    """Writes the page whole or not at all; returns its path.

    Args:
        path: the HTML file.
        parts: the corpora.
        warnings: what to mend before training; empty if nothing was found.
        shared: films that two splits share, if there are any.
        level: who may have the corpora: unless it is public, the page is for its owner's eyes.
    """
    here = Path(__file__).parent
    body = [_notice(warnings)]
    if shared:
        body.append(f'<section id="shared"><h2>In two splits</h2>{page.table_card(shared)}</section>')
    body += [_part(number, part, len(parts) > 1) for number, part in enumerate(parts)]
    links = [(f"part{number}-{key}", f"{part['name']}: {name}" if len(parts) > 1 else name)
             for number, part in enumerate(parts) for key, name in (("counts", "Counts"), ("films", "Films"), ("tables", "Tables"))]  # fmt: skip
    html = Template((here / "page.html.template").read_text(encoding="utf-8")).substitute(
        title="Corpus: " + escape(", ".join(part["name"] for part in parts)),
        subtitle="What a training would read: look before you spend a pod on it.",
        style=(here / "page.css").read_text(encoding="utf-8").strip() + _STYLE,
        navigation=" ".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in links),
        body="\n".join(body),
        footer="Made by rad_jax. This page holds images, texts and ids of the corpus: it is as sensitive as the corpus.",
    )
    return page.write(path, html, level)


def _notice(warnings: Sequence[str]) -> str:
    if not warnings:
        return '<div class="card notice"><p><strong>Nothing to mend was found.</strong></p></div>'
    lines = "".join(f"<p>{escape(line)}</p>" for line in warnings)
    return f'<div class="card notice warning"><p><strong>Look at this first.</strong></p>{lines}</div>'


def _part(number: int, part: Part, named: bool) -> str:
    name = f"{escape(part['name'])}: " if named else ""
    drawn = "".join(
        f'<figure class="card"><h3>{escape(title)}</h3>{_histogram(title, bins)}</figure>'
        for title, bins in part["histograms"].items()
        if bins
    )
    tables = "".join(page.table_card(table) for table in part["tables"] if table["rows"])
    films = "".join(_sample(sample) for sample in part["samples"])
    return (
        f'<section id="part{number}-counts"><h2>{name}Counts</h2>{page.tiles(part["tiles"])}'
        f'<h2>{name}Lengths</h2><div class="halves">{drawn}</div></section><section id="part{number}-films"><h2>{name}Films</h2>'
        f'<p class="hint">Evenly spaced over the splits, not chosen. White: boxes of the corpus.</p><div class="samples">{films}</div></section>'
        f'<section id="part{number}-tables"><h2>{name}Tables</h2><div class="halves">{tables}</div></section>'
    )


def _histogram(title: str, bins: Sequence[tuple[int, int, int]]) -> str:
    """Bars over an axis with three numbers, as SVG."""
    width, height, base = 420, 150, 122
    most = max(count for _, _, count in bins)
    step = width / len(bins)
    bars = "".join(
        f'<rect x="{k * step + 0.5:.1f}" y="{base - 100 * count / most:.1f}" width="{max(step - 1, 1):.1f}" height="{100 * count / most:.1f}">'
        f"<title>{least} to {greatest} tokens: {count}</title></rect>"
        for k, (least, greatest, count) in enumerate(bins)
    )
    end = bins[-1][1] + 1
    axis = "".join(
        f'<text x="{at * width:.0f}" y="{base + 18}" text-anchor="{anchor}">{round(at * end)}</text>'
        for at, anchor in ((0, "start"), (0.5, "middle"), (1, "end"))
    )
    top = f'<text x="0" y="14">{most} texts</text>'
    line = f'<line x1="0" y1="{base}" x2="{width}" y2="{base}"/>'
    return f'<svg class="hist" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{top}{bars}{line}{axis}</svg>'


def _sample(sample: Sample) -> str:
    with Image.open(io.BytesIO(sample["image_png"])) as film:
        width, height = film.size
        film.thumbnail((_SIDE, _SIDE * 2))
        small = io.BytesIO()
        film.save(small, "PNG")
    boxes = "".join(page.outline(*map(float, box)) for _, box in sample["boxes"])
    frame = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="Boxes"'
    over = f"<svg {frame}>{boxes}</svg>" if boxes else ""
    named = ", ".join(what for what, _ in sample["boxes"])
    caption = f"<figcaption>Boxes: {escape(named)}</figcaption>" if named else ""
    labels = "".join(f'<li class="mark {_kind(label)}">{escape(label)}</li>' for label in sample["labels"])
    texts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(words)}</dd></div>" for name, words in sample["texts"])
    return (
        f'<article class="card study"><h3>{escape(sample["title"])}</h3><div class="end">{escape(sample["facts"])}</div>'
        f'<figure><div class="stage">{page.image(small.getvalue(), "Radiograph")}{over}</div>{caption}</figure>'
        + (f'<ul class="chips">{labels}</ul>' if labels else "")
        + f'<dl class="report">{texts}</dl></article>'
    )


def _kind(label: str) -> str:
    return "right" if label.startswith("no ") else "wrong_side" if label.endswith("?") else "missed"


def context_of(label: str, state: str) -> str:
    """A label as words: "Edema", "no Edema" or "Edema?"."""
    return {"positive": label, "negative": f"no {label}", "uncertain": f"{label}?"}[state]


def sections(texts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(section, words) of all texts of a film, with the method where there are several."""
    rows = []
    for text in texts:
        for name in ("indication", "findings", "impression"):
            if text[name]:
                rows.append((f"{name.title()} ({text['method']})" if len(texts) > 1 else name.title(), str(text[name])))
    return rows
