"""The benchmarks beside transformers: both sides compute the same, and a row says what it should."""

import dataclasses
import functools

import pytest

from launch.benchmarks import llava, pairs, serve
from launch.benchmarks.pairs import Run
from rad_jax.errors import UserError
from rad_jax.models.llava import LlavaConfig

VISION = dataclasses.replace(llava.VISION, image_size=28, width=24, depth=3, mlp_dim=48, unroll=2)
LLM = dataclasses.replace(llava.LLM, vocab_size=96, width=32, depth=2, mlp_dim=48, unroll=2)


def test_row_takes_medians_and_the_fastest_peer():
    runs = {
        "ours": [Run(1.0, 2.0, None), Run(2.0, 4.0, None), Run(9.0, 4.0, None)],
        "slow": [Run(9.0, 9.0, None)] * 3,
        "fast": [Run(3.0, 6.0, None), Run(4.0, 6.0, None), Run(4.5, 8.0, None)],
    }
    row = pairs.row("a step", runs, "nothing")
    assert (row["peer"], row["ours_s"], row["peer_s"], row["ratio"]) == ("fast", 2.0, 4.0, 2.0)
    assert (row["ours_cpu_s"], row["peer_cpu_s"], row["cpu_ratio"]) == (4.0, 6.0, 1.5)
    assert row["ratio_quartiles"] == [0.5, 3.0]


@pytest.mark.slow
@pytest.mark.parity
class TestSides:
    """Every suite refuses to give times for sides that differ."""

    @pytest.fixture
    def problem(self, tmp_path, monkeypatch):
        pytest.importorskip("transformers")
        monkeypatch.delenv("XLA_FLAGS")  # with the tests' eight devices in it
        problem = llava.Problem(tmp_path, VISION, LLM, batch=2, before=4, after=9, asked=5, new_tokens=6)
        llava.make_weights(problem)
        return problem

    @pytest.mark.parametrize("suite", ["train_step", "projector_step"])
    def test_same_losses(self, suite, problem):
        (row,) = llava.steps(suite, problem, rounds=2, threads=1)
        assert {"name", "ours_s", "peer_s", "ratio", "skipped"} <= row.keys()
        assert row["loss_difference"] <= llava.LOSS_TOLERANCE

    def test_same_tokens(self, problem):
        rows = llava.decode(problem, rounds=2, threads=1, batches=(3,))
        assert [row["name"] for row in rows] == ["decode, batch 3, 5 tokens", "prompt and first token, batch 3"]


@pytest.mark.slow
@pytest.mark.parity
def test_serving_and_transformers_write_the_same_tokens(tmp_path):
    """At a size of its own: eight requests in company and one after the other, and one alone."""
    pytest.importorskip("transformers")
    tower = dataclasses.replace(serve.TOWER, image_size=28, patch_size=7, width=24, depth=3, mlp_dim=48)
    config = LlavaConfig(dataclasses.replace(serve.SIZES["demo"].llm, width=32, depth=2, mlp_dim=48), tower)
    rows = serve.compare("tiny", serve.problem(tmp_path / "tiny", config, "cpu"), rounds=2, threads=1)
    assert [row["name"] for row in rows] == [
        "tiny, 8 requests, batch of 8",
        "tiny, 8 requests, one by one",
        "tiny, 1 request",
    ]
    for row, count in zip(rows, (sum(serve.TEXT_LENGTHS),) * 2 + serve.TEXT_LENGTHS[:1], strict=True):
        assert row["equality"].startswith(f"all {count} tokens equal")
        assert 0 < row["ours_first_token_s"] < row["ours_s"]
    found = serve.run(1, 1, bundle=tmp_path / "tiny" / "bundle")
    assert [row["name"] for row in found] == [row["name"].replace("tiny", "bundle") for row in rows]
    assert all("tokens equal" in row["equality"] for row in found)


def test_tokens_are_counted_up_to_the_first_other_one():
    assert serve.upto([5, 2, 9], 2) == serve.upto([5, 2, 9], [7, 2]) == [5, 2] and serve.upto([5, 9], 2) == [5, 9]
    run = functools.partial(Run, 1.0, 1.0)
    runs = {"ours": [run([([1, 2, 3], 0.1), ([4], 0.2)])], "batch of 8": [run([([1, 5, 3], 0.1), ([4], 0.2)])]}
    assert serve._row("a card", runs, exact=False)["equality"].startswith(
        "up to a text's first other one 2 of 4 tokens equal"
    )
    with pytest.raises(UserError, match="different tokens"):
        serve._row("a CPU", runs, exact=True)
