"""Findings written and scored while a model trains."""

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import pytest

from data.phantom.parser import parse
from evaluation import development
from evaluation.development import Development
from launch import generate as command
from rad_jax import checkpoint, metrics, state, tasks, train
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError


@pytest.fixture
def made(training):
    """Makes the evaluator of an experiment over the training split, where the tiny corpus has most of its studies."""

    def make(config, mesh, **changes):
        options = {"every": 2, "split": "train", "studies": 12, "batch_size": 5, "max_new_tokens": 6, **changes}
        config.evaluate.update(options)
        task = tasks.make_task(config)
        return Development(config.evaluate, task.model, Corpus.open(training.corpus), mesh, parse), task

    return make


def test_texts_of_the_truth_score_one(training, made):
    develop, _ = made(training.config("stage3"), training.mesh())
    source = Corpus.open(training.corpus).source("train", "frontal")
    row = develop.score([source[number]["findings"] for number in range(12)])
    assert (row["value"], row["low"], row["high"], row["rouge_l"]) == (1.0, 1.0, 1.0, 1.0)
    assert row["studies"] == 12 and "unit:patient" in row["signature"]
    worse = develop.score(["Nothing."] * 12)
    assert worse["metric"] == row["metric"] and worse["value"] < 0.5 and worse["low"] <= worse["value"] <= worse["high"]


def test_metric_that_is_asked_for_chooses(training, made, monkeypatch):
    """By name; without one it is that of findings."""
    monkeypatch.setattr(development, "_SUPPORT", 1)  # so few studies have few cases of a class
    source = Corpus.open(training.corpus).source("train", "frontal")
    texts = [source[number]["findings"] for number in range(12)]
    texts[:6] = ["Nothing."] * 6
    usual, words, side = (
        made(training.config("stage3"), training.mesh(), metric=metric)[0].score(texts)
        for metric in ("", "rouge_l", "laterality")
    )
    assert (usual["metric"], words["metric"], side["metric"]) == ("finding_macro_f1", "rouge_l", "laterality")
    assert words["value"] == words["rouge_l"] == usual["rouge_l"] != usual["value"]
    assert usual["slice"] == "train/frontal, 6 tokens"
    with pytest.raises(
        UserError, match=r"config.evaluate.metric=bleu_9 is unknown here: choose finding_macro_f1, .*rouge_l\."
    ):
        made(training.config("stage3"), training.mesh(), metric="bleu_9")


@pytest.mark.slow
def test_it_writes_what_launch_generate_writes(training, chain, made, tmp_path, monkeypatch):
    """In a run of stage 3, on the mesh that trains; its last texts are those of the saved weights."""
    mesh = training.mesh(data=2, tensor=2)
    config = training.config("stage3")
    develop, _ = made(config, mesh)
    texts = []
    score = develop.score

    def scored(said):
        texts.append(said)
        return score(said)

    monkeypatch.setattr(develop, "score", scored)
    training.run(config, tmp_path / "run", (chain / "stage2",), mesh=mesh, beside=train.Beside(evaluate=develop))
    rows = metrics.lines(tmp_path / "run" / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 and row["studies"] == 12 for row in rows)
    best = checkpoint.read_best(tmp_path / "run")
    assert best is not None and best["value"] == max(row["value"] for row in rows)

    options: dict[str, Any] = {
        "checkpoint": str(tmp_path / "run"),
        "data": str(training.corpus),
        "split": "train",
        "limit": 12,
    }
    options |= {
        "selection": "frontal",
        "max_new_tokens": 6,
        "batch_size": 4,
        "pixels": "real",
        "out": "x",
        "image": None,
    }
    options |= {"temperature": 0.0, "top_p": 1.0, "seed": 0, "dtype": None, "attention": "xla", "fsdp": 1, "tensor": 1}
    writer = command.Writer(types.SimpleNamespace(**options))
    said = {
        n: row["prediction"]
        for rows in writer.corpus(Corpus.open(training.corpus), 12, done=())
        for n, row in rows.items()
    }
    assert [said[number] for number in range(12)] == texts[-1]


@pytest.mark.slow
def test_by_command(training, chain, tmp_path):
    """launch.train scores while it trains and traces steps, launch.status tells of it, the best step's weights write findings."""
    config, run = training.config("stage3"), tmp_path / "run"
    config.evaluate.update({"every": 2, "split": "train", "studies": 12, "batch_size": 5, "max_new_tokens": 6})
    record = repr(config.to_dict())
    (tmp_path / "config.py").write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({record})\n"
    )

    def command(name, *arguments):
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        line = [sys.executable, "-m", f"launch.{name}", *map(str, arguments)]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    start = f"--config={tmp_path}/config.py", f"--data={training.corpus}", f"--base={chain / 'stage2'}"
    told = command("train", *start, f"--workdir={run}", "--profile=3:4").stderr
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    host = jax.profiler.ProfileData.from_file(str(trace)).find_plane_with_name("/host:CPU")
    calls = [e for line in host.lines for e in line.events if e.name == "PjitFunction(jit(step))"]
    outer = [e for e in calls if not any(other.start_ns < e.start_ns < other.end_ns for other in calls)]
    assert len(outer) == 2
    rows = metrics.lines(run / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert f"{row['metric']} {row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}] at step {row['step']}" in told
    best = checkpoint.read_best(run)
    assert best is not None and f"at step {best['step']}" in command("status", run).stdout
    out = tmp_path / "best.jsonl"
    wanted = f"--data={training.corpus}", "--split=train", "--limit=3", "--max_new_tokens=6", f"--out={out}"
    command("generate", f"--checkpoint={run}@best", *wanted)
    assert len(metrics.lines(out)) == 3


@pytest.mark.slow
def test_it_is_broken_off_between_batches(training, made):
    config = training.config("stage3")
    develop, _ = made(config, training.mesh())
    assert develop({}, {}, lambda: True) is None  # before the first batch: no weight is asked for
    variables = training.variables(config)
    trains, stays = state.split(variables, config.trainable)
    asked = iter([False, True])
    assert develop(trains, stays, lambda: next(asked)) is None


def test_model_that_writes_nothing_of_an_image(training, made):
    for stage in ("lm", "stage1"):
        with pytest.raises(
            UserError, match=r"config.evaluate.every: this model writes no findings of an image; set it"
        ):
            made(training.config(stage), training.mesh())
