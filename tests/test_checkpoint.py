"""Runs on disk: resuming to the bit, chains of runs, and what does not belong together."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rad_jax import checkpoint, metrics, optim, tasks, train
from rad_jax.checkpoint import Checkpointer, load_run
from rad_jax.errors import UserError
from rad_jax.input_pipeline import Corpus


def same(one: Any, other: Any) -> None:
    assert str(jax.tree.structure(one)) == str(jax.tree.structure(other))
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def newest(training, config, workdir, mesh):
    """State and data position of a run's newest checkpoint, placed on `mesh`."""
    task = tasks.make_task(config)
    optimizer = optim.optimizer(config.optimizer, config.steps)
    own = load_run(workdir).variables
    with jax.set_mesh(mesh):
        like, _ = train.initial(config, task, optimizer, own, mesh)
        checkpoints = Checkpointer(workdir, config.keep_checkpoints)
        restored = checkpoints.restore(like)
        checkpoints.close()
    assert restored is not None
    return restored


@pytest.mark.parametrize("stage", ["lm", pytest.param("stage1", marks=pytest.mark.slow)])
def test_interrupted_run_ends_as_one_that_was_not(training, tmp_path, stage):
    """Weights, moments, rng, data position and logged numbers to the bit: killed in step 6 of 8, resumed from step 4."""
    config = training.config(stage, steps=8, checkpoint_every=4)
    training.run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        training.run(config, tmp_path / "parts", stop=6)
    # A step is logged while the next one runs: that of the sixth was not.
    assert [row["step"] for row in metrics.read(tmp_path / "parts")] == [1, 2, 3, 4, 5]
    assert load_run(tmp_path / "parts").step == 4
    training.run(config, tmp_path / "parts")

    mesh = training.mesh()
    whole, parts = (newest(training, config, tmp_path / name, mesh) for name in ("whole", "parts"))
    same(whole[0], parts[0])
    assert whole[1] == parts[1]
    learned = (
        "step",
        "lr",
        "loss",
        "accuracy",
        "grad_norm",
        "skipped",
    )  # the others are of the process, not of the run
    rows = [[{k: row.get(k) for k in learned} for row in metrics.read(tmp_path / n)] for n in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 8


def test_finished_run_does_nothing_when_started_again(training, chain, tmp_path):
    shutil.copytree(chain, tmp_path / "chain")
    workdir = tmp_path / "chain" / "lm"
    before = load_run(workdir)
    rows = (workdir / "metrics.jsonl").read_text()
    training.run(training.config("lm"), workdir)
    assert load_run(workdir).sha256 == before.sha256
    assert (workdir / "metrics.jsonl").read_text() == rows


def test_checkpoint_of_eight_devices_is_read_by_one(training, tmp_path):
    config = training.config("lm", steps=2)
    training.run(config, tmp_path / "run", mesh=training.mesh(fsdp=4, tensor=2))
    eight = newest(training, config, tmp_path / "run", training.mesh(fsdp=4, tensor=2))
    one = newest(training, config, tmp_path / "run", training.mesh())
    same(eight, one)
    kernel = one[0].trainable["params"]["llm"]["head"]["kernel"]
    assert kernel.sharding.device_set == {jax.devices()[0]}
    assert len(eight[0].trainable["params"]["llm"]["head"]["kernel"].sharding.device_set) == 8


def test_chain_of_runs_gives_every_variable(training, chain):
    run = load_run(chain / "stage3")
    config = training.config("stage3")
    task, variables = tasks.restore(run, training.mesh())
    expected = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, variables) == jax.tree.map(lambda x: x.shape, expected)
    found = flatten_dict(run.variables, sep="/")
    for stage in ("lm", "stage1", "stage2"):
        own = checkpoint.read_trainable(chain / stage / "checkpoints" / "4")
        for path, leaf in flatten_dict(own, sep="/").items():
            if not path.startswith("params/projector/"):  # stage 3 trained it on
                np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    # Trained values, not drawn ones.
    assert np.abs(found["lora/llm/layers/attn/q/b"]).max() > 0
    assert config.model.vision.depth == found["params/vision/blocks/norm1/scale"].shape[0]


def test_chain_can_be_moved_and_reached_through_a_link(training, chain, tmp_path):
    expected = load_run(chain / "stage3")
    shutil.copytree(chain, tmp_path / "elsewhere" / "runs")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "runs")
    for folder in (tmp_path / "elsewhere" / "runs", tmp_path / "link"):
        moved = load_run(folder / "stage3")
        assert moved.sha256 == expected.sha256
        same(moved.variables, expected.variables)
    # A run made through a link, to a place at another depth, finds its base too.
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "short").symlink_to(tmp_path / "deep" / "er")
    training.run(training.config("lm", steps=1, seed=1), tmp_path / "short" / "lm2", (chain / "lm",))
    assert load_run(tmp_path / "short" / "lm2").step == 1


@pytest.fixture
def opened(training, chain, tmp_path):
    """Opens a workdir of stage 2 with some things changed."""

    def open_again(config=None, fingerprint=None, bases=("lm", "stage1"), tokenizer=None):
        corpus = Corpus.open(training.corpus).identity("train", "frontal")
        corpus["fingerprint"] = fingerprint or corpus["fingerprint"]
        runs = [load_run(chain / name) for name in bases]
        config = (config or training.config("stage2")).to_dict()
        checkpoint.open_workdir(tmp_path / "run", config, corpus, tokenizer or training.corpus / "tokenizer.json", runs)

    open_again()
    return open_again


def test_same_run_can_be_opened_again(opened):
    opened()


def test_settings_that_do_not_change_what_is_learned_may_change(training, opened):
    config = training.config("stage2", num_micro=2, log_every=3, checkpoint_every=1, keep_checkpoints=5)
    config.mesh.update(data=4, tensor=2)
    config.data.num_threads = 1
    opened(config=config)


def test_workdir_of_another_config(training, opened):
    config = training.config("stage2", batch_size=4)
    config.optimizer.peak_lr = 0.5
    with pytest.raises(UserError, match=r"2 settings differ: config.batch_size \(8 there, 4 now\), config.opt"):
        opened(config=config)


def test_workdir_of_another_corpus(opened):
    with pytest.raises(UserError, match=r"1 settings differ: corpus.fingerprint \('.*' there, 'other' now\)"):
        opened(fingerprint="other")


def test_workdir_of_another_base(opened):
    with pytest.raises(UserError, match="1 settings differ: bases"):
        opened(bases=("lm",))


def test_workdir_of_another_tokenizer(training, opened, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text((training.corpus / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match=r"1 settings differ: tokenizer.sha256"):
        opened(tokenizer=other)


def test_language_model_of_another_tokenizer(chain, tmp_path):
    run = load_run(chain / "stage3")
    checkpoint.check_tokenizer(run.tokenizer_file, [run])
    other = tmp_path / "tokenizer.json"
    other.write_bytes(run.tokenizer_file.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"--tokenizer=.*stage3.*tokenizer\.json"):
        checkpoint.check_tokenizer(other, [run])
    checkpoint.check_tokenizer(other, [load_run(chain / "stage1")])  # towers read texts of their own


def test_base_that_changed_after_the_training_on_it(training, chain, tmp_path):
    shutil.copytree(chain, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "lm")
    training.run(training.config("lm", seed=7), tmp_path / "runs" / "lm")
    with pytest.raises(UserError, match=r"runs/lm has changed since .*stage2 was trained on it"):
        load_run(tmp_path / "runs" / "stage3")


def test_base_that_is_gone(chain, tmp_path):
    shutil.copytree(chain / "stage3", tmp_path / "stage3")
    with pytest.raises(UserError, match=r"stage2 is neither a run of launch.train nor a base of launch.convert"):
        load_run(tmp_path / "stage3")


def test_run_without_checkpoint(training, opened, tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"):
        load_run(tmp_path / "run")


def test_half_written_checkpoint_is_passed_over(training, chain, tmp_path):
    """A kill while saving leaves a folder that Orbax has not renamed yet."""
    shutil.copytree(chain / "lm", tmp_path / "lm")
    checkpoints = tmp_path / "lm" / "checkpoints"
    shutil.copytree(checkpoints / "4", checkpoints / "6.orbax-checkpoint-tmp")
    assert load_run(tmp_path / "lm").step == 4
    assert sorted(os.listdir(chain / "lm" / "checkpoints")) == ["2", "4"]


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ('{"format_version": 0}', "format_version 0")])
def test_unusable_config_json(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_run(tmp_path)


def test_config_json_says_what_the_run_is(training, chain):
    record = json.loads((chain / "stage3" / "config.json").read_text())
    assert record["format_version"] == 1
    assert record["config"] == json.loads(json.dumps(training.config("stage3").to_dict()))
    assert [base["path"] for base in record["bases"]] == ["../stage2"]
    assert (chain / "stage3" / record["tokenizer"]["file"]).read_bytes() == (
        training.corpus / "tokenizer.json"
    ).read_bytes()


def test_content_hash_sees_names_shapes_and_values():
    tree: dict[str, Any] = {"a": {"b": np.arange(6.0)}}
    others: list[dict[str, Any]] = [
        {"a": {"c": np.arange(6.0)}},
        {"a": {"b": np.arange(6.0).reshape(2, 3)}},
        {"a": {"b": np.arange(1.0, 7.0)}},
    ]
    hashes = {checkpoint.content_hash(t) for t in (tree, *others)}
    assert len(hashes) == 4
    assert checkpoint.content_hash({"a": {"b": np.arange(6.0)}}) in hashes


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(training, tmp_path: Path):
    training.run(training.config("lm", steps=6, keep_checkpoints=1), tmp_path / "run")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["6"]
