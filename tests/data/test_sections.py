"""The section parser: equal to the official one on its own outputs, and each defect mended by the fix that names it."""

import json
import tarfile
import textwrap
from collections import Counter
from xml.etree import ElementTree

import pytest

from data.reports.sections import ALL_FIXES, FIXES, Section, differences, extract, normalise, split_sections

REPORT = """\
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  Cough.

 FINDINGS:  The lungs are clear.

 IMPRESSION:  Normal.
"""


def test_the_official_outputs(real):
    cases = json.loads((real / "openi/golden_mimic_section_parser.json").read_text())["cases"]
    assert len(cases) == 40
    for case in cases:
        wanted = zip(case["section_names"], case["sections"], case["section_idx"], strict=True)
        assert split_sections(case["text"]) == [Section(*section) for section in wanted], case["uid"]


def test_sections_cover_the_report_in_order():
    for fixes in ((), ALL_FIXES):
        sections = split_sections(REPORT, fixes)
        assert [s.name for s in sections] == ["preamble", "examination", "indication", "findings", "impression"]
        assert all(REPORT[s.start :].startswith(s.text) for s in sections)
        assert extract(REPORT, fixes)["findings"] == "The lungs are clear."
    assert differences(REPORT) == {}
    assert split_sections("No header at all.") == [Section("full report", "No header at all.", 0)]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("FINDINGS AND IMPRESSION", "impression"),
        ("CLINICAL HISTORY", "history"),
        ("AP VIEW OF THE ABDOMEN", "findings"),
        ("PORTABLE SUPINE", "findings"),
        ("INTERVAL HISTORY", "history"),
        ("IMPRESSON", "impression"),
        ("REFERENCE FINDINGS", "findings"),
        ("RECOMMENDATION(S)", "recommendations"),
        ("WETREAD", "wet read"),
        ("LUNGS", "lungs"),
        (" NDICATION ", "impression"),
    ],
)
def test_names_of_headers(header, name):
    assert normalise(header) == name


# fix -> text, then section -> (official, corrected)
DEFECTS: dict[str, tuple[str, dict[str, tuple[str | None, str | None]]]] = {
    "typo": (
        "\n NDICATION:  Cough.\n FINDINGS:  Clear.\n",
        {"impression": ("Cough.", None), "indication": (None, "Cough.")},
    ),
    "first_line": (
        "INDICATION:  Cough.\n FINDINGS:  Clear.\n",
        {"preamble": ("INDICATION:  Cough.", ""), "indication": (None, "Cough.")},
    ),
    "adjacent": (
        "\n FINDINGS:\n IMPRESSION:  Normal.\n",
        {"findings": ("IMPRESSION:  Normal.", None), "impression": (None, "Normal.")},
    ),
    "digits": (
        "\n INDICATION:  Cough.\n CHEST, 2 VIEWS:  Clear.\n",
        {"indication": ("Cough.\n CHEST, 2 VIEWS:  Clear.", "Cough."), "findings": (None, "Clear.")},
    ),
    "purpose": (
        "\n REASON FOR PORTABLE CHEST:  Line placed.\n IMPRESSION:  Normal.\n",
        {"findings": ("Line placed.", None), "indication": (None, "Line placed.")},
    ),
    "unknown": (
        "\n FINDINGS:  As follows.\n LUNGS:  Clear.\n HEART:  Normal.\n",
        {
            "findings": ("As follows.", "As follows.\n LUNGS:  Clear.\n HEART:  Normal."),
            "lungs": ("Clear.", None),
            "heart": ("Normal.", None),
        },
    ),
    "blank_line": (
        "\n INDICATION:  Cough.\n\n The lungs are clear.\n",
        {"indication": ("Cough.\n\n The lungs are clear.", "Cough."), "last_paragraph": (None, "The lungs are clear.")},
    ),
}


@pytest.mark.parametrize("fix", FIXES)
def test_each_fix_mends_its_defect_and_says_so(fix):
    text, wanted = DEFECTS[fix]
    official, mended = extract(text), extract(text, (fix,))
    assert {name: (official.get(name), mended.get(name)) for name in wanted} == wanted
    assert differences(text) == {fix: sorted(wanted)}
    corrected = extract(text, ALL_FIXES)
    assert {name: corrected.get(name) for name in wanted} == {name: new for name, (_, new) in wanted.items()}


def test_the_last_of_a_name_counts_and_an_empty_one_does_not():
    text = "\n FINDINGS:  Old.\n IMPRESSION:  Old.\n FINDINGS:  New.\n IMPRESSION: \n \n \n"
    assert extract(text) == {"preamble": "", "findings": "New.", "impression": "Old."}


def test_the_last_paragraph_stands_where_it_says():
    text = "\n INDICATION:  Cough.\n \n Clear.\n \n Normal heart.\n"
    official, corrected = split_sections(text)[-1], split_sections(text, ("blank_line",))[-1]
    assert official.name == corrected.name == "last_paragraph"
    assert official.text == corrected.text == " Clear.\n \n Normal heart.\n"
    assert text[corrected.start :] == corrected.text
    assert official.start == corrected.start - len("\n \n")  # as the official parser counts


NAMES = ("INDICATION", "COMPARISON", "FINDINGS", "IMPRESSION")


def layout(sections: dict[str, str]) -> str:
    """A report of these sections in MIMIC's way: a blank before each line, a blank line between sections."""
    body = [" FINAL REPORT"]
    for name, text in sections.items():
        if text:
            body += [textwrap.fill(f" {name}:  {text}", 79, subsequent_indent=" ", break_on_hyphens=False), " "]
    return "\n".join(body)


def test_both_modes_on_the_whole_open_i_collection(real):
    """Laid out as in MIMIC, every findings section comes back, and the corrected mode differs where it says."""
    counts: Counter[str] = Counter()
    differ = []
    with tarfile.open(real / "openi/NLMCXR_reports.tgz") as archive:
        for member in archive:
            if not member.name.endswith(".xml"):
                continue
            file = archive.extractfile(member)
            assert file is not None
            found = {e.get("Label"): e.text or "" for e in ElementTree.parse(file).iter("AbstractText")}
            sections = {name: " ".join(found.get(name, "").split()) for name in NAMES}
            text = layout(sections)
            official, corrected = extract(text), extract(text, ALL_FIXES)
            counts["reports"] += 1
            for name in ("FINDINGS", "IMPRESSION"):
                if sections[name]:
                    counts[name] += 1
                    counts[f"official {name}"] += " ".join(official.get(name.lower(), "").split()) == sections[name]
                    counts[f"corrected {name}"] += " ".join(corrected.get(name.lower(), "").split()) == sections[name]
            if official != corrected:
                differ.append(differences(text))
    assert counts == {
        "reports": 3955,
        "FINDINGS": 3425,
        "official FINDINGS": 3425,
        "corrected FINDINGS": 3425,
        "IMPRESSION": 3921,
        # One impression holds the whole report again, and its last line of headers wins.
        "official IMPRESSION": 3920,
        "corrected IMPRESSION": 3920,
    }
    # One indication runs on into a comparison after a full stop.
    assert differ == [{"digits": ["comparison", "indication"]}]
