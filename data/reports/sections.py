"""Sections of a radiology report by rules: what MIMIC-CXR's own section parser finds, and the same with its defects mended.

The official parser (MIT-LCP/mimic-cxr, txt/section_parser.py, MIT licence) made the findings of LLaVA-Rad's rule-based pairs, so that its
behaviour is part of the published numbers, defects too. It is written anew here from what it does: `split_sections(text)` gives its sections,
names and positions, and `fixes` mends it one defect at a time. Its list of single studies with hand-made boundaries is not here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

# Defects of the official parser, by the name of what mends them.
FIXES = {
    "typo": "the header NDICATION is an indication, not an impression",
    "first_line": "a header counts on the first line of the text too, and at any indentation",
    "adjacent": "a header counts straight after a header that has a line to itself",
    "digits": "a header may hold digits, dots and ampersands, as CHEST, 2 VIEWS does",
    "purpose": "a header that names reason, technique or examination is that, even when it names a view or the chest too",
    "unknown": "a header of no known kind, as LUNGS, stays in its section instead of ending it",
    "blank_line": "any blank line ends a paragraph, not only one of a single blank, and the last paragraph's position is exact",
}
ALL_FIXES = frozenset(FIXES)

# Canonical name -> the headers that the official parser knows by heart.
_HEADERS = {
    "preamble": "preamble",
    "impression": (
        "impression|conclusion|findings and impression|findings/impression|findings/ impression|ndication|impresson|imprression|imoression|"
        "impressoin|imprssion|impresion|imperssion|mpression|impession"
    ),
    "findings": "findings|chest, two views|finding|findins|findindgs|findgings|findngs|findnings|finidngs|reference findings",
    "comparison": (
        "comparison|comparisons|reference exam|comparison exam|comparison film|comparision|comparsion|comparrison|comparisions"
    ),
    "indication": "indication|reason for examination|reason for exam|clinical indication|idication",
    "examination": "examination|exam|type of examination",
    "history": "history|clinical history|clinical information|patient history|pfi",
    "technique": "technique",
    "notification": "notification",
    "recommendations": "recommendations|recommendation(s)|recommendation",
    "addendum": "addendum",
    "date": "date",
    "comment": "comment",
    "wet read": "wet read|wetread",
}
_KNOWN = {header: name for name, headers in _HEADERS.items() for header in headers.split("|")}
_CONTAINED = ("impression", "findings", "history", "comparison", "addendum")  # in this order
# A header that holds one of these describes what is seen.
_VIEWS = re.compile(
    "chest|portable|(?:pa|ap) and lateral|lateral and (?:pa|ap)|frontal and|two views|frontal view|pa view|ap view|one view|lateral view|"
    "bone window|frontal upright|frontal semi-upright|ribs|pa and lat"
)
_PURPOSES = {"indication": "indication|reason for|reason:", "technique": "technique", "examination": "exam|procedure"}


class Section(NamedTuple):
    """A part of a report: canonical name, text as it stands there, and where the text starts."""

    name: str
    text: str
    start: int


def split_sections(text: str, fixes: Collection[str] = ()) -> list[Section]:
    """Splits a report at its upper-case headers.

    Args:
        text: the report.
        fixes: of `FIXES`; none gives the official behaviour.

    Returns:
        In order; the first is "preamble", or "full report" where there is no header. Empty findings and impressions are left out. Without
        findings and impression the last section is cut after its first paragraph, and the rest follows as "last_paragraph".
    """
    heads = list(_heads(text, fixes))
    sections = [Section("preamble", text[: heads[0].start(1)], 0)] if heads else [Section("full report", text, 0)]
    ends = [head.start() for head in heads[1:]] + [len(text)]
    for head, end in zip(heads, ends, strict=False):
        # Two headers in a row share the line break between them.
        sections.append(Section(normalise(head[1], fixes), text[head.end() : max(head.end(), end)], head.end()))
    sections = [s for s in sections if s.text.strip() or s.name not in ("impression", "findings")]
    if not {"impression", "findings"} & {s.name for s in sections}:
        sections += _last_paragraph(sections.pop(), fixes)
    return sections


def extract(text: str, fixes: Collection[str] = ()) -> dict[str, str]:
    """Canonical name -> the text of the last section of that name, stripped, as the official section files have it."""
    return {section.name: section.text.strip() for section in split_sections(text, fixes)}


def differences(text: str) -> dict[str, list[str]]:
    """Where the corrected reading of a report differs from the official one.

    Returns:
        Fix -> names of the sections that this fix alone changes, adds or removes; fixes that change nothing are left out.
    """
    official, found = extract(text), {}
    for fix in FIXES:
        mended = extract(text, (fix,))
        changed = sorted(name for name in official.keys() | mended.keys() if official.get(name) != mended.get(name))
        if changed:
            found[fix] = changed
    return found


def normalise(header: str, fixes: Collection[str] = ()) -> str:
    """The canonical name of a header; one of no known kind keeps its own in lower case."""
    name = header.strip().lower()
    if name == "ndication" and "typo" in fixes:
        return "indication"
    if name in _KNOWN:
        return _KNOWN[name]
    if "purpose" in fixes:
        for purpose, words in _PURPOSES.items():
            if re.search(words, name):
                return purpose
    for contained in _CONTAINED:
        if contained in name:
            return contained
    return "findings" if _VIEWS.search(name) else name


def _heads(text: str, fixes: Collection[str]) -> Iterator[re.Match[str]]:
    """Matches of the headers that split the report; group 1 is the header."""
    before = r"(?:^|\n)[ \t]*" if "first_line" in fixes else r"\n "
    letters = r"A-Z0-9.& ()/,-" if "digits" in fixes else r"A-Z ()/,-"
    pattern = re.compile(rf"{before}([{letters}]+):\s")
    place = 0
    while head := pattern.search(text, place):
        place = head.end()
        if "adjacent" not in fixes:
            # To the next line break: where the header's own was taken already, that passes over a line.
            place += max(text[place:].find("\n"), 0)
        elif text[place - 1] == "\n":
            place -= 1
        if "unknown" not in fixes or normalise(head[1], fixes) in _HEADERS:
            yield head


def _last_paragraph(section: Section, fixes: Collection[str]) -> list[Section]:
    """The section cut after its first paragraph, and the rest, if there is any."""
    gap = re.search(r"\n[ \t]*\n" if "blank_line" in fixes else r"\n \n", section.text)
    if gap is None:
        return [section]
    first = section.text[: gap.start()]
    # The official position leaves out the blank line between the two.
    start = section.start + (gap.end() if "blank_line" in fixes else len(first))
    return [section._replace(text=first), Section("last_paragraph", section.text[gap.end() :], start)]
