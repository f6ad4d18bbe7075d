"""Rates worked out by hand on pairs that each go wrong in one way."""

import numpy as np
import pytest

from evaluation import panels
from evaluation.rule_labeler import label_all

PAIRS = [  # prediction, reference
    ("Small left pleural effusion.", "Small right pleural effusion."),  # the other side
    ("No pleural effusion.", "Bilateral pleural effusions."),  # denied
    ("Left pneumothorax. Left pneumothorax.", "The lungs are clear."),  # made up, and said twice
    ("The lungs are clear.", "Mild pulmonary edema. Cardiomegaly."),  # two left out
    ("Unchanged left effusion.", "Left effusion."),  # an earlier image
    ("", "No pneumothorax."),
]


def rates() -> dict[str, list[float]]:
    predictions, references = zip(*PAIRS, strict=True)
    metrics = panels.metrics(predictions, references, label_all(predictions), label_all(references))
    assert tuple(metric.name for metric in metrics) == panels.NAMES
    return {metric.name: metric.rows.sum(axis=0).tolist() for metric in metrics}


def test_each_rate_counts_what_it_says() -> None:
    found = rates()
    assert found["omission_rate"] == [3, 5]  # effusion, edema, cardiomegaly, of those and two effusions said
    assert found["invention_rate"] == [1, 3]
    assert found["negation_flip_rate"] == [1, 3]
    assert found["laterality_swap_rate"] == [1, 2]
    assert found["prior_reference_rate"] == [1, 6]
    assert found["repetition_rate"] == [1, 6]
    assert found["length_ratio"] == [18, 19]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Small left pleural effusion with adjacent right atelectasis.", {"Pleural Effusion": "l", "Atelectasis": "r"}),
        ("Moderate right pneumothorax, left lung is clear.", {"Pneumothorax": "r"}),
        ("Small left and moderate right effusions.", {"Pleural Effusion": "lr"}),
        ("Bilateral effusions.", {"Pleural Effusion": "lr"}),
        (
            "Opacity at the left base and consolidation in the right upper lobe.",
            {"Lung Opacity": "l", "Consolidation": "r"},
        ),
        ("No left effusion. Effusion on the right.", {"Pleural Effusion": "r"}),
        ("Effusion.", {}),
    ],
)
def test_sides(text: str, expected: dict[str, str]) -> None:
    letters = {"l": "left", "r": "right"}
    assert panels.sides(text) == {name: frozenset(letters[c] for c in named) for name, named in expected.items()}


def test_distinctness() -> None:
    found = panels.distinctness(["The lungs are clear.", "the  lungs are clear.", "Effusion. The lungs are clear."])
    assert found["distinct_share"] == found["most_frequent_share"] == pytest.approx(2 / 3)
    assert found["distinct_sentences"] == 2
    assert panels.distinctness([])["distinct_share"] is None


def test_rates_without_a_case_are_not_numbers() -> None:
    metrics = panels.metrics(["Clear."], ["Clear."], label_all(["Clear."]), label_all(["Clear."]))
    assert [m.name for m in metrics if np.isnan(m.total())] == list(panels.NAMES[:4])
