"""Reports and their parser: what is written is read back exactly, and broken text does not break the reader."""

import re

import numpy as np
import pytest

from data.labels import CHEXPERT
from data.phantom.findings import DEVICES, FINDINGS
from data.phantom.parser import chexpert_labels, parse, parse_denied
from data.phantom.report import INDICATIONS, write
from data.phantom.study import content


@pytest.mark.parametrize("seed", [0, 1, 20, 300, 4000])
def test_the_parser_returns_the_exact_labels_of_fresh_reports(seed):
    """5,000 reports over the five seeds."""
    for patient in range(1000):
        findings, report, _ = content(seed, patient, 0)
        assert parse(report.findings) == [f.key for f in findings], report.findings
        assert parse_denied(report.findings) == [name for name in FINDINGS if name in report.denied], report.findings


def test_reports_are_short_and_vary():
    reports = [content(0, patient, 0)[1] for patient in range(1000)]
    words = [len(r.findings.split()) for r in reports]
    assert 20 <= np.median(words) <= 35 and max(words) <= 60
    assert len({r.findings for r in reports}) > 950
    assert not re.search(r"prior|previous|unchanged|interval|compar", " ".join(r.findings for r in reports).lower())


def test_every_present_finding_is_stated_and_no_present_one_denied():
    for patient in range(500):
        findings, report, _ = content(3, patient, 0)
        assert not {f.finding for f in findings} & set(report.denied)
        for found in findings:
            assert all(word in report.findings.lower() for word in (found.side, found.size, found.place) if word)


def test_indications_tell_nothing():
    for indication in INDICATIONS:
        assert parse(indication) == [] and parse_denied(indication) == []
        assert not re.search(r"line|tube|pace|device|heart|lung|pleura|left|right|placement", indication.lower())
    assert "" in INDICATIONS
    # The same random numbers give the same indication whatever is present.
    for k in range(50):
        some = content(0, k, 0)[0]
        assert write(some, np.random.default_rng(k)).indication == write([], np.random.default_rng(k)).indication


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("the of lungs xyz", []),
        ("Small left", []),
        ("There is a large right pleural", []),
        ("pleural effusion", [("pleural_effusion", None, None, None)]),
        ("There is a small left pleural effusion", [("pleural_effusion", "left", "small", None)]),
        ("There is a small pneumothorax.", [("pneumothorax", None, "small", None)]),
        ("Small left pleural effusion. " * 3, [("pleural_effusion", "left", "small", None)]),
        ("No pleural effusion. Small left pleural effusion.", [("pleural_effusion", "left", "small", None)]),
        ("Right pneumothorax. Large right pneumothorax.", [("pneumothorax", "right", "large", None)]),
        ("No pneumothorax or consolidation or nodule.", []),
        ("The lungs are free of consolidation.", []),
        ("Pneumothorax is not seen.", []),
        ("No pneumothorax but a large left effusion.", [("pleural_effusion", "left", "large", None)]),
        (
            "Small left effusion and moderate cardiomegaly with right pacemaker.",
            [
                ("cardiomegaly", None, "moderate", None),
                ("pleural_effusion", "left", "small", None),
                ("pacemaker", "right", None, None),
            ],
        ),
        (
            "Small bilateral pleural effusions.",
            [("pleural_effusion", "right", "small", None), ("pleural_effusion", "left", "small", None)],
        ),
        (
            "Small left effusion. Large right effusion.",
            [("pleural_effusion", "left", "small", None), ("pleural_effusion", "right", "large", None)],
        ),
        ("RIGHT UPPER LOBE CONSOLIDATION", [("consolidation", "right", None, "upper lobe")]),
        ("The heart is normal in size. No lines or tubes.", []),
    ],
)
def test_imperfect_text(text, expected):
    assert parse(text) == expected


def test_denied():
    assert parse_denied("Normal heart size. Clear lungs.") == ["cardiomegaly", "consolidation", "nodule"]
    assert parse_denied("No lines or tubes.") == list(DEVICES)
    assert parse_denied("No pneumothorax. Small left pneumothorax.") == []


def test_chexpert_labels():
    def labels(findings, denied=()):
        return {k: v for k, v in zip(CHEXPERT, chexpert_labels(findings, denied), strict=True) if v != -2}

    assert labels([]) == {"No Finding": 1}
    assert labels(["pacemaker"]) == {"Support Devices": 1, "No Finding": 1}
    assert labels([("nodule", "left", "small", "mid zone")], ["pneumothorax"]) == {"Lung Lesion": 1, "Pneumothorax": 0}
    assert labels(["consolidation"]) == {"Consolidation": 1, "Lung Opacity": 1}
    assert labels([], ["consolidation"]) == {"Consolidation": 0, "Lung Opacity": 0, "No Finding": 1}
    assert labels(["cardiomegaly"], DEVICES) == {"Cardiomegaly": 1, "Support Devices": 0}
    assert labels(["cardiomegaly"], DEVICES[:1]) == {"Cardiomegaly": 1}
