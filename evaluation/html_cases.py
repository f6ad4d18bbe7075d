"""Cases of the evaluation's page: a report beside its reference, aligned by finding, with its errors marked, the worst first.

Findings are read by the weight-free labeler in both texts, so that any predictions file will do; where the reference names a side, a text that
names none counts as another side. Words carry the attention map of the model that wrote them where one is given.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from evaluation import findings, page, panels, rule_labeler
from evaluation.labels import BLANK, CLASSES, NEGATIVE, POSITIVE, UNCERTAIN
from evaluation.lexicon import NO_FINDING
from evaluation.overlay import heat

_SAID = {POSITIVE: "", NEGATIVE: "denied", UNCERTAIN: "in doubt"}
_FINDINGS = [(i, name) for i, name in enumerate(CLASSES) if name != NO_FINDING]


@dataclass(frozen=True)
class Looked:
    """Where the first system looked: `spans` [(start, stop)] of words in its text and a map float [h, w] for each."""

    spans: Sequence[tuple[int, int]]
    maps: Sequence[np.ndarray]


@dataclass(frozen=True)
class Case:
    """One study. texts: system -> its report; image_png: what the model saw, square."""

    id: str
    reference: str
    texts: dict[str, str]
    image_png: bytes | None = None
    looked: Looked | None = None

    def marks(self, system: str) -> findings.Marks:
        """How the system's findings fared against the reference's."""
        return findings.mark(parse(self.reference), parse(self.texts[system]))

    def errors(self, system: str) -> int:
        """Missed, invented and wrongly sided findings."""
        marks = self.marks(system)
        return len(marks.missed) + len(marks.invented) + len(marks.wrong_side)


def parse(text: str) -> list[findings.Finding]:
    """The positive classes of a report with their sides, as the rule labeler reads them."""
    codes, where = rule_labeler.label(text, habits=False), panels.sides(text)
    return [
        (name, side, None, None)
        for i, name in _FINDINGS
        if codes[i] == POSITIVE
        for side in (sorted(where[name]) if name in where else [None])
    ]


def worst(cases: Sequence[Case], count: int) -> list[Case]:
    """The `count` cases in which the first system made most errors; where equal, the longer references first."""
    first = next(iter(cases[0].texts)) if cases else ""
    return sorted(cases, key=lambda case: (-case.errors(first), -len(case.reference)))[:count]


def section(cases: Sequence[Case], total: int) -> tuple[str, str]:
    """HTML of the section and the CSS of its filters; both empty without cases."""
    if not cases:
        return "", ""
    first, *others = cases[0].texts
    kinds = [_kinds(case, first) for case in cases]
    names = sorted({name for named in kinds for name in named})
    number = {name: i for i, name in enumerate(names, start=1)}
    choices = [f"<label>{_radio(0, True)}all {len(cases)}</label>"]
    choices += [f"<label>{_radio(number[n], False)}{escape(n)}: {sum(n in k for k in kinds)}</label>" for n in names]
    style = "".join(f"\nmain:has(#only-{i}:checked) .case:not(.only-{i}) {{ display: none; }}" for i in number.values())
    legend = "".join(f'<li class="mark {kind}">{name}</li>' for kind, name in page.KINDS.items())
    cards = "".join(_card(case, [number[n] for n in named]) for case, named in zip(cases, kinds, strict=True))
    hint = (
        f"The {len(cases)} of {total} reports in which {escape(first)} has most errors, as the rule labeler reads both texts."
        + (" Of the other systems, words that differ are marked." if others else "")
        + (" Point at a word to see where the model looked." if any(case.looked for case in cases) else "")
    )
    html = (
        f'<h2>Cases</h2><p class="hint">{hint}</p><ul class="legend">{legend}</ul>'
        f'<fieldset class="filters"><legend>Show</legend>{"".join(choices)}</fieldset><div class="cases">{cards}</div>'
    )
    return html, style


def _radio(number: int, checked: bool) -> str:
    return f'<input type="radio" name="only" id="only-{number}"{" checked" if checked else ""}>'


def _kinds(case: Case, system: str) -> list[str]:
    """What the filters can choose the case by."""
    truth, said = findings.sides(parse(case.reference)), findings.sides(parse(case.texts[system]))
    missed = [f"missed {name}" for name in truth if name not in said]
    invented = [f"invented {name}" for name in said if name not in truth]
    turned = any(truth[name] and said[name] and not truth[name] & said[name] for name in truth if name in said)
    return missed + invented + (["left and right swapped"] if turned else [])


def _card(case: Case, numbers: Iterable[int]) -> str:
    first, *others = case.texts
    marks = case.marks(first)
    groups = (
        ("right", marks.right),
        ("wrong_side", marks.wrong_side),
        ("missed", marks.missed),
        ("invented", marks.invented),
    )
    chips = "".join(
        f'<li class="mark {kind}">{page.KINDS[kind]}: {escape(name)}</li>' for kind, found in groups for name in found
    )  # fmt: skip
    film = f'<div class="stage">{page.image(case.image_png, "Radiograph")}</div>' if case.image_png else ""
    truth, said = parse(case.reference), parse(case.texts[first])
    missed = [(text, [m for m in found if m[0] == "missed"]) for text, found in findings.segments(case.reference, parse, truth, said)]  # fmt: skip
    rows = [("Reference", _marked(case.reference, missed, None))]
    own = findings.segments(case.texts[first], parse, truth, said)
    rows.append((escape(first), _marked(case.texts[first], own, case.looked if case.image_png else None)))
    rows += [(escape(name), _difference(case.texts[first], case.texts[name])) for name in others]
    report = "".join(f"<div><dt>{name}</dt><dd>{html}</dd></div>" for name, html in rows)
    chosen = " ".join(f"only-{i}" for i in numbers)
    body = f'<div class="look{"" if film else " blind"}">{film}<dl class="report">{report}</dl></div>'
    chips = f'<ul class="chips">{chips}</ul>' if chips else ""
    return f'<article class="card case {chosen}"><h3>{escape(case.id)}</h3>{chips}{body}{_aligned(case)}</article>'


def _marked(text: str, segments: page.Segments, looked: Looked | None) -> str:
    """A text with marks after its sentences and, where known, a map behind every word."""
    if not text.strip():
        return '<span class="end">(empty)</span>'
    out, start = [], 0
    for sentence, marks in segments:
        body = _words(text, start, start + len(sentence.rstrip()), looked)
        start += len(sentence)
        if marks:
            kinds = dict.fromkeys(kind for kind, _ in marks)
            tags = " ".join(f'<span class="mark {kind}">{page.KINDS[kind]}</span>' for kind in kinds)
            body = f'<span class="said {marks[0][0]}">{body}</span>{tags}'
        out.append(body)
    return " ".join(out)


def _words(text: str, start: int, stop: int, looked: Looked | None) -> str:
    if looked is None:
        return escape(text[start:stop])
    out = []
    for (begin, end), attention in zip(looked.spans, looked.maps, strict=True):
        if start <= begin and end <= stop:
            seen = page.image(heat(attention), "", "map")
            out.append(
                f'{escape(text[start:begin])}<span class="w" tabindex="0">{escape(text[begin:end])}{seen}</span>'
            )
            start = end
    return "".join(out) + escape(text[start:stop])


def _difference(first: str, second: str) -> str:
    """The second text; words that the first lacks are inserted, words that only the first has deleted."""
    if not second.strip():
        return '<span class="end">(empty)</span>'
    before, after = (re.findall(r"\S+", text) for text in (first, second))
    out = []
    for kind, i0, i1, j0, j1 in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old, new = (escape(" ".join(words)) for words in (before[i0:i1], after[j0:j1]))
        if kind == "equal":
            out.append(new)
            continue
        out += [f"<del>{old}</del>"] if old else []
        out += [f"<ins>{new}</ins>"] if new else []
    return " ".join(out)


def _aligned(case: Case) -> str:
    """A table of the sentences that speak of each finding, reference and systems side by side; findings that all deny are left out."""
    columns = [_by_class(case.reference), *(_by_class(text) for text in case.texts.values())]
    rows = []
    for _, name in _FINDINGS:
        if any(code != NEGATIVE for column in columns for _, code in column.get(name, ())):
            cells = "".join(f"<td>{_cell(column.get(name, ()))}</td>" for column in columns)
            rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("Finding", "Reference", *case.texts))
    table = f'<div class="scroll"><table class="aligned"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<details><summary>By finding</summary>{table}</details>"


def _by_class(text: str) -> dict[str, list[tuple[str, int]]]:
    """Class -> (sentence, code) of the sentences that mention it."""
    out: dict[str, list[tuple[str, int]]] = {}
    for sentence in findings.sentences(text):
        codes = rule_labeler.label(sentence, habits=False)
        for i, name in _FINDINGS:
            if codes[i] != BLANK:
                out.setdefault(name, []).append((sentence.strip(), int(codes[i])))
    return out


def _cell(mentions: Sequence[tuple[str, int]]) -> str:
    if not mentions:
        return '<span class="end">not mentioned</span>'
    return "<br>".join(
        escape(sentence) + (f' <span class="mark">{_SAID[code]}</span>' if _SAID[code] else "") for sentence, code in mentions
    )  # fmt: skip
