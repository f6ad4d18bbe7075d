"""The page asks for nothing, escapes everything, and fits a desk and a phone."""

import html.parser
import os
import re
from pathlib import Path
from typing import Any

import pytest

from evaluation.page import Context, render, write_page

VOID = {"meta", "link", "img", "input", "br"}
DRAWN_VOID = {"rect", "line", "path"}  # closed in place
EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">&"\'$title'


class Reader(html.parser.HTMLParser):
    """Collects what a browser would fetch, and checks that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"event handler {name} on <{tag}>"
            if name == "id":
                self.ids.append(value or "")
            if name == "href" and tag == "a":
                self.targets.append(value or "")
            elif name in ("src", "href", "srcset", "poster", "action", "data"):
                self.fetched.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN_VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_fetches_nothing_and_runs_nothing(sample: Context) -> None:
    page = render(sample)
    reader = read(page)
    assert reader.fetched and all(value.startswith("data:") for value in reader.fetched)
    assert all(target.startswith("#") and target[1:] in reader.ids for target in reader.targets)
    assert "script" not in reader.tags and "iframe" not in reader.tags
    without_data = re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)
    assert "http:" not in without_data and "https:" not in without_data
    assert "@import" not in page and "url(" not in page
    assert "default-src 'none'" in page


def test_everything_is_escaped(sample: Context) -> None:
    clean = read(render(sample))
    sample["title"] = sample["subtitle"] = sample["config_text"] = sample["footer"] = EVIL
    sample["corpus"] = {"name": EVIL, "synthetic": True, "description": EVIL, "facts": [(EVIL, EVIL)]}
    sample["notes"], sample["machine"], sample["timings"] = [EVIL], [(EVIL, EVIL)], [(EVIL, 3.0)]
    sample["tiles"] = [{"label": EVIL, "value": EVIL, "note": EVIL, "fraction": 0.5, "marks": [(0.5, EVIL)]}]
    sample["curves"] = [{"name": EVIL, "points": [(0, 2.0), (1, 1.0)]}]
    sample["tables"] = [{"title": EVIL, "columns": [EVIL], "rows": [[EVIL]], "note": EVIL}]
    study = sample["studies"][0]
    texts = ("id", "word", "indication", "reference", "prediction")
    study.update(dict.fromkeys(texts, EVIL))  # type: ignore[typeddict-item]
    study.update({"right": [EVIL], "missed": [EVIL], "invented": [EVIL], "wrong_side": [EVIL]})
    study["prediction_segments"], study["reference_segments"] = [(EVIL, [("right", EVIL)])], None
    sample["studies"] = [study]
    reader = read(render(sample))
    assert set(reader.tags) <= set(clean.tags)
    assert reader.tags.count("img") == 3
    # Title (2), subtitle, notes, corpus (2), tiles (3), curve, table (4), chips (4), study (5), run, footer.
    assert "".join(reader.text).count("<script>alert(1)</script>") >= 25


def test_reports_are_marked_in_words(sample: Context) -> None:
    text = "".join(read(render(sample)).text)
    assert "✓ correct: left pleural effusion" in text
    assert "⇄ wrong side: right pneumothorax, called left" in text
    assert "○ missed: cardiomegaly" in text
    assert "+ invented: left pleural effusion" in text
    assert "no finding, and none named" in text
    assert "no report was generated" in text
    assert "(empty)" in text
    assert "synthetic" in text


def test_without_truth_its_parts_are_left_out(sample: Context) -> None:
    sample["corpus"] = {"name": "folder", "synthetic": False, "description": "64 films."}
    for study in sample["studies"]:
        study.update({"right": None, "missed": None, "invented": None, "wrong_side": None, "boxes": []})
        study["prediction_segments"] = study["reference_segments"] = None
    sample["tables"], sample["curves"] = [], [{"name": "x", "points": [(0, float("nan"))]}]
    reader = read(render(sample))
    text = "".join(reader.text)
    for absent in ("synthetic", "✓", "missed", "invented", "true box", "Learning", "Tables"):
        assert absent not in text
    assert "not known" in text
    assert "Generated" in text and "Attention while writing" in text


def test_an_empty_page_still_renders(sample: Context) -> None:
    for name in ("tiles", "curves", "tables", "studies", "timings"):
        sample[name] = []
    sample["config_text"] = ""
    sample["machine"] = []
    sample["corpus"] = {"name": "x", "synthetic": True, "description": "y"}
    reader = read(render(sample))
    assert reader.targets == []


def test_written_whole_or_not_at_all(sample: Context, tmp_path: Path) -> None:
    path = write_page(tmp_path / "new" / "page.html", sample)
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert os.listdir(path.parent) == ["page.html"]
    sample["subtitle"] = "half a pair: \ud800"
    write_page(path, sample)
    assert "half a pair: ?" in path.read_text(encoding="utf-8")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        write_page(tmp_path / "file" / "page.html", sample)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_in_a_browser(sample: Context, tmp_path: Path, browser: Any, width: int, scheme: str) -> None:
    page = write_page(tmp_path / "page.html", sample)
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    shot = tmp_path / "page.png"
    done = browser.run(*dark, f"--window-size={width},3000", f"--screenshot={shot}", page.as_uri())
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (width, 3000)
        ground = image.convert("RGB").getpixel((3, 3))
    assert ground == ((246, 247, 249) if scheme == "light" else (15, 21, 27))

    inner, scroll, broken, wide = browser.measure(page.read_text(encoding="utf-8"), width)
    assert inner == width
    assert scroll <= inner, f"scrolls sideways: {scroll} > {inner}"
    assert (broken, wide) == (0, 0)


@pytest.mark.slow
def test_the_measure_can_fail(sample: Context, browser: Any) -> None:
    """A page wider than the window is noticed, so that the test above means something."""
    text = render(sample).replace("</main>", '<div style="width:500px"><img src="data:,"></div></main>')
    inner, scroll, broken, wide = browser.measure(text, 390)
    assert (inner, broken) == (390, 1)
    assert scroll > 390 and wide >= 1
