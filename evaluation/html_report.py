"""The evaluation as one HTML file that asks the network for nothing and runs no script: scores with intervals, bars per finding, cases.

The frame, its style and its content security policy are those of `evaluation.page`. A page of restricted data says so at its top; the redacted
form holds scores alone: no text, no image, no id of a report.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from evaluation import html_cases, page, tables
from evaluation.html_cases import Case

Json = dict[str, Any]
_SECTIONS = {
    "scores": "Scores",
    "findings": "Findings",
    "comparisons": "Comparisons",
    "panel": "Behind the averages",
    "subgroups": "Subgroups",
    "cases": "Cases",
    "signatures": "Signatures",
}
_BANNER = (
    "Restricted data. This page holds report text, images or identifiers of data that is not public. Keep it where the data itself may be "
    "kept, and pass on the redacted form instead."
)
_REDACTED = "Redacted: scores only. No text, image or identifier of a report is on this page."
_PLOTTED = 3  # systems with bars of their own colour


def render(result: Json, cases: Sequence[Case] = (), redacted: bool = False, access: str = "unstated") -> str:
    """The page as HTML text.

    Args:
        result: of `evaluation.report.evaluate`.
        cases: the reports to show, the worst first; left out when redacted.
        redacted: scores alone.
        access: of the data; anything but "public" gets the banner.
    """
    shown = () if redacted else cases
    of_cases, filters = html_cases.section(shown, result["inputs"][0]["n"])
    sections = {
        "scores": _scores(result),
        "findings": _bars(result),
        "comparisons": _from_rows("Comparisons", tables.comparisons(result), "Second system minus first, paired."),
        "panel": _from_rows("Behind the averages", tables.panel(result), "Rates; lower is better but for the length ratio."),
        "subgroups": _from_rows("Subgroups", tables.subgroups(result), ""),
        "cases": of_cases,
        "signatures": _signatures(result),
    }  # fmt: skip
    style = "\n" + (Path(__file__).parent / "report.css").read_text(encoding="utf-8").strip() + filters
    names = ", ".join(system["name"] for system in result["systems"] if system["kind"] == "predictions")
    return page.document(
        "Evaluation of generated findings",
        f"{names}: {result['inputs'][0]['n']} reports, {result['tool']}, {result['created'][:10]}. Brackets: 95% interval.",
        _notice(result, redacted, access),
        _SECTIONS,
        sections,
        style=style,
    )


def write(path: Path, html: str, access: str) -> None:
    """Writes the page; one of restricted data is for its owner's eyes only (mode 0600)."""
    page.write(path, html, access)


def _notice(result: Json, redacted: bool, access: str) -> str:
    out = ""
    if redacted:
        out += f'<div class="card notice"><p>{_REDACTED}</p></div>'
    elif access != "public":
        out += f'<div class="card banner" role="note"><p>{_BANNER}</p></div>'
    if result["warnings"] and not redacted:
        lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in result["warnings"])
        out += f'<div class="card notice"><p>Read first:</p><ul class="warnings">{lines}</ul></div>'
    return out


def _scores(result: Json) -> str:
    cards = []
    for profile in tables.profiles_of(result):
        head, *rows = tables.summary(result, profile)
        cards.append(page.table_card(page.Table(title=f"Profile {profile}", columns=head, rows=rows)))
        if others := tables.rest(result, profile):
            head, *rows = others
            cards.append(page.table_card(page.Table(title=f"Profile {profile}, the rest", columns=head, rows=rows)))
    if result["published"]:
        columns = ["system", "metric", "profile", "value", "source"]
        rows = [[str(row[key]) for key in columns] for row in result["published"]]
        cards.append(page.table_card(page.Table(title="Published in the same convention", columns=columns, rows=rows)))
    return f'<h2>Scores</h2><div class="tables">{"".join(cards)}</div>' if cards else ""


def _bars(result: Json) -> str:
    """F1 of every finding with its interval, one bar per system, from each system's first metric that has them."""
    found: dict[str, Json] = {}
    for row in result["metrics"]:
        if row.get("per_finding") and len(found) < _PLOTTED:
            found.setdefault(row["system"], row)
    if not found:
        return ""
    first = next(iter(found.values()))
    same = {name: row for name, row in found.items() if row["name"] == first["name"]}
    named = [
        finding
        for finding in first["per_finding"]
        if any(row["per_finding"][finding]["f1"] is not None for row in same.values() if finding in row["per_finding"])
    ]
    absent = [finding.replace("_", " ") for finding in first["per_finding"] if finding not in named]
    rows = "".join(
        f'<div class="plot-row" style="--systems:{len(same)}"><span class="name">{escape(finding.replace("_", " "))}</span>'
        + "".join(_bar(row["per_finding"].get(finding), i) for i, row in enumerate(same.values()))
        + "</div>"
        for finding in named
    )
    if absent:
        rows += f'<p class="hint">In no text: {escape(", ".join(absent))}.</p>'
    key = "".join(f'<span class="s{i}">{escape(name)}</span>' for i, name in enumerate(same))
    hint = f"F1 and its 95% interval (line); {escape(first['name'])}. In brackets: how many references have it."
    return (
        f'<h2>Findings</h2><p class="hint">{hint}</p><div class="card"><div class="key">{key}</div>'
        f"{rows}</div>{_finding_tables(result, list(same))}"
    )


def _bar(scores: Json | None, number: int) -> str:
    if scores is None or scores["f1"] is None:
        return '<span class="plot"></span><span class="number">n/a</span>'
    interval = ""
    if scores.get("f1_ci"):
        low, high = (100 * min(max(end, 0.0), 1.0) for end in scores["f1_ci"])
        interval = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
    fill = f'<span class="s{number}" style="width:{100 * scores["f1"]:.1f}%"></span>'
    text = f"{scores['f1']:.3f} ({scores['support']})"
    return f'<span class="plot" aria-hidden="true">{fill}{interval}</span><span class="number">{text}</span>'


def _finding_tables(result: Json, systems: Sequence[str]) -> str:
    parts = []
    for name in systems:
        head, *rows = tables.per_finding(result, name)
        parts.append(page.table_card(page.Table(title=name, columns=head, rows=rows)))
    return f'<details><summary>Precision and recall</summary><div class="tables">{"".join(parts)}</div></details>'


def _from_rows(title: str, rows: Sequence[Sequence[str]], note: str) -> str:
    if not rows:
        return ""
    card = page.table_card(page.Table(title=title, columns=rows[0], rows=rows[1:], note=note))
    return f'<h2>{title}</h2><div class="tables">{card}</div>'


def _signatures(result: Json) -> str:
    """Every number with how it was made."""
    rows = "".join(
        f'<tr><th scope="row">{escape(row["system"])}</th><td>{escape(row["profile"])}</td><td>{escape(row["name"])}</td>'
        f"<td>{escape(tables.with_interval(row))}</td><td>{row['n']}</td><td>{escape(row['signature'])}</td></tr>"
        for row in result["metrics"]
    )
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{n}</th>' for n in ("system", "profile", "metric", "value", "n", "signature"))
    table = f'<div class="scroll"><table class="signatures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f'<h2>Signatures</h2><details><summary>All {len(result["metrics"])} numbers, and how each was made</summary><div class="card">{table}</div></details>'
