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
def test_a_test_set_and_a_large_pool(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory is what is tested here: the similarities of 20,000 pairs alone would be 1.6 GB."""
    rows = benchmark.whole_panel(reports=30) + benchmark.large_pool(pairs=20_000)
    assert rows[0]["reports"] == 30 and rows[1]["pairs"] == 20_000 and rows[1]["peak_bytes"] < 1.2e9
    benchmark.table(rows)
    assert "GB at most" in capsys.readouterr().out


@pytest.mark.slow
def test_labels_of_both_sides_are_equal() -> None:
    pytest.importorskip("torch")
    rows = benchmark.labels_per_second(reports=20, depth=1, width=64)
    assert [row["name"] for row in rows] == ["labels, PyTorch batch 1", "labels, PyTorch batch 64"]
    assert all(row["ours_per_s"] > 0 and row["peer_per_s"] > 0 for row in rows)
