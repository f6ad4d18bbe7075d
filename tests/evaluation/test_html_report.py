"""The evaluation's page: what it says, what it keeps to itself, and how it looks to a browser with 200 reports of two systems."""

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation import html_cases, html_report, html_sources, report
from evaluation.html_cases import Case, Looked
from evaluation.predictions import Predictions, Row
from rad_jax.errors import UserError

SENTENCES = (
    "The lungs are clear.",
    "Heart size is normal.",
    "No pleural effusion or pneumothorax.",
    "Small left pleural effusion with adjacent atelectasis.",
    "Large right pleural effusion.",
    "Mild cardiomegaly.",
    "Patchy opacity in the right lower lobe may represent pneumonia.",
    "The endotracheal tube ends 4.5 cm above the carina.",
    "Tiny right apical pneumothorax.",
)
SYSTEMS = ("first", "second")


def systems(count: int) -> tuple[list[report.Input], list[str]]:
    """Predictions of two systems, and the references; the first system has more sentences exchanged."""
    rng = np.random.default_rng(0)
    references = [list(rng.choice(SENTENCES, size=5, replace=False)) for _ in range(count)]
    inputs = []
    for name, wrong in zip(SYSTEMS, (2, 1), strict=True):
        rows = []
        for i, sentences in enumerate(references):
            said = [*sentences]
            for at in rng.choice(5, size=wrong, replace=False):
                said[at] = str(rng.choice(SENTENCES))
            rows.append(Row(f"patient{i}/study", "", " ".join(sentences), " ".join(said), i + 1))
        inputs.append(report.Input(name, Predictions(rows, [])))
    return inputs, [" ".join(sentences) for sentences in references]


@pytest.fixture(scope="module")
def evaluated() -> tuple[list[report.Input], Any]:
    inputs, _ = systems(40)
    groups = {row.id: {"view": "AP" if i % 2 else "PA"} for i, row in enumerate(inputs[0].read.rows)}
    return inputs, report.evaluate(inputs, report.Options(draws=100, trials=100, groups=groups))[0]


def cases(inputs: list[report.Input]) -> list[Case]:
    rows = zip(*(item.read.rows for item in inputs), strict=True)
    return [Case(a.id, a.reference, {"first": a.prediction, "second": b.prediction}) for a, b in rows]


def text_of(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def test_cases_are_marked_aligned_and_compared() -> None:
    reference = "Small left pleural effusion. No pneumothorax. Mild cardiomegaly."
    texts = {"a": "Small right pleural effusion. Tiny left apical pneumothorax.", "b": "Small left pleural effusion. Mild cardiomegaly."}  # fmt: skip
    case = Case("x", reference, texts)
    assert (case.errors("a"), case.errors("b")) == (3, 0)
    html, style = html_cases.section([case], 5)
    text = text_of(html)
    for said in (
        "⇄ wrong side: left Pleural Effusion, called right",
        "○ missed: Cardiomegaly",
        "+ invented: left Pneumothorax",
        "The 1 of 5 reports",
    ):
        assert said in text
    assert "<del>right</del> <ins>left</ins>" in html
    row = re.search(r'<tr><th scope="row">Pneumothorax</th>(.*?)</tr>', html)
    assert row is not None
    assert [text_of(cell) for cell in row[1].split("</td>")[:-1]] == [
        "No pneumothorax. denied",
        "Tiny left apical pneumothorax.",
        "not mentioned",
    ]
    # Every filter hides the cases that have not what it names.
    labels = re.findall(r'id="only-(\d+)"[^>]*>([^<]*)<', html)
    assert [name for _, name in labels] == [
        *("all 1", "invented Pneumothorax: 1", "left and right swapped: 1", "missed Cardiomegaly: 1"),
    ]
    assert all(f"#only-{i}:checked" in style for i, _ in labels[1:])


def test_worst_first(evaluated: tuple[list[report.Input], Any]) -> None:
    shown = html_cases.worst(cases(evaluated[0]), 10)
    errors = [case.errors("first") for case in shown]
    assert errors == sorted(errors, reverse=True) and len(shown) == 10
    assert errors[-1] >= max(c.errors("first") for c in cases(evaluated[0]) if c.id not in {s.id for s in shown})


def test_every_word_has_its_map(draw: Callable[[int], bytes]) -> None:
    text = "Clear <lungs>."
    looked = Looked([(0, 5), (7, 12)], [np.eye(4), 1 - np.eye(4)])
    html, _ = html_cases.section([Case("x", "Clear.", {"a": text}, draw(0), looked)], 1)
    assert html.count('class="map"') == 2
    assert text_of(html).count("Clear &lt;lungs&gt;.") == 1
    without, _ = html_cases.section([Case("x", "Clear.", {"a": text}, None, looked)], 1)
    assert "<img" not in without  # a map over no image says nothing


def test_everything_is_escaped(evaluated: tuple[list[report.Input], Any]) -> None:
    evil = "<script>alert(1)</script> \"pleural effusion' & <img src=x onerror=alert(2)>"
    _, result = evaluated
    result = json.loads(json.dumps(result).replace('"first"', json.dumps(evil)))
    html = html_report.render(result, [Case(evil, evil, {evil: evil, "b": "b " + evil})])
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;" in html


def test_redacted_holds_no_text_and_no_id(evaluated: tuple[list[report.Input], Any]) -> None:
    inputs, result = evaluated
    whole = html_report.render(result, html_cases.worst(cases(inputs), 40), access="private")
    redacted = html_report.render(result, html_cases.worst(cases(inputs), 40), redacted=True, access="private")
    assert "Restricted data" in whole and "patient7/study" in whole
    assert "Redacted" in redacted and "patient" not in text_of(redacted).replace("unit:report", "")
    for sentence in SENTENCES:
        assert sentence in whole and sentence not in redacted
    assert "Restricted" not in html_report.render(result, access="public")
    for value in ("rules micro 14", "Cardiomegaly", "view: AP", "omission rate", "second - first"):
        assert value in redacted and value in whole


def test_written_for_its_owner_alone(evaluated: tuple[list[report.Input], Any], tmp_path: Path) -> None:
    inputs, result = evaluated
    html_sources.write_page(result, inputs, tmp_path / "report.html", 3, None, None)
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o600
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<article") == 3
    html_sources.write_page(result, inputs, tmp_path / "redacted.html", 0, None, None)
    assert "<article" not in (tmp_path / "redacted.html").read_text(encoding="utf-8")


def test_maps_of_other_texts_are_refused(evaluated: tuple[list[report.Input], Any], tmp_path: Path) -> None:
    inputs, _ = evaluated
    case = cases(inputs)[0]
    with pytest.raises(UserError, match=r"no words\.npz"):
        html_sources.with_attention([case], tmp_path)
    maps: dict[str, Any] = {case.id: np.zeros((1, 2, 2), np.float16)}
    np.savez(tmp_path / "words.npz", **maps)
    known = {case.id: {"text": case.texts["first"], "spans": [[0, 3]]}}
    (tmp_path / "words.json").write_text(json.dumps(known))
    (shown,) = html_sources.with_attention([case], tmp_path)
    assert shown.looked is not None and shown.looked.spans == [(0, 3)]
    (tmp_path / "words.json").write_text(json.dumps({case.id: {"text": "other", "spans": []}}))
    with pytest.raises(UserError, match="of other texts"):
        html_sources.with_attention([case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_200_reports_in_a_browser(
    evaluated: tuple[list[report.Input], Any], draw: Callable[[int], bytes], browser: Any, tmp_path: Path, width: int
) -> None:
    inputs, references = systems(200)
    result, _ = report.evaluate(inputs, report.Options(draws=100, trials=100))
    shown = []
    for i, case in enumerate(cases(inputs)):
        spans = [found.span() for found in re.finditer(r"\w+", case.texts["first"])]
        maps = np.random.default_rng(i).random((len(spans), 14, 14))
        shown.append(Case(case.id, case.reference, case.texts, draw(i % 20), Looked(spans, list(maps))))
    assert len(references) == len(shown) == 200
    html = html_report.render(result, html_cases.worst(shown, 200))
    path = tmp_path / "report.html"
    html_report.write(path, html, "private")
    shot = tmp_path / "page.png"
    done = browser.run(f"--window-size={width},2000", f"--screenshot={shot}", path.as_uri())
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert browser.requests() == []
    with Image.open(shot) as image:
        assert image.size == (width, 2000)
    inner, scroll, broken, wide = browser.measure(html, width)
    assert (inner, broken, wide) == (width, 0, 0)
    assert scroll <= width  # the bar beside a long page takes some of it


@pytest.mark.slow
def test_a_request_and_a_console_error_are_noticed(browser: Any, tmp_path: Path) -> None:
    """So that the test above means something."""
    page = tmp_path / "asks.html"
    page.write_text('<img src="http://example.invalid/x.png"><script>nothing()</script>')
    done = browser.run("--dump-dom", page.as_uri())
    assert "CONSOLE" in done.stderr
    assert browser.requests() and set(browser.requests()) == {"http://example.invalid/x.png"}
