from typing import Any

import numpy as np
import pytest

from evaluation import retrieval_metrics
from launch import retrieve


def test_ranks_worked_out_by_hand() -> None:
    query = np.eye(3)
    candidates = np.array([[1.0, 0, 0], [1, 0.5, 0], [0, 1, 0.9]])  # text 2 is nearer to query 1 than text 1 is
    assert retrieval_metrics.ranks(query, candidates).tolist() == [1, 2, 1]
    out = retrieval_metrics.retrieval(query, candidates)["image_to_text"]
    assert [out[name] for name in ("r1", "r5", "r10", "median_rank", "mean_rank", "n")] == [2 / 3, 1, 1, 1, 4 / 3, 3]
    assert out["chance"] == {"r1": 1 / 3, "r5": 1.0, "r10": 1.0}
    assert out["signature"] == "retrieval|image_to_text|score:cosine|ties:against|studies:all|pool:3|scale:0-1"


def test_perfect_and_chance() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 32))
    perfect = retrieval_metrics.retrieval(rows, 3 * rows)
    assert perfect["image_to_text"]["r1"] == perfect["text_to_image"]["r1"] == 1.0
    other = np.random.default_rng(1).normal(size=(2000, 64))
    random = retrieval_metrics.retrieval(other, np.random.default_rng(2).normal(size=(2000, 64)))["image_to_text"]
    assert random["chance"]["r10"] == 0.005
    assert random["r10"] < 0.015  # 0.005 expected, standard error 0.0016: six of them above
    assert 900 < random["median_rank"] < 1100


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_collapsed_towers_get_the_last_rank(dtype: str) -> None:
    point = np.random.default_rng(0).normal(size=(1, 48))
    rows = np.repeat(point, 37, axis=0).astype(dtype)
    assert set(retrieval_metrics.ranks(rows, rows).tolist()) == {37}
    assert set(retrieval_metrics.ranks(np.zeros((5, 4)), np.zeros((5, 4))).tolist()) == {5}


def test_blocks_do_not_change_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(50, 8)), rng.normal(size=(50, 8))
    whole = retrieval_metrics.ranks(image, text)
    monkeypatch.setattr(retrieval_metrics, "_BLOCK", 7)
    np.testing.assert_array_equal(retrieval_metrics.ranks(image, text), whole)


def brute_force(image: np.ndarray, text: np.ndarray, groups: list[int]) -> np.ndarray:
    """The last ranks of both directions, [2, N], by a loop over all pairs in float64."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text)]
    scores = unit[0] @ unit[1].T
    out = []
    for table in (scores, scores.T):
        out.append(
            [
                1 + sum(table[i, j] >= table[i, i] - 1e-6 for j in range(len(table)) if groups[j] != groups[i])
                for i in range(len(table))
            ]
        )
    return np.array(out)


@pytest.mark.parametrize("block", [5, 16, 64])
def test_equal_to_brute_force_with_ties_and_duplicates(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(retrieval_metrics, "_BLOCK", block)
    rng = np.random.default_rng(0)
    image, text = rng.integers(-2, 3, (48, 6)) + 0.5, rng.integers(-2, 3, (48, 6)) + 0.5  # few values: many ties
    text[10:20] = text[3]  # eleven times the same report
    image[40:] = image[:8]
    same = [3 if 10 <= i < 20 else i for i in range(48)]
    for groups in (list(range(48)), same):
        forth, back = retrieval_metrics.both_ranks(image, text, groups)
        np.testing.assert_array_equal([forth.last, back.last], brute_force(image, text, groups))
    alone = retrieval_metrics.both_ranks(image, text)[0].last
    aware = retrieval_metrics.both_ranks(image, text, same)[0].last
    assert (aware[10:20] <= alone[10:20] - 10).all() and (aware <= alone).all()


def test_ties_for_and_against() -> None:
    """Four images and texts whose similarities are made up; ranks from 0 are 0 1 1 0 and, counting ties against, 0 1 2 1."""
    scores = np.array([[0.9, 0.1, 0.3, 0.2], [0.4, 0.5, 0.6, 0.1], [0.2, 0.3, 0.3, 0.8], [0.7, 0.1, 0.2, 0.7]])
    forth, _ = retrieval_metrics.both_ranks(scores, np.eye(4))  # rows scaled to length one keep their order
    assert (forth.first - 1).tolist() == [0, 1, 1, 0]
    assert (forth.last - 1).tolist() == [0, 1, 2, 1]
    assert (forth.expected - 1).tolist() == [0, 1, 1.5, 0.5]
    back, _ = retrieval_metrics.both_ranks(scores.T, np.eye(4))
    assert (back.first - 1).tolist() == [0, 0, 1, 1]
    assert (back.last - 1).tolist() == [0, 0, 2, 1]
    for ranks, ties, expected in (
        (forth, "for", (0.5, 1.0)),
        (forth, "against", (0.25, 0.75)),
        (forth, "expected", (0.375, 0.875)),
        (back, "for", (0.5, 1.0)),
        (back, "against", (0.5, 0.75)),
        (back, "expected", (0.5, 0.875)),
    ):
        found = retrieval_metrics.summary(ranks, ties, at=(1, 2))
        assert (found["r1"], found["r2"]) == expected
    # Ranks from 1, in order: 1 2 2 3, 1 1 2 2, and where one tie is open 1 1.5 2 2.5.
    medians = [retrieval_metrics.summary(forth, ties)["median_rank"] for ties in ("against", "for", "expected")]
    assert medians == [2.0, 1.5, 1.75]


def test_precision_counts_what_has_the_same_labels() -> None:
    image = np.eye(4)
    text = np.array([[1.0, 0, 0, 0], [1, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 0]])
    # Image 0 finds two of its kind, image 1 one and then by order text 0, images 2 and 3 themselves and then text 0.
    assert retrieval_metrics.precision_at(image, text, labels, [1, 2]) == [1.0, (2 + 2 + 1 + 1) / 8]
    for bad in (0, 5):
        with pytest.raises(ValueError, match="between 1 and 4"):
            retrieval_metrics.precision_at(image, text, labels, [bad])


@pytest.mark.parametrize("block", [5, 16, 64])
def test_nearest_is_that_of_a_whole_sort(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Candidates of eight kinds, so that most are equally near, to the bit; a block may hold fewer than k."""
    monkeypatch.setattr(retrieval_metrics, "_BLOCK", block)
    rng = np.random.default_rng(0)
    query, candidates = rng.normal(size=(48, 8)), np.eye(8)[rng.integers(0, 8, 37)]
    order = np.argsort(-(query @ candidates.T), axis=1, kind="stable")
    np.testing.assert_array_equal(retrieval_metrics.nearest(query, candidates, 10), order[:, :10])
    np.testing.assert_array_equal(retrieval_metrics.nearest(query, candidates, 37), order)
    with pytest.raises(ValueError, match="not finite"):
        retrieval_metrics.nearest(np.full((2, 8), np.inf), candidates, 1)


def test_similarities_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pairs, what goes to the device is of one block, and of one shape, so that it is compiled once."""
    shapes = set()
    keep = retrieval_metrics._keep()

    def watched(values: np.ndarray, places: np.ndarray, query: np.ndarray, candidates: np.ndarray, *rest: int) -> Any:
        shapes.add((values.shape, query.shape, candidates.shape))
        return keep(values, places, query, candidates, *rest)

    monkeypatch.setattr(retrieval_metrics, "_BLOCK", 16)
    monkeypatch.setattr(retrieval_metrics, "_keep", lambda: watched)
    rows = np.random.default_rng(0).normal(size=(100, 8))
    assert retrieval_metrics.precision_at(rows, rows, np.arange(100)[:, None], [1, 2]) == [1.0, 0.5]
    assert shapes == {((16, 2), (16, 8), (16, 8))}


def test_equal_reports_are_no_rivals() -> None:
    """Three studies with the same report and one with another; no image tells the three apart."""
    image, text = np.eye(3)[[0, 0, 0, 1]], np.eye(3)[[0, 0, 0, 1]]
    alone = retrieval_metrics.retrieval(image, text)["image_to_text"]
    assert (alone["r1"], alone["ties_expected"]["r1"], alone["ties_for"]["r1"]) == (1 / 4, (3 / 3 + 1) / 4, 1.0)
    assert (alone["median_rank"], alone["ties_expected"]["median_rank"], alone["ties_for"]["median_rank"]) == (3, 2, 1)
    assert alone["chance"]["r1"] == 1 / 4
    aware = retrieval_metrics.retrieval(image, text, ["a", "a", "a", "b"], "equal-words:no-rivals")
    for direction in retrieval_metrics.DIRECTIONS:
        assert aware[direction]["r1"] == aware[direction]["ties_for"]["r1"] == 1.0
        # Each of the three has one rival, the other one three.
        assert aware[direction]["chance"]["r1"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 2 + 1 / 4) / 4)
        for ties in ("for", "expected"):
            signature = f"retrieval|{direction}|score:cosine|ties:{ties}|equal-words:no-rivals|pool:4|scale:0-1"
            assert aware[direction][f"ties_{ties}"]["signature"] == signature


def test_precision_in_both_directions() -> None:
    image = np.eye(4)
    text = np.array([[1.0, 0, 0, 0], [1, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    found = retrieval_metrics.label_precision(image, text, np.array([[1], [1], [0], [-1]]), "studies:labelled")
    assert found["image_to_text"]["precision_1"] == 1.0  # image 1 has something in common with text 1 alone
    # Text 1 is nearest to image 0, which has its labels; none has ten candidates.
    assert found["text_to_image"]["precision_1"] == 1.0 and found["text_to_image"]["precision_10"] is None
    assert found["text_to_image"]["chance"] == (2 * 2 + 1 + 1) / 16
    expected = "precision|text_to_image|score:cosine|ties:first|right:same-1-labels|own:counted|studies:labelled|pool:4|scale:0-1"
    assert found["text_to_image"]["signature"] == expected


def test_intervals_are_of_patients() -> None:
    """Sixty studies of twenty patients, three alike of each, half of whom are found: intervals as of twenty studies, wider than of sixty."""
    image = np.eye(20)[np.repeat(np.arange(20), 3)]
    text = np.eye(20)[np.repeat(np.where(np.arange(20) % 2, np.arange(20), (np.arange(20) + 2) % 20), 3)]
    patients = np.repeat(np.arange(20), 3).tolist()
    whole, alone = (retrieval_metrics.retrieval(image, text, patients, "", who) for who in (patients, range(60)))
    found = whole["image_to_text"]
    assert found["r1"] == 0.5 and list(found["ci"]) == ["r1", "r5", "r10", "mean_rank", "median_rank"]
    # A share of one half of twenty has a standard error of 0.112, of sixty of 0.065.
    for block, error in ((found, 0.112), (alone["image_to_text"], 0.065)):
        low, high = block["ci"]["r1"]
        assert low == pytest.approx(0.5 - 1.96 * error, abs=0.05) and high == pytest.approx(
            0.5 + 1.96 * error, abs=0.05
        )
    for name, (low, high) in found["ci"].items():
        assert low <= found[name] <= high
    assert found["signature"].endswith("|unit:patient|ci:percentile-2000-seed0")
    assert found["ties_for"]["ci"]["r1"][0] >= found["ci"]["r1"][0]
    labels = np.arange(60)[:, None] // 30
    precise = retrieval_metrics.label_precision(image, text, labels, "", patients)["image_to_text"]
    low, high = precise["ci"]["precision_1"]
    assert low <= precise["precision_1"] <= high and 0.2 < high - low < 0.6
    assert "ci" not in retrieval_metrics.label_precision(image, text, labels)["image_to_text"]


def test_bad_matrices_are_refused() -> None:
    rows = np.ones((3, 2))
    for bad in (np.full((3, 2), np.nan), np.ones((3, 3)), np.ones((2, 2))):
        with pytest.raises(ValueError, match="embeddings"):
            retrieval_metrics.ranks(rows, bad)
    with pytest.raises(ValueError, match="3 pairs but 2 groups"):
        retrieval_metrics.both_ranks(rows, rows, ["a", "b"])
    with pytest.raises(ValueError, match="N >= 1"):
        retrieval_metrics.ranks(rows[:0], rows[:0])


STUDIES = [  # findings, impression, labels
    ("No effusion.", "", [0, -2]),
    ("no  effusion", "", [0, -2]),  # the same words
    ("", "Edema.", [1, -2]),
    ("", "Mass.", [1, -2]),
    ("Fracture.", "Mass.", [-2, -2]),
]


def test_what_the_command_writes() -> None:
    """A tower that cannot tell the first two apart, and takes the third's image for the fourth's."""
    source = [
        {"id": f"s{n}", "patient": "", "findings": f, "impression": i, "labels": labels, "annotations": "[]"}
        for n, (f, i, labels) in enumerate(STUDIES)
    ]
    embedded = {"images": np.eye(5)[[0, 0, 3, 3, 4]], "texts": np.eye(5)[[0, 0, 2, 3, 4]], "index": np.arange(5)}
    found = retrieve.scores(embedded, source, annotated=False, candidates=None, how="tokens:64")
    for direction in retrieval_metrics.DIRECTIONS:
        assert (found[direction]["n"], found["all_studies"][direction]["n"]) == (
            4,
            5,
        )  # an empty text is not another one's
        assert (
            "|ties:against|studies:different-words|tokens:64|pool:4|scale:0-1|unit:patient|"
            in found[direction]["signature"]
        )
        assert "|studies:all|equal-words:no-rivals|tokens:64|pool:5|" in found["all_studies"][direction]["signature"]
        assert found[direction]["chance"]["r1"] == 0.25 and found["same_labels"][direction]["n"] == 4
    forth, back = (found["all_studies"][name] for name in retrieval_metrics.DIRECTIONS)
    assert (forth["r1"], forth["ties_for"]["r1"]) == (4 / 5, 4 / 5)  # text 3 is nearer to image 2 than its own
    assert (back["r1"], back["ties_expected"]["r1"], back["ties_for"]["r1"]) == (3 / 5, pytest.approx(3.7 / 5), 1.0)
    labelled = found["same_labels"]["image_to_text"]
    assert (labelled["precision_1"], labelled["precision_5"], labelled["chance"]) == (1.0, None, 0.5)
    assert retrieve.scores(embedded, source, annotated=False, candidates=2, how="")["text_to_image"]["n"] == 2
    assert retrieve.scores(embedded, source, annotated=True, candidates=None, how="")["text_to_image"]["n"] == 1
    first, second = retrieve.tables_of(found)
    low, high = found["image_to_text"]["ci"]["r1"]
    assert (low, high) == (0.25, 1.0)  # of four studies of four patients, of which three are found
    sure = "1.00 / 1.00 / 1.00 [1.00, 1.00]"
    assert first[1] == [
        "different studies, image to text",
        "0.75 / 0.75 / 0.75 [0.25, 1.00]",
        sure,
        sure,
        "1 / 1 / 1 [1.0, 4.0]",
        "4",
    ]
    assert second[1] == ["image to text", "1.00 [1.00, 1.00]", "-", "-", "0.50", "4"]
    nothing = [row | {"labels": [-2, -2]} for row in source]
    assert "same_labels" not in retrieve.scores(embedded, nothing, annotated=False, candidates=None, how="")
