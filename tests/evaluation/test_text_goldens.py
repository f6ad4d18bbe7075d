"""BLEU and ROUGE against numbers that the named libraries printed, on made-up pairs and on real reports.

Not offered, so not here: the PyPI package `rouge`, rougeLsum, METEOR. RadEval's fixture in sacreBLEU's convention (10.2, BLEU-1 23.3) needs the
texts' punctuation, which the codes below leave out.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import bleu, cider, rouge, scoring, statistics

# Four made-up pairs; beside the tests stands what printed the values, six digits or more of them.
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
OTHERS = [
    "The heart is enlarged. There is a small right pleural effusion. No pneumothorax.",
    "Lungs are clear. No pleural effusion or pneumothorax.",
    "A right-sided PICC terminates in the SVC. Bibasilar atelectasis.",
    "There is a mass in the left upper lobe.",
]


def corpus_bleu(order: int, convention: str, predictions: list[str] = PREDICTIONS) -> float:
    return bleu.metric(predictions, REFERENCES[: len(predictions)], order, convention).total()


@pytest.mark.parametrize(
    ("convention", "order", "expected"),
    [
        ("sacrebleu", 4, 34.425341),  # sacrebleu 2.6.0
        ("sacrebleu", 1, 44.276456),
        ("sacrebleu-lower", 4, 37.989353),
        ("sacrebleu-lower", 1, 47.330005),
        ("sacrebleu-intl", 4, 33.126429),
        ("hf", 1, 0.44276456),  # evaluate 0.4.6
        ("hf", 4, 0.34425341),
        ("coco", 1, 0.35784633),  # pycocoevalcap 1.2
        ("coco", 2, 0.32580673),
        ("coco", 3, 0.30421416),
        ("coco", 4, 0.28978989),
        ("coco-clean", 1, 0.39238619),  # the same on lower-cased text without punctuation
        ("coco-clean", 2, 0.35465583),
        ("coco-clean", 3, 0.33355401),
        ("coco-clean", 4, 0.32114297),
    ],
)
def test_bleu_of_the_pairs(convention: str, order: int, expected: float) -> None:
    assert corpus_bleu(order, convention) == pytest.approx(expected, abs=1e-6 if expected > 1 else 1e-8)


def test_parts_of_bleu() -> None:
    """sacrebleu 2.6.0 prints precisions 55.8/43.8/38.6/37.5, brevity penalty 0.794, lengths 52 and 64."""
    totals = bleu.count_rows(PREDICTIONS, REFERENCES, bleu.CONVENTIONS["sacrebleu"]).sum(axis=0)
    np.testing.assert_array_equal((100 * totals[:4] / totals[4:8]).round(1), [55.8, 43.8, 38.6, 37.5])
    assert totals[8:].tolist() == [52, 64]
    assert np.exp(1 - 64 / 52) == pytest.approx(0.794, abs=5e-4)


def test_sentence_bleu_of_radcliq() -> None:
    """fast-bleu 0.0.90, weights (1/2, 1/2), texts prepared as RadCliQ does."""
    metric = bleu.metric(PREDICTIONS, REFERENCES, 2, "radcliq")
    expected = [0.43861758, 0.93541435, 0.22362894, 0.01829372]
    np.testing.assert_allclose(metric.each(), expected, atol=1e-8)
    assert metric.total() == pytest.approx(np.mean(expected), abs=1e-8)


def test_bleu_of_one_empty_prediction() -> None:
    """sacrebleu 2.6.0."""
    assert corpus_bleu(4, "sacrebleu", ["", PREDICTIONS[1]]) == pytest.approx(31.680804, abs=1e-6)
    assert corpus_bleu(4, "sacrebleu", ["", ""]) == 0.0
    assert corpus_bleu(1, "coco", ["", ""]) == pytest.approx(0.0, abs=1e-12)


# sacrebleu's own tests, test/test_bleu.py (Apache-2.0).
DOG = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
DOG_REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


NONE = bleu.Convention(str.split, "tok:none|case:mixed|smooth:exp")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (bleu.CONVENTIONS["sacrebleu"], 48.530827),
        (bleu.CONVENTIONS["sacrebleu-intl"], 43.91623493),
        (NONE, 49.1919566),  # tokenize="none"
    ],
)
def test_bleu_of_several_references(how: bleu.Convention, expected: float) -> None:
    rows = [bleu.counts(how.tokens(p), [how.tokens(r) for r in rs]) for p, rs in zip(DOG, DOG_REFERENCES, strict=True)]
    assert bleu.from_counts(np.sum(rows, axis=0)[None], 4, how)[0] == pytest.approx(expected, abs=1e-6)
    nothing = [bleu.counts([], [how.tokens(r) for r in rs]) for rs in DOG_REFERENCES]
    assert bleu.from_counts(np.sum(nothing, axis=0)[None], 4, how)[0] == 0.0


def test_bleu_without_a_tokenizer() -> None:
    """sacrebleu 2.6.0, tokenize="none", on the four pairs."""
    rows = bleu.count_rows(PREDICTIONS, REFERENCES, NONE)
    assert bleu.from_counts(rows.sum(axis=0)[None], 4, NONE)[0] == pytest.approx(28.978989, abs=1e-6)


def test_bleu_from_counts_and_floor_smoothing() -> None:
    counts = np.array([[9, 7, 5, 3, 10, 8, 6, 4, 11, 11]])
    assert bleu.from_counts(counts, 4, bleu.CONVENTIONS["sacrebleu"])[0] == pytest.approx(83.75922397, abs=1e-8)
    floor = bleu.Convention(str.split, "floor", "floor", 0.01)
    row = np.array([bleu.counts(["this", "is", "a", "fest"], [["this", "is", "a", "test"]])])
    assert bleu.from_counts(row, 4, floor)[0] == pytest.approx(22.3606797749979, abs=1e-9)


def test_deidentification_marks_are_tokens_of_their_own() -> None:
    assert bleu.tokens_13a("Seen on ___.") == ["Seen", "on", "_", "_", "_", "."]
    assert bleu.tokens_13a("A 3.5-cm, T12-L1 &lt;b&gt; left-sided line") == [
        *("A", "3.5", "-", "cm", ",", "T12", "-", "L1", "<", "b", ">", "left-sided", "line")
    ]


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_of_the_pairs(stemmer: bool) -> None:
    """rouge-score 0.1.2."""
    found = {metric.name: metric for metric in rouge.metrics(PREDICTIONS, REFERENCES, stemmer)}
    third = 0.428571 if stemmer else 0.357143
    np.testing.assert_allclose(found["rouge_l"].each(), [0.545455, 0.96, third, 0.0], atol=1e-6)
    assert found["rouge_l"].total() == pytest.approx(0.48350649 if stemmer else 0.46564935, abs=1e-8)
    assert found["rouge_2"].total() == pytest.approx(0.38336120, abs=1e-8)
    assert f"stem:{'porter' if stemmer else 'no'}" in found["rouge_l"].signature


def test_bootstrap_aggregator() -> None:
    """rouge-score 0.1.2, BootstrapAggregator(0.95, 500) after numpy.random.seed."""
    f1 = rouge.scores(PREDICTIONS, REFERENCES, stemmer=False)[:, 2, 2]
    np.testing.assert_allclose(rouge.bootstrap_of_means(f1), [0.178571, 0.465649, 0.809286], atol=1e-6)
    assert rouge.bootstrap_of_means(f1, seed=12345)[0] == pytest.approx(0.111648, abs=1e-6)


def test_coco_rouge() -> None:
    """pycocoevalcap 1.2, raw and lower-cased without punctuation."""
    raw = rouge.coco_metric(PREDICTIONS, REFERENCES, str.split, "tok:blank")
    clean = rouge.coco_metric(PREDICTIONS, REFERENCES, bleu.tokens_clean, "tok:alnum")
    assert raw.total() == pytest.approx(0.40349070, abs=1e-8)
    assert clean.total() == pytest.approx(0.45986561, abs=1e-8)
    assert rouge.coco_rouge_l([], ["a"]) == 0.0


def test_bootstrap_of_sacrebleu() -> None:
    """sacrebleu 2.6.0, n_bootstrap=500, seed 12345: mean and half width, its quantiles being order statistics."""
    metric = bleu.metric(PREDICTIONS, REFERENCES, 4, "sacrebleu")
    scores = np.sort(metric.value(statistics.resample(metric.rows, range(4), draws=500, seed=12345)))
    assert scores.mean() == pytest.approx(34.855487, abs=1e-6)
    cut = 500 // 40
    assert (scores[500 - cut - 1] - scores[cut]) / 2 == pytest.approx(37.641257, abs=2e-6)


def test_approximate_randomisation_of_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    """sacrebleu 2.6.0, 1,000 trials, seed 12345: p of 0.253746, counting what is strictly greater."""
    a, b = (bleu.metric(texts, REFERENCES, 4, "sacrebleu") for texts in (PREDICTIONS, OTHERS))
    assert b.total() == pytest.approx(56.940681, abs=1e-6)
    monkeypatch.setattr(statistics, "EXACT", 0)
    swapped = statistics.randomise(a.rows, b.rows, range(4), trials=1000, seed=12345)
    differences = np.abs(b.value(swapped.second) - a.value(swapped.first))
    greater = (differences > b.total() - a.total() + 1e-9).sum()
    assert (greater + 1) / 1001 == pytest.approx(0.253746, abs=1e-6)
    # Ours counts what is as large too, and tries all 16 ways when there are so few: here from texts that are exchanged.
    changes = []
    for ways in itertools.product((False, True), repeat=4):
        sides = zip(
            *((o, p) if way else (p, o) for p, o, way in zip(PREDICTIONS, OTHERS, ways, strict=True)), strict=True
        )
        first, second = (corpus_bleu(4, "sacrebleu", list(side)) for side in sides)
        changes.append(second - first)
    seen = b.total() - a.total()
    monkeypatch.undo()
    every = statistics.randomise(a.rows, b.rows, range(4))
    exact = b.value(every.second) - a.value(every.first)
    np.testing.assert_allclose(np.sort(exact), np.sort(changes), atol=1e-9)
    assert sum(abs(change) > seen + 1e-9 for change in changes) == 4  # 4 of 16 is what 0.253746 comes near
    assert statistics.significance(exact, seen, every) == statistics.Significance(p=6 / 16, p_min=2 / 16, exact=True)


def test_corpus_scores_are_functions_of_summed_rows() -> None:
    """Patients of two reports each: one entry, from rows summed by patient."""
    metric = bleu.metric(PREDICTIONS, REFERENCES, 4, "sacrebleu")
    entry = scoring.entries([metric], scoring.Setting(["a", "a", "b", "b"], "patient", 200, 0))[0]
    assert entry["value"] == pytest.approx(34.425341, abs=1e-6) and entry["n"] == 4 and entry["scale"] == 100.0
    assert entry["signature"].startswith("bleu|order:4|tok:13a|case:mixed|smooth:exp|agg:corpus|scale:0-100|")
    assert entry["signature"].endswith("unit:patient|ci:percentile-200-seed0")
    assert entry["ci"][0] <= entry["bootstrap_median"] <= entry["ci"][1]


@pytest.fixture(scope="module")
def golden(real: Path) -> dict[str, Any]:
    """41 pairs of real Open-I findings, scored by rouge-score 0.1.2, sacrebleu 2.6.0 and pycocoevalcap 1.2."""
    return json.loads((real / "openi" / "golden_nlg_metrics.json").read_text())


@pytest.fixture(scope="module")
def pairs(golden: dict[str, Any]) -> tuple[list[str], list[str]]:
    return [pair["hyp"] for pair in golden["pairs"]], [pair["ref"] for pair in golden["pairs"]]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_golden_sacrebleu(golden: dict[str, Any], pairs: tuple[list[str], list[str]], order: int) -> None:
    for smooth, convention in (("exp", "sacrebleu"), ("none", "hf")):
        expected = golden["results"][f"sacrebleu_corpus_order{order}_{smooth}"]
        metric = bleu.metric(*pairs, order, convention)
        # The same arithmetic in another order: only the last digits may differ.
        assert 100 * metric.total() / metric.scale == pytest.approx(expected["score"], rel=1e-12)
        totals = metric.rows.sum(axis=0)
        assert totals[:order].tolist() == expected["counts"]
        assert totals[4 : 4 + order].tolist() == expected["totals"]
        assert totals[8:].tolist() == [expected["sys_len"], expected["ref_len"]]
        # What is left of the score when the precisions are taken out is the brevity penalty.
        precisions = np.log(totals[:order] / totals[4 : 4 + order]).mean()
        assert metric.total() / metric.scale / np.exp(precisions) == pytest.approx(expected["bp"], rel=1e-12)
    if order == 4:
        each = bleu.metric(*pairs, 4, "sacrebleu").each()
        np.testing.assert_allclose(each, golden["results"]["sacrebleu_sentence_order4_exp"], rtol=1e-12)


def test_golden_coco(golden: dict[str, Any], pairs: tuple[list[str], list[str]]) -> None:
    expected = golden["results"]["pycocoevalcap_lower_alnum_tokens"]
    for order in (1, 2, 3, 4):
        metric = bleu.metric(*pairs, order, "coco-clean")
        assert metric.total() == pytest.approx(expected["bleu"][order - 1], rel=1e-12)
        np.testing.assert_allclose(metric.each(), expected["bleu_per"][order - 1], rtol=1e-12)
    found = cider.metric(*pairs, bleu.tokens_clean, "tok:alnum")
    assert found.total() == pytest.approx(expected["cider"], rel=1e-12)
    np.testing.assert_allclose(found.each(), expected["cider_per"], rtol=1e-9, atol=1e-12)
    rouge_l = rouge.coco_metric(*pairs, bleu.tokens_clean, "tok:alnum")
    assert rouge_l.total() == pytest.approx(expected["rouge_l"], rel=1e-12)
    np.testing.assert_allclose(rouge_l.each(), expected["rouge_l_per"], rtol=1e-12)


@pytest.mark.parametrize("stemmer", [False, True])
def test_golden_rouge(golden: dict[str, Any], pairs: tuple[list[str], list[str]], stemmer: bool) -> None:
    expected = golden["results"][f"rouge_stemmer_{stemmer}"]
    metrics = {metric.name: metric for metric in rouge.metrics(*pairs, stemmer)}
    for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        # The file keeps ten digits per pair, and its mean is over those; the last of three is F.
        assert metrics[name].total() == pytest.approx(expected["mean_f"][kind], abs=1e-10)
        np.testing.assert_allclose(metrics[name].each(), [row[kind][2] for row in expected["per_pair"]], atol=1e-9)
    each = [[row[kind] for kind in rouge.KINDS] for row in expected["per_pair"]]
    np.testing.assert_allclose(rouge.scores(*pairs, stemmer), each, atol=1e-9)  # precision and recall too


# Five pairs of RadEval's tests (tests/fixtures), every different word replaced by a code of two characters: scores of overlap see only which
# words are equal. First words as blanks part them, then words as ROUGE sees them, lower-cased and stemmed.
RADEVAL_BLANKS = (
    [
        "a0 a1 a2 a3",
        "a4 a5 a6 a7 a8 a9 b0 b1 b2 b3",
        "b4 b5 b6 b7 b8 b9 c0 c1 c2 c3 c4 c5 c6 a4 c7 c8 c9",
        "a0 d0 a1 a2 a3 d1 d2 d3 d4 d5 d6 d7 d8 d9",
        "e0 e1 c7 e2 b1 c4 e3 b3",
    ],
    [
        "a0 a1 a2 a3",
        "e4 e5 d2 d3 a6 a7 a9 b0 b1 e6 e7 b3",
        "e8 e9 f0 f1 a6 f2 f3 f4 f5 f6",
        "f7 f8 c2 c7 f9 a6 g0 g1 g2 g3 g4 f2 g5 c7 g6",
        "a0 a9 b0 g7 g8",
    ],
)
RADEVAL_STEMS = (
    [
        "a0 a1 a2 a3",
        "a4 a5 a6 a7 a8 a9 b0 b1 b2 b3",
        "b4 b5 b6 b7 b8 b9 c0 c1 c2 c3 b5 c4 c5 c6 a4 c7 c8 c9",
        "a0 d0 a1 a2 a3 d1 d2 d3 d4 d5 d6 d7 d8 d9 e0",
        "e1 a4 c7 e2 b1 b5 e3 b3",
    ],
    [
        "a0 a1 a2 a3",
        "e4 d1 d2 d3 a6 a7 a9 b0 b1 e5 e6 b3",
        "e7 e8 e9 f0 a6 a0 f1 f2 f3 f4",
        "f5 f6 c2 c7 f7 a6 f8 f9 g0 e2 g1 a0 g2 c7 e2",
        "a0 a9 b0 g3 g4",
    ],
)


def test_scores_of_radeval() -> None:
    """tests/fixtures/expected_scores_cpu.json of RadEval 2.2.0, four digits."""
    references, predictions = RADEVAL_BLANKS
    found = [bleu.metric(predictions, references, order, "coco").total() for order in (1, 2, 3, 4)]
    np.testing.assert_allclose(found, [0.1867, 0.1532, 0.1189, 0.0826], atol=5e-5)
    references, predictions = RADEVAL_STEMS
    rouges = {metric.name: metric for metric in rouge.metrics(predictions, references, stemmer=True)}
    expected = {"rouge_1": 0.3224, "rouge_2": 0.26, "rouge_l": 0.3224}
    assert {name: rouges[name].total() for name in expected} == pytest.approx(expected, abs=5e-5)
    np.testing.assert_allclose(rouges["rouge_l"].each(), [1, 6 / 11, 0, 1 / 15, 0], atol=1e-12)
    np.testing.assert_allclose(rouges["rouge_2"].each(), [1, 0.3, 0, 0, 0], atol=1e-12)
