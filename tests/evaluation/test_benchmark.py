"""The benchmark of the intervals runs and compares equal numbers; how fast it is, is not a test."""

from evaluation import benchmark


def test_both_sides_give_the_same_numbers() -> None:
    rows = benchmark.bootstrap(reports=40, draws=100)
    assert [row["name"] for row in rows] == ["label F1, 8 averages", "BLEU-4"]
    assert all(row["ours_s"] > 0 and row["peer_s"] > 0 and row["draws"] == 100 for row in rows)
