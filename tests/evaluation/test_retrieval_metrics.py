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


def test_bad_matrices_are_refused() -> None:
    rows = np.ones((3, 2))
    for bad in (np.full((3, 2), np.nan), np.ones((3, 3)), np.ones((2, 2))):
        with pytest.raises(ValueError, match="embeddings"):
            retrieval_metrics.ranks(rows, bad)
    with pytest.raises(ValueError, match="N >= 1"):
        retrieval_metrics.ranks(rows[:0], rows[:0])
