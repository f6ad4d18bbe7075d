"""RadCliQ against what its leaderboard and its constants give."""

import numpy as np
import pytest

from evaluation import radcliq

# Rows of ReXrank's results of 2024-07 (MIT): BLEU, BERTScore, SembScore, RadGraph -> RadCliQ v0, v1, all printed with three digits. The score is
# linear, so that mean inputs give the mean score.
LEADERBOARD = [
    ("MIMIC-CXR, CheXagent", (0.094, 0.304, 0.331, 0.146), 3.816, 1.437),
    ("MIMIC-CXR, MedVersa", (0.193, 0.430, 0.315, 0.273), 3.337, 1.088),
    ("MIMIC-CXR, LLM-CXR", (0.036, 0.158, 0.150, 0.047), 4.712, 1.983),
    ("IU X-ray, MedVersa", (0.195, 0.518, 0.601, 0.244), 2.581, 0.692),
    ("CheXpert Plus, CheXagent", (0.077, -0.056, 0.284, 0.039), 5.147, 2.213),
]


@pytest.mark.parametrize(("name", "printed", "v0", "v1"), LEADERBOARD)
def test_rows_of_the_leaderboard(name: str, printed: tuple[float, ...], v0: float, v1: float) -> None:
    bleu, bert, semb, radgraph = printed
    inputs = np.array([[radgraph, bert, semb, bleu]])
    # Inputs are rounded by up to 0.0005; times the weights of the raw form (7.19 in v0, 3.89 in v1 in all) and the printed digit itself.
    assert radcliq.scores(inputs, "v0")[0] == pytest.approx(v0, abs=0.0005 * 8.2), name
    assert radcliq.scores(inputs, "v1")[0] == pytest.approx(v1, abs=0.0005 * 4.9), name


@pytest.mark.parametrize(
    ("inputs", "v0", "v1"),
    [
        ((1, 1, 1, 1), -0.242133, -1.440690),  # a perfect report
        ((0, 0, 0, 0), 5.516161, 2.450143),
    ],
)
def test_ends_of_the_scale(inputs: tuple[float, ...], v0: float, v1: float) -> None:
    """Arithmetic with the constants of the published models."""
    assert radcliq.scores(np.array([inputs]), "v0")[0] == pytest.approx(v0, abs=1e-6)
    assert radcliq.scores(np.array([inputs]), "v1")[0] == pytest.approx(v1, abs=1e-6)


def test_a_frequency_table_of_one_reference_breaks_the_score() -> None:
    """RadEval's documentation prints 9.372605 for an exact match: BERTScore fell to -5.550157 because every word's weight was 0."""
    assert radcliq.scores(np.array([[1, -5.550157, 1, 1]]), "v1")[0] == pytest.approx(9.3726, abs=5e-5)


def test_a_system_is_the_mean_of_its_reports() -> None:
    inputs = np.random.default_rng(0).uniform(size=(7, 4))
    for metric, version in zip(radcliq.metrics(inputs, "x"), ("v0", "v1"), strict=True):
        assert metric.name == f"radcliq_{version}" and metric.n == 7
        assert metric.total() == pytest.approx(radcliq.scores(inputs.mean(axis=0, keepdims=True), version)[0])
