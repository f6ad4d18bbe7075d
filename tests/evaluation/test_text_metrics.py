"""Against numbers that the libraries themselves gave, here and on real reports."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation import text_metrics

GOLDEN = Path(__file__).parents[2].parent / "shared" / "real" / "openi" / "golden_nlg_metrics.json"

# Four made-up pairs; the values beside the tests were printed by sacrebleu 2.6.0 and rouge-score 0.1.2.
REFERENCES = [
    "The heart is mildly enlarged. There is a small right pleural effusion. No pneumothorax.",
    "Lungs are clear. No pleural effusion or pneumothorax. Heart size is normal.",
    "A right-sided PICC terminates in the mid SVC. Bibasilar opacities are consistent with atelectasis.",
    "There is a 3.5 cm mass in the left upper lobe, concerning for malignancy.",
]
PREDICTIONS = [
    "Mild cardiomegaly. Small right pleural effusion. No pneumothorax.",
    "The lungs are clear. No pleural effusion or pneumothorax. Heart size is normal.",
    "Right PICC tip is in the SVC. Left basilar opacity may represent pneumonia.",
    "No focal consolidation. No pleural effusion or pneumothorax.",
]


def test_known_pairs() -> None:
    # Six digits are what was printed.
    assert text_metrics.bleu(PREDICTIONS, REFERENCES, 1).value == pytest.approx(44.276456, abs=1e-6)
    assert text_metrics.bleu(PREDICTIONS, REFERENCES, 4).value == pytest.approx(34.425341, abs=1e-6)
    rows = text_metrics.rouge_l_rows(PREDICTIONS, REFERENCES)
    np.testing.assert_allclose(rows[:, 2], [0.545455, 0.96, 0.357143, 0.0], atol=1e-6)
    assert text_metrics.rouge_l(PREDICTIONS, REFERENCES).value == pytest.approx(0.46564935, abs=1e-8)


def test_an_empty_prediction_scores_zero_and_lowers_the_corpus() -> None:
    with_empty = ["", PREDICTIONS[1]]
    assert text_metrics.bleu(with_empty, REFERENCES[:2], 4).value == pytest.approx(31.680804, abs=1e-6)
    assert text_metrics.rouge_l_rows([""], REFERENCES[:1])[0, 2] == 0.0
    assert text_metrics.bleu(["", ""], REFERENCES[:2], 4).value == 0.0


def test_golden_real_reports() -> None:
    if not GOLDEN.is_file():
        pytest.skip(f"real reports are absent: {GOLDEN}")
    golden = json.loads(GOLDEN.read_text())
    predictions = [pair["hyp"] for pair in golden["pairs"]]
    references = [pair["ref"] for pair in golden["pairs"]]
    totals = text_metrics.bleu_counts(predictions, references).sum(axis=0)
    for order in (1, 4):
        expected = golden["results"][f"sacrebleu_corpus_order{order}_exp"]
        # The same library computed both: only rounding in the last digits may differ.
        assert text_metrics.bleu(predictions, references, order).value == pytest.approx(expected["score"], rel=1e-12)
        assert totals[:order].tolist() == expected["counts"]
        assert totals[4 : 4 + order].tolist() == expected["totals"]
        assert totals[-2:].tolist() == [expected["sys_len"], expected["ref_len"]]
        assert text_metrics.bleu_from_counts(totals[None], order)[0] == pytest.approx(expected["score"], rel=1e-9)
    rouge = golden["results"]["rouge_stemmer_False"]
    expected_rows = [row["rougeL"] for row in rouge["per_pair"]]
    # The file keeps ten digits per pair.
    np.testing.assert_allclose(text_metrics.rouge_l_rows(predictions, references), expected_rows, atol=1e-9)
    mean = text_metrics.rouge_l(predictions, references).value
    assert mean == pytest.approx(rouge["mean_f"]["rougeL"], abs=1e-10)


@pytest.mark.parametrize(
    "prediction",
    ["", "x", "The heart", "The heart is", "zzz zzz zzz zzz zzz", REFERENCES[0], "heart The is no right a"],
)
def test_bleu_from_counts_smooths_as_sacrebleu(prediction: str) -> None:
    from sacrebleu.metrics import BLEU

    counts = text_metrics.bleu_counts([prediction], REFERENCES[:1])
    for order in (1, 2, 3, 4):
        expected = BLEU(max_ngram_order=order).corpus_score([prediction], [REFERENCES[:1]]).score
        assert text_metrics.bleu_from_counts(counts, order)[0] == pytest.approx(expected, abs=1e-9)


def test_signature_says_how_it_was_made() -> None:
    from importlib.metadata import version

    bleu = text_metrics.bleu(PREDICTIONS, REFERENCES, 4, ["a", "a", "b", "b"])
    for part in ("bleu4|", "tok:13a", "case:mixed", "smooth:exp", f"version:{version('sacrebleu')}", "unit:patient"):
        assert part in bleu.signature
    assert bleu.n == 4
    rouge = text_metrics.rouge_l(PREDICTIONS, REFERENCES)
    for part in ("rougeL|", "stem:no", f"rouge-score:{version('rouge-score')}", "unit:report"):
        assert part in rouge.signature
    assert rouge.interval is not None and rouge.interval[0] < rouge.value < rouge.interval[1]


def test_no_reports_is_an_error() -> None:
    with pytest.raises(ValueError, match="no reports"):
        text_metrics.bleu([], [], 4)
    with pytest.raises(ValueError, match="no reports"):
        text_metrics.rouge_l([], [])
