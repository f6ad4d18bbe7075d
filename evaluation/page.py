"""The page one looks at: scores beside their floors, loss curves, and held-out studies, in one HTML file.

The file carries everything it shows (style, SVG, base64 PNG), asks the network for nothing and runs no script; a
content security policy inside it holds that even if a report contained markup. Every text is escaped.
"""

import base64
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NotRequired, TypedDict

from PIL import Image

from evaluation import curve, findings
from rad_jax.chat import access

KINDS = {"right": "✓ correct", "wrong_side": "⇄ wrong side", "missed": "○ missed", "invented": "+ invented"}
FOOTER = "Made by rad_jax. For research; not for clinical use."
_SECTIONS = {"scores": "Scores", "learning": "Learning", "findings": "Tables", "studies": "Studies", "run": "Run"}


class Tile(TypedDict):
    """One headline number.

    fraction in [0, 1] draws a meter; marks are (where in [0, 1], what it is: floor, chance, ...).
    """

    label: str
    value: str
    note: str
    fraction: NotRequired[float | None]
    marks: NotRequired[Sequence[tuple[float, str]]]


class Curve(TypedDict):
    """The training loss of one stage, (step, loss) per logged step."""

    name: str
    points: Sequence[tuple[float, float]]


class Table(TypedDict):
    """Cells: text as it is, whole numbers as they are, fractions with three digits, None as n/a.

    bar: index of a column whose numbers in [0, 1] also get a bar.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]
    note: NotRequired[str]
    bar: NotRequired[int | None]


Segments = Sequence[tuple[str, Sequence[tuple[str, str]]]]


class Study(TypedDict):
    """One held-out study.

    image_png: the image as the model sees it; attention_png: what `evaluation.overlay` made of the map for `word`;
    boxes: where the thing truly is, [x0, y0, x1, y1] in pixels of image_png, empty when not known. right, missed,
    invented, wrong_side: findings in words, None (or absent) where no truth is known. The segments are those of
    `evaluation.findings.segments`; without them the texts are shown unmarked. `judge` makes all of these.
    """

    id: str
    image_png: bytes
    attention_png: bytes | None
    word: str | None
    boxes: Sequence[Sequence[float]]
    indication: str
    reference: str
    prediction: str
    right: Sequence[str] | None
    missed: Sequence[str] | None
    invented: Sequence[str] | None
    wrong_side: NotRequired[Sequence[str] | None]
    prediction_segments: NotRequired[Segments | None]
    reference_segments: NotRequired[Segments | None]


class Judged(TypedDict):
    """The part of a `Study` that needs its truth."""

    right: Sequence[str]
    missed: Sequence[str]
    invented: Sequence[str]
    wrong_side: Sequence[str]
    prediction_segments: Segments
    reference_segments: Segments


def judge(
    reference: str,
    prediction: str,
    truth: Sequence[findings.Finding],
    parse: Callable[[str], Sequence[findings.Finding]],
) -> Judged:
    """How a generated report fared against the true findings; in the reference only what was missed is marked."""
    said = parse(prediction)
    marks = findings.mark(truth, said)
    in_reference = findings.segments(reference, parse, truth, said)
    return Judged(
        right=marks.right,
        missed=marks.missed,
        invented=marks.invented,
        wrong_side=marks.wrong_side,
        prediction_segments=findings.segments(prediction, parse, truth, said),
        reference_segments=[(text, [m for m in found if m[0] == "missed"]) for text, found in in_reference],
    )


class Corpus(TypedDict):
    """What was learnt from. synthetic: drawn, so the truth is known. facts: (name, value) pairs."""

    name: str
    synthetic: bool
    description: str
    facts: NotRequired[Sequence[tuple[str, str]]]


class Context(TypedDict):
    """Everything on the page. An empty list leaves its section out."""

    title: str
    subtitle: str
    corpus: Corpus
    tiles: Sequence[Tile]
    curves: Sequence[Curve]
    tables: Sequence[Table]
    studies: Sequence[Study]
    timings: Sequence[tuple[str, float]]
    config_text: str
    machine: NotRequired[Sequence[tuple[str, str]]]
    notes: NotRequired[Sequence[str]]
    footer: NotRequired[str]


def write_page(path: str | os.PathLike[str], context: Context) -> Path:
    """Writes the page and returns its path, for its owner's eyes unless the corpus is drawn; errors as `write`."""
    return write(path, render(context), access.PUBLIC if context["corpus"]["synthetic"] else access.PRIVATE)


def write(path: str | os.PathLike[str], html: str, level: str = access.PUBLIC) -> Path:
    """Writes a page and returns its path; the file appears whole or not at all, for its owner's eyes alone unless `level` is public.

    Raises OSError when it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    access.create(part, level).write_text(html, encoding="utf-8", errors="replace")
    os.replace(part, path)
    return path


def render(context: Context) -> str:
    """The page as HTML text."""
    sections = {
        "scores": tiles(context["tiles"]),
        "learning": _curves(context["curves"]),
        "findings": _tables(context["tables"]),
        "studies": _studies(context["studies"]),
        "run": _run(context),
    }
    footer = context.get("footer", FOOTER)
    return document(context["title"], context["subtitle"], _notice(context), _SECTIONS, sections, footer)


def document(
    title: str,
    subtitle: str,
    notice: str,
    names: Mapping[str, str],
    sections: Mapping[str, str],
    footer: str = FOOTER,
    style: str = "",
) -> str:
    """A whole page around its sections.

    Args:
        title: plain text, as subtitle and footer.
        notice: HTML above all sections.
        names: section -> what the navigation calls it.
        sections: section -> HTML; empty ones are left out.
        style: more CSS than page.css.
    """
    here = Path(__file__).parent
    present = {name: html for name, html in sections.items() if html}
    navigation = " ".join(f'<a href="#{name}">{escape(names[name])}</a>' for name in present)
    body = [notice, *(f'<section id="{name}">\n{html}\n</section>' for name, html in present.items())]
    return Template((here / "page.html.template").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        style=(here / "page.css").read_text(encoding="utf-8").strip() + style,
        navigation=navigation,
        body="\n".join(body),
        footer=escape(footer),
    )


def _notice(context: Context) -> str:
    corpus = context["corpus"]
    truth = (
        "These radiographs are synthetic: drawn by a program together with their reports, so every finding, side and "
        "box is known exactly. The figures say that the recipe learns, not how it would do on patients."
        if corpus["synthetic"]
        else "The true findings of these images are not known: reports are compared with the reference text only."
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in context.get("notes", ()))
    name = f"<strong>{escape(corpus['name'])}.</strong> {escape(corpus['description'])}"
    return f'<div class="card notice"><p>{name}</p><p>{truth}</p>{notes}</div>'


def tiles(shown: Sequence[Tile]) -> str:
    if not shown:
        return ""
    return f'<div class="tiles">{"".join(_tile(tile) for tile in shown)}</div>'


def _tile(tile: Tile) -> str:
    meter = ""
    fraction = tile.get("fraction")
    if fraction is not None:
        marks = "".join(
            f'<i style="left:{_percent(at)}" title="{escape(name)}"></i>' for at, name in tile.get("marks", ())
        )
        meter = f'<div class="meter" aria-hidden="true"><span style="width:{_percent(fraction)}"></span>{marks}</div>'
    return (
        f'<div class="card tile"><div class="value">{escape(tile["value"])}</div>'
        f'<div class="name">{escape(tile["label"])}</div>{meter}<div class="note">{escape(tile["note"])}</div></div>'
    )


def _percent(fraction: float) -> str:
    return f"{100 * min(max(fraction, 0.0), 1.0):.1f}%"


def _curves(curves: Sequence[Curve]) -> str:
    cards = []
    for item in curves:
        points = list(item["points"])
        end = curve.last_finite(points)
        if end is None:
            continue
        caption = f"{end[1]:.3g} at step {end[0]:g}"
        drawn = curve.svg(points, f"Training loss of {item['name']} by step")
        cards.append(
            f'<figure class="card"><h3>{escape(item["name"])}</h3><div class="end">{caption}</div>{drawn}</figure>'
        )
    if not cards:
        return ""
    hint = '<p class="hint">Training loss by step. Thin: as logged; thick: running mean.</p>'
    return f'<h2>Learning</h2>{hint}<div class="curves">{"".join(cards)}</div>'


def _tables(tables: Sequence[Table]) -> str:
    if not tables:
        return ""
    return f'<h2>Tables</h2><div class="tables">{"".join(table_card(table) for table in tables)}</div>'


def table_card(table: Table) -> str:
    """A table as HTML."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table["columns"])
    rows = "".join(f"<tr>{_cells(row, table.get('bar'))}</tr>" for row in table["rows"])
    note = f'<p class="hint">{escape(table["note"])}</p>' if table.get("note") else ""
    return (
        f'<div class="card"><h3>{escape(table["title"])}</h3>{note}<div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>"
    )


def _cells(row: Sequence[str | int | float | None], bar: int | None) -> str:
    out = []
    for i, cell in enumerate(row):
        text = "n/a" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
        drawn = ""
        if i == bar and isinstance(cell, int | float):
            drawn = _bar(cell)
        out.append(f'<th scope="row">{escape(text)}</th>' if i == 0 else f"<td>{drawn}{escape(text)}</td>")
    return "".join(out)


def _bar(fraction: float) -> str:
    return f'<span class="bar" aria-hidden="true"><span style="width:{_percent(fraction)}"></span></span>'


def _studies(studies: Sequence[Study]) -> str:
    if not studies:
        return ""
    judged = any(study["right"] is not None for study in studies)
    legend = "".join(f'<li class="mark {kind}">{name}</li>' for kind, name in KINDS.items())
    hint = '<p class="hint">Held-out studies; the model saw the image and the indication only.</p>'
    cards = "".join(_study(study) for study in studies)
    return (
        f"<h2>Studies</h2>{hint}"
        + (f'<ul class="legend">{legend}</ul>' if judged else "")
        + f'<div class="studies">{cards}</div>'
    )


def _study(study: Study) -> str:
    chips = ""
    if study["right"] is not None:
        groups: Iterable[tuple[str, Sequence[str] | None]] = (
            ("right", study["right"]),
            ("wrong_side", study.get("wrong_side")),
            ("missed", study["missed"]),
            ("invented", study["invented"]),
        )
        items = [
            f'<li class="mark {kind}">{KINDS[kind]}: {escape(name)}</li>'
            for kind, names in groups
            for name in names or ()
        ]
        if not study["prediction"].strip():
            items.append('<li class="mark missed">○ no report was generated</li>')
        items = items or ['<li class="mark right">✓ correct: no finding, and none named</li>']
        chips = f'<ul class="chips">{"".join(items)}</ul>'
    rows = (
        ("Indication", _marked(study["indication"], None)),
        ("Reference", _marked(study["reference"], study.get("reference_segments"))),
        ("Generated", _marked(study["prediction"], study.get("prediction_segments"))),
    )
    report = "".join(f"<div><dt>{name}</dt><dd>{html}</dd></div>" for name, html in rows)
    head = f"<h3>{escape(study['id'])}</h3>"
    return f'<article class="card study">{head}{_views(study)}{chips}<dl class="report">{report}</dl></article>'


def _views(study: Study) -> str:
    film = image(study["image_png"], "Radiograph")
    plain = f'<figure><div class="stage">{film}</div><figcaption>Image</figcaption></figure>'
    if study["attention_png"] is None:
        return f'<div class="views">{plain}</div>'
    with Image.open(io.BytesIO(study["image_png"])) as opened:
        width, height = opened.size
    drawn = "".join(outline(*(float(v) for v in box)) for box in study["boxes"])
    frame = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="True box"'
    box = f"<svg {frame}>{drawn}</svg>" if drawn else ""
    word = f"Attention while writing “{escape(study['word'])}”" if study["word"] else "Attention"
    map_image = image(study["attention_png"], "Attention over the radiograph", "map")
    return (
        f'<div class="views">{plain}<figure class="attended"><div class="stage">{film}{map_image}{box}</div>'
        f"<figcaption>{word}{'; white: true box' if box else ''}<br>"
        '<label class="toggle"><input type="checkbox" checked> show map</label></figcaption></figure></div>'
    )


def outline(x0: float, y0: float, x1: float, y1: float) -> str:
    shape = f'x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}"'
    return f'<rect class="under" {shape}/><rect class="over" {shape}/>'


def image(png: bytes, alt: str, style: str = "") -> str:
    """A PNG as an element that carries it; `alt` and `style` are our own words."""
    data = base64.b64encode(png).decode("ascii")
    kind = f' class="{style}"' if style else ""
    return f'<img{kind} alt="{alt}" src="data:image/png;base64,{data}">'


def _marked(text: str, segments: Segments | None) -> str:
    if not text.strip():
        return '<span class="end">(empty)</span>'
    if segments is None:
        return escape(text)
    out = []
    for sentence, marks in segments:
        body = escape(sentence.rstrip())
        if marks:
            tags = " ".join(
                f'<span class="mark {kind}">{KINDS[kind]}</span>' for kind in dict.fromkeys(k for k, _ in marks)
            )
            body = f'<span class="said {marks[0][0]}">{body}</span>{tags}'
        out.append(body)
    return " ".join(out)


def _run(context: Context) -> str:
    cards = []
    if context["timings"]:
        longest = max(seconds for _, seconds in context["timings"]) or 1.0
        total = sum(seconds for _, seconds in context["timings"])
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td class="length">{_bar(seconds / longest)}</td>'
            f"<td>{_duration(seconds)}</td></tr>"
            for name, seconds in context["timings"]
        )
        table = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
        cards.append(_card(f"Time per stage, {_duration(total)} in all", table))
    if facts := [*context["corpus"].get("facts", ()), *context.get("machine", ())]:
        pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
        cards.append(_card("Corpus and machine", f'<dl class="pairs">{pairs}</dl>'))
    if context["config_text"]:
        text = f"<details><summary>Show all of it</summary><pre>{escape(context['config_text'])}</pre></details>"
        cards.append(_card("Configuration", text))
    return f'<h2>Run</h2><div class="tables">{"".join(cards)}</div>' if cards else ""


def _card(title: str, body: str) -> str:
    return f'<div class="card"><h3>{title}</h3>{body}</div>'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
