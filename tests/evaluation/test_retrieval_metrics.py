import numpy as np
import pytest

from evaluation import retrieval_metrics


def test_ranks_worked_out_by_hand() -> None:
    query = np.eye(3)
    candidates = np.array([[1.0, 0, 0], [1, 0.5, 0], [0, 1, 0.9]])  # text 2 is nearer to query 1 than text 1 is
    assert retrieval_metrics.ranks(query, candidates).tolist() == [1, 2, 1]
    out = retrieval_metrics.retrieval(query, candidates)["image_to_text"]
    assert (out.r1, out.r5, out.median_rank, out.mean_rank, out.n) == (2 / 3, 1.0, 1.0, 4 / 3, 3)


def test_perfect_and_chance() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 32))
    perfect = retrieval_metrics.retrieval(rows, 3 * rows)
    assert perfect["image_to_text"].r1 == perfect["text_to_image"].r1 == 1.0
    other = np.random.default_rng(1).normal(size=(2000, 64))
    random = retrieval_metrics.retrieval(other, np.random.default_rng(2).normal(size=(2000, 64)))["image_to_text"]
    assert random.chance(10) == 0.005
    assert random.r10 < 0.015  # 0.005 expected, standard error 0.0016: six of them above
    assert 900 < random.median_rank < 1100


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


def test_precision_counts_what_has_the_same_labels() -> None:
    image = np.eye(4)
    text = np.array([[1.0, 0, 0, 0], [1, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 0]])
    # Image 0 finds two of its kind, image 1 one and then by order text 0, images 2 and 3 themselves and then text 0.
    assert retrieval_metrics.precision_at(image, text, labels, 1) == 1.0
    assert retrieval_metrics.precision_at(image, text, labels, 2) == (2 + 2 + 1 + 1) / 8
    with pytest.raises(ValueError, match="between 1 and 4"):
        retrieval_metrics.precision_at(image, text, labels, 5)


def test_bad_matrices_are_refused() -> None:
    rows = np.ones((3, 2))
    for bad in (np.full((3, 2), np.nan), np.ones((3, 3)), np.ones((2, 2))):
        with pytest.raises(ValueError, match="embeddings"):
            retrieval_metrics.ranks(rows, bad)
    with pytest.raises(ValueError, match="3 pairs but 2 groups"):
        retrieval_metrics.both_ranks(rows, rows, ["a", "b"])
    with pytest.raises(ValueError, match="N >= 1"):
        retrieval_metrics.ranks(rows[:0], rows[:0])
