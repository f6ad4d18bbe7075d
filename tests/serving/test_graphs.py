"""CUDA graphs where there is no CUDA: sizes are rounded within the cache, and a step that cannot be captured is said once."""

import pytest

from rad_jax.serving.graphs import Graphs, rounded


@pytest.mark.parametrize(
    ("rows", "longest", "expected"),
    [(1, 1, (1, 256)), (3, 256, (4, 256)), (5, 257, (6, 512)), (6, 1999, (6, 2000))],
)
def test_rounded_sizes_stay_within_the_cache(rows, longest, expected):
    assert rounded(rows, longest, slots=6, max_tokens=2000) == expected


def test_steps_go_on_without_graphs_where_capturing_fails():
    said: list[str] = []
    graphs = Graphs(lambda tokens, lengths, longest: tokens, 2, 512, "cpu", said.append)
    assert graphs.run([5], [7]) is None and graphs.broken
    assert len(said) == 1 and said[0].startswith("CUDA graphs are not used: capturing a step failed (")
