"""The benchmarks run and compare equal numbers; how fast anything is, is not a test."""

import pytest

from evaluation import benchmark


def test_both_sides_give_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = benchmark.bootstrap(reports=40, draws=100)
    benchmark.table(rows)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert [row["name"] for row in rows] == ["label F1, 8 averages", "BLEU-4"]
    assert all(row["ours_s"] > 0 and row["peer_s"] > 0 and row["draws"] == 100 for row in rows)


@pytest.mark.slow
def test_labels_of_both_sides_are_equal() -> None:
    pytest.importorskip("torch")
    rows = benchmark.labels_per_second(reports=20, depth=1, width=64)
    assert [row["name"] for row in rows] == ["labels, PyTorch batch 1", "labels, PyTorch batch 64"]
    assert all(row["ours_per_s"] > 0 and row["peer_per_s"] > 0 for row in rows)
