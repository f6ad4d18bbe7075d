"""RadCliQ (Yu et al., Evaluating progress in automatic chest X-ray radiology report generation, 2023): how many errors a radiologist would count,
predicted from four scores of a report by a linear model. Lower is better.

The inputs, in this order, are F1-RadGraph as the mean of entities and relations, BERTScore (distilroberta-base, layer 5, rescaled), the cosine of
CheXbert's class tokens, and BLEU-2 of the single report. The two published versions have scalers and weights of their own; the numbers
are those of the published models. A perfect report scores -0.242 in v0 and -1.441 in v1, a report with all inputs 0 scores 5.516 and 2.450.
The score of a system is the mean over reports; its reciprocal, which a leaderboard prints, is not the mean of reciprocals and has a pole.
"""

from dataclasses import dataclass

import numpy as np

from evaluation.metric import Metric, mean, mean_rows

INPUTS = ("radgraph_entity_relation", "bertscore", "semb_score", "bleu_2")


@dataclass(frozen=True)
class Model:
    """score = sum of coefficient * (input - mean) / scale over the four `INPUTS`, plus bias."""

    mean: tuple[float, float, float, float]
    scale: tuple[float, float, float, float]
    coefficient: tuple[float, float, float, float]
    bias: float


MODELS = {
    "v0": Model(
        mean=(0.5398376019, 0.6312549595, 0.7716797867, 0.4607372065),
        scale=(0.3018344441, 0.2246695075, 0.2475033381, 0.3033667094),
        coefficient=(-0.4796252645, -0.6762170542, -0.4636657516, 0.2165861905),
        bias=1.6416666667,
    ),
    "v1": Model(
        mean=(0.5379231241, 0.6175725628, 0.7647942121, 0.4473833540),
        scale=(0.3028258411, 0.2243093846, 0.2539439110, 0.2989271671),
        coefficient=(-0.3770836826, -0.3703000997, -0.2526162179, 4.3150e-12),
        bias=2.4666e-10,
    ),
}


def scores(inputs: np.ndarray, version: str) -> np.ndarray:
    """RadCliQ float64 [n] from the four scores [n, 4] in the order of `INPUTS`; version is "v0" or "v1"."""
    model = MODELS[version]
    return (np.asarray(inputs, float) - model.mean) / model.scale @ np.array(model.coefficient) + model.bias


def metrics(inputs: np.ndarray, how: str) -> list[Metric]:
    """radcliq_v0 and radcliq_v1 as means over n reports, from their inputs [n, 4]; `how` says how these were made, for the signature."""
    return [
        Metric(f"radcliq_{v}", f"radcliq|version:{v}|agg:mean|lower-is-better|{how}", mean_rows(scores(inputs, v)), mean, len(inputs))
        for v in MODELS
    ]  # fmt: skip
