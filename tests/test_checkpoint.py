"""Runs on disk: resuming to the bit, chains of runs, and what does not belong together."""

import contextlib
import json
import os
import re
import shutil
import types
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rad_jax import checkpoint, goodput, guards, history, metrics, optim, tasks, train
from rad_jax.checkpoint import Checkpointer, load_run
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError


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


def test_run_goes_on_only_on_the_weights_it_began_on(opened, training, chain, tmp_path, capsys):
    """By their hash: the same weights elsewhere are its base, other weights in the same place are not."""
    runs = tmp_path / "runs"
    shutil.copytree(chain, runs)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    opened(bases=tuple(runs / name for name in ("lm", "stage1")))
    assert "run finds its bases in new places now; their weights are the same." in capsys.readouterr().err
    again = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [base["path"] for base in again["bases"]] == ["../runs/lm", "../runs/stage1"]
    assert {**again, "bases": record["bases"]} == record
    opened(bases=tuple(runs / name for name in ("lm", "stage1")))
    assert capsys.readouterr().err == ""
    # The base learns on, to step 5.
    config = training.config("lm", steps=5)
    file = runs / "lm" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "config": config.to_dict()}))
    training.run(config, runs / "lm")
    with pytest.raises(
        UserError, match=r"run belongs to another run; 1 settings differ: bases .*'\.\./runs/lm', 'step': 5"
    ):
        opened(bases=tuple(runs / name for name in ("lm", "stage1")))
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == again


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


def spoil(checkpoint_folder: Path) -> None:
    """Flips one bit in the middle of the largest file of the trained weights."""
    file = max(
        (checkpoint_folder / "trainable").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(training, chain, tmp_path, capsys):
    """Said, moved aside, and the run ends as if nothing had been."""
    workdir = tmp_path / "lm"
    shutil.copytree(chain / "lm", workdir)
    spoil(workdir / "checkpoints" / "4")
    training.run(training.config("lm"), workdir)
    out, err = capsys.readouterr()
    assert "resumed at step 2 " in out
    said = r"note: checkpoint 4 of .*lm cannot be read \(.+\): it is moved to .*damaged/4-\d+; the run goes on from step 2\."
    assert re.search(said, err)
    assert len(os.listdir(workdir / "damaged")) == 1
    assert load_run(workdir).sha256 == load_run(chain / "lm").sha256


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Gloo all-gather failed: Connection closed by peer"), RuntimeError("RESOURCE_EXHAUSTED: 8 GiB")],
    ids=["a process is gone", "no memory"],
)
def test_checkpoint_that_could_not_be_read_for_another_reason_is_kept(training, chain, tmp_path, monkeypatch, error):
    workdir = tmp_path / "lm"
    shutil.copytree(chain / "lm", workdir)

    def read(*_):
        raise error

    monkeypatch.setattr(checkpoint.Checkpointer, "_read", read)
    with pytest.raises(RuntimeError, match=str(error)):
        training.run(training.config("lm"), workdir)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4"] and not (workdir / "damaged").exists()


@pytest.mark.slow
def test_checkpoint_without_one_of_its_files_gives_way_too(training, chain, tmp_path, capsys):
    workdir = tmp_path / "lm"
    shutil.copytree(chain / "lm", workdir)
    shutil.rmtree(workdir / "checkpoints" / "4" / "rest")
    training.run(training.config("lm"), workdir)
    assert "resumed at step 2 " in capsys.readouterr().out


def test_run_with_no_checkpoint_that_can_be_read_does_not_begin_anew(training, chain, tmp_path):
    workdir = tmp_path / "lm"
    shutil.copytree(chain / "lm", workdir)
    for step in ("2", "4"):
        spoil(workdir / "checkpoints" / step)
    with pytest.raises(
        UserError, match=r"none of the checkpoints in .*lm/checkpoints can be read \(4: .*restore one from"
    ):
        training.run(training.config("lm"), workdir)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4"]  # nothing is moved


def test_sums_of_bits_are_the_same_on_every_mesh_and_see_one_bit(training, chain):
    config = training.config("lm")
    one, eight = (newest(training, config, chain / "lm", training.mesh(*m))[0] for m in ((1, 1, 1), (2, 2, 2)))
    assert checkpoint.sums(one) == checkpoint.sums(eight)
    leaves, tree = jax.tree.flatten(one)
    words = np.array(leaves[-1]).view(np.uint32)
    words.flat[0] ^= 1
    leaves[-1] = words.view(np.asarray(leaves[-1]).dtype)
    assert checkpoint.sums(jax.tree.unflatten(tree, leaves)) != checkpoint.sums(one)


def test_best_checkpoint_is_kept_and_can_be_named(training, tmp_path, capsys):
    """Scores 0.5, 0.9, 0.7, 0.8 at steps 1 to 4: the second stays beside the newest, also over a restart."""
    scores = iter([0.5, 0.9, 0.7, 0.8, 0.6])
    seen = []

    def evaluate(trainable, frozen, stopped):
        assert not stopped()
        seen.append(float(jax.tree.leaves(trainable)[0].sum()))
        value = next(scores)
        return {"metric": "f1", "value": value, "low": value - 0.15, "high": value + 0.05}

    workdir = tmp_path / "run"
    config = training.config("lm", steps=4, keep_checkpoints=1)
    config.evaluate.every = 1
    training.run(config, workdir, beside=train.Beside(evaluate=evaluate))
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4"]
    err = capsys.readouterr().err
    assert "note: f1 0.9000 [0.7500, 0.9500] at step 2; the best so far." in err
    assert "note: f1 0.7000 [0.5500, 0.7500] at step 3; the best is 0.9000 at step 2." in err
    assert "at step 4; the best is 0.9000 at step 2" in err
    best = load_run(tmp_path / "run@best")
    assert (best.step, load_run(workdir).step) == (2, 4)
    assert len(set(seen)) == 4
    assert [row["step"] for row in metrics.lines(workdir / "evaluations.jsonl")] == [1, 2, 3, 4]
    assert load_run(tmp_path / "run@4").sha256 == load_run(workdir).sha256
    for wanted in ("3", "worst"):
        with pytest.raises(UserError, match=rf"has no checkpoint '{wanted}': there are 2, 4, best \(2\)"):
            load_run(tmp_path / f"run@{wanted}")
    # A run on the best one finds it again, and its tokenizer.
    training.run(training.config("lm", steps=1, seed=3), tmp_path / "after", (tmp_path / "run@best",))
    (under,) = load_run(tmp_path / "after").bases
    assert under.sha256 == best.sha256 and under.tokenizer_file.is_file()


def test_best_so_far_counts_no_more_where_it_was_measured_otherwise(tmp_path, capsys):
    """Another metric, signature, slice or number of studies: the next evaluation is the best, however small its number."""
    phases, kept = goodput.Phases(clock=iter(range(0, 1000, 3)).__next__), types.SimpleNamespace(best=None)

    def keep(row):
        kept.best = dict(row)

    kept.keep_best = keep
    watchdog = types.SimpleNamespace(beat=lambda: None)
    state: Any = types.SimpleNamespace(trainable={})
    row = {"metric": "f1", "low": 0.0, "high": 1.0, "signature": "a", "slice": "validation", "studies": 8}
    rows = [
        *({**row, "value": 0.9}, {**row, "value": 0.8}),  # the same measure: the first stays
        *({**row, "value": 0.3, "metric": "rouge_l"}, {**row, "value": 0.2, "metric": "rouge_l", "signature": "b"}),
        *({**row, "value": 0.1, "slice": "test"}, {**row, "value": 0.05, "slice": "test", "studies": 9}),
    ]
    best = []
    for number, found in enumerate(rows):
        beside = train.Beside(evaluate=lambda *_, found=found: found)
        around: Any = train.Around(tmp_path, None, "", kept, phases, watchdog, beside)  # type: ignore[arg-type]
        with phases("evaluate"):
            assert train.scored(number, state, {}, around)
        best.append(kept.best["step"])
    assert best == [0, 0, 2, 3, 4, 5]
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if "was measured otherwise" in line]
    assert [line.split("(")[1].split(")")[0] for line in said] == [
        *("metric differ", "signature differ", "metric, signature, slice differ", "studies differ")
    ]
    assert "Evaluating takes " in lines[0]
    shares = [each["evaluate_share"] for each in metrics.lines(tmp_path / "evaluations.jsonl")]
    assert len(shares) == 6 and all(0.4 < share < 0.8 for share in shares)
    # A best.json of before slices were written is comparable.
    kept.best = {"step": 1, **{key: value for key, value in row.items() if key != "slice"}, "value": 0.5}
    beside = train.Beside(evaluate=lambda *_: {**row, "value": 0.4})
    around = train.Around(tmp_path, None, "", kept, phases, watchdog, beside)  # type: ignore[arg-type]
    train.scored(7, state, {}, around)
    assert kept.best["step"] == 1


def test_batches_of_an_evaluation_and_variables_of_a_base_are_movement(training, chain, tmp_path, monkeypatch):
    """A standstill ends a run; a long evaluation, a large base and a long compile are none."""
    beats, patient, during = [0], [], []

    class Counting:
        def __init__(self, seconds, doing):
            self._doing = doing

        def beat(self):
            beats[0] += 1

        @contextlib.contextmanager
        def patient(self):
            patient.append(self._doing())
            yield

        def close(self):
            pass

    def evaluate(trainable, frozen, stopped):
        for _ in range(5):
            before = beats[0]
            assert not stopped()
            during.append(beats[0] - before)
        return {"metric": "f1", "value": 0.5, "low": 0.4, "high": 0.6}

    def started(*_):
        during.append(beats[0])

    monkeypatch.setattr(guards, "Watchdog", Counting)
    monkeypatch.setattr(train, "started", started)
    config = training.config("stage2", steps=1)
    config.evaluate.every = 1
    bases = chain / "lm", chain / "stage1"
    training.run(config, tmp_path / "run", bases, beside=train.Beside(evaluate=evaluate))
    assert during[0] >= 12 + 20  # before the first step: variables of the language model and of the tower
    assert during[1:] == [1] * 5
    assert patient == ["compiling"]


def test_evaluation_that_is_broken_off_stops_the_run_which_is_saved(training, tmp_path):
    config = training.config("lm", steps=4, checkpoint_every=100)
    config.evaluate.every = 2
    training.run(config, tmp_path / "run", beside=train.Beside(evaluate=lambda *_: None))
    assert load_run(tmp_path / "run").step == 2
    assert not (tmp_path / "run" / "best.json").exists()


def test_evaluation_that_was_broken_off_is_made_up_for(training, tmp_path):
    """Also the last one's, without which a run is not finished."""
    config, run = training.config("lm", steps=4), tmp_path / "run"
    config.evaluate.every = 2
    row = {"metric": "f1", "low": 0.0, "high": 1.0, "signature": "a", "slice": "validation", "studies": 8}
    answers = iter([None, {**row, "value": 0.6}, None, None, {**row, "value": 0.5}])
    seen = []

    def evaluate(trainable, *_):
        seen.append(checkpoint.content_hash(jax.device_get(trainable)))
        return next(answers)

    found = []
    for _ in range(4):
        training.run(config, run, beside=train.Beside(evaluate=evaluate))
        found.append([row["step"] for row in metrics.lines(run / "evaluations.jsonl")])
    assert found == [[], [2], [2], [2, 4]]
    assert seen[0] == seen[1] != seen[2] == seen[3] == seen[4]  # of the weights that were saved
    ends = [row["finished"] for row in metrics.lines(run / "starts.jsonl") if row["event"] == "end"]
    assert ends == [False, False, False, True]
    best = checkpoint.read_best(run)
    assert best is not None and best["step"] == 2
    assert history.read(run).state == "finished"
    training.run(config, run, beside=train.Beside(evaluate=evaluate))  # owes nothing: `answers` is not asked


def test_checkpoint_by_time(training, tmp_path, monkeypatch):
    """A loop whose clock moves on by 50 s a step: with one and a half minutes, every other step is saved."""
    now = iter(range(0, 10**6, 50))
    monkeypatch.setattr(train, "_now", lambda: float(next(now)))
    config = training.config("lm", steps=6, checkpoint_every=100, checkpoint_minutes=1.5, keep_checkpoints=9)
    training.run(config, tmp_path / "run")
    steps = sorted(map(int, os.listdir(tmp_path / "run" / "checkpoints")))
    assert steps == [2, 4, 6]


@pytest.mark.slow
def test_memory_does_not_grow_with_saves(training, tmp_path, monkeypatch):
    """From the 10th save to the 50th, resident memory."""
    sizes, save = [], Checkpointer.save

    def measured(self, state, data):
        save(self, state, data)
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    monkeypatch.setattr(Checkpointer, "save", measured)
    training.run(training.config("lm", steps=50, checkpoint_every=1), tmp_path / "run")
    assert len(sizes) == 50
    assert sizes[49] - sizes[9] < 32 * 2**20, [size // 2**20 for size in sizes]
