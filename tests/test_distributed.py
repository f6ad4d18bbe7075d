"""Several processes as one job, as on a pod, on one machine: training, its end when a process is killed, and what reads a run.

Their collectives go through Gloo. Every process is `python -m launch.COMMAND` with the flags a user would give.
"""

import collections
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from data.phantom.parser import parse
from evaluation.development import Development
from rad_jax import checkpoint, distributed, errors, metrics, runlog, sharding, tasks, train
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
import json
from pathlib import Path
import ml_collections

def get_config(name):
    return ml_collections.ConfigDict(json.loads(Path(__file__).with_name(f"{name}.json").read_text()))
"""
# Runs a command that notes each step's rows.
NOTING = """
import runpy, sys
from pathlib import Path
from tests import noting

noting.rows_of_steps(Path(sys.argv[1]))
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
# Runs a command whose process sends itself a signal when it asks for its sixth batch; with 0 it waits for that batch forever.
VICTIM = """
import os, runpy, sys, time
from rad_jax.runlog import RunLog

number, sys.argv, after = int(sys.argv[1]), sys.argv[2:], 5
take = RunLog.fetch

def fetch(self, batches):
    global after
    if not after and not number:
        with self._phases("data"):
            time.sleep(10_000)
    if not after:
        os.kill(os.getpid(), number)
    after -= 1
    return take(self, batches)

RunLog.fetch = fetch
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    text: str


class Jobs:
    """Starts commands as several processes."""

    def __init__(self, folder: Path):
        self._folder = folder
        (folder / "tiny.py").write_text(CONFIG)

    def config(self, config, name):
        """The flag that gives an experiment to a command."""
        (self._folder / f"{name}.json").write_text(json.dumps(config.to_dict()))
        return f"--config={self._folder / 'tiny.py'}:{name}"

    def start(self, processes, devices, command, *arguments, victim=None, notes=None):
        """Processes of one job, or one process alone; the `victim`, (index, signal), sends itself this signal.

        With `notes`, a folder, process INDEX notes its rows in notes/INDEX.jsonl.
        """
        environment = dict(os.environ)
        # Compiling takes far longer than running, so it may do without polishing the code.
        quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {quickly}"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(self._folder / "compiled")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        job = []
        for index in range(processes):
            several = ["--multihost", f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
            several = [*several, f"--process_id={index}"] if processes > 1 else []
            run = ["-m", f"launch.{command}"]
            if victim and victim[0] == index:
                run = ["-c", VICTIM, str(int(victim[1])), f"launch.{command}"]
            if notes is not None:
                run = ["-c", NOTING, str(notes / f"{index}.jsonl"), f"launch.{command}"]
            job.append(
                subprocess.Popen(
                    [sys.executable, *run, *arguments, *several],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return job

    def end(self, job, seconds=600.0):
        """Waits for the processes of a job and says how they ended."""
        try:
            texts = [process.communicate(timeout=seconds)[0] for process in job]
        finally:
            for process in job:
                process.kill()
        return [Ended(process.returncode, text) for process, text in zip(job, texts, strict=True)]

    def run(self, processes, devices, command, *arguments, notes=None):
        """What the processes wrote, after all have ended well."""
        ended = self.end(self.start(processes, devices, command, *arguments, notes=notes))
        for process in ended:
            assert process.status == 0, process.text
        return [process.text for process in ended]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """With one cache for the programs of all their processes."""
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def whole(training, tmp_path_factory):
    """A run of stage lm over eight steps, by this process on one device, which nothing interrupts."""
    workdir, add, rows = tmp_path_factory.mktemp("whole") / "run", runlog.RunLog.add, {}

    def added(self, step, numbers, batch):
        rows[step] = sorted(np.asarray(batch["index"]).tolist())
        add(self, step, numbers, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runlog.RunLog, "add", added)
        training.run(training.config("lm", steps=8), workdir)
    (workdir.parent / "rows.json").write_text(json.dumps(rows))
    return workdir


def mesh_flags(data, fsdp, tensor):
    return [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}"]


def same_run(found: Path, expected: Path, resumed: bool = False):
    """Losses, weights and gradients of two runs, and what was counted in their batches: bad rows since the last start.

    float32 sums over devices come in another order: 1e-5 relative in a loss. Adam's first steps are lr * sign(gradient), with lr = 1e-3:
    single weights whose gradient is all rounding may go another way. The mean gradient that Adam keeps shows what all of them were given.
    """
    rows, others = metrics.read(found), metrics.read(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for name in ("loss", "grad_norm", "accuracy", "lr"):
        mine, theirs = ([row[name] for row in r] for r in (rows, others))
        np.testing.assert_allclose(mine, theirs, rtol=1e-4 if name == "grad_norm" else 1e-5, err_msg=name)
    for name in () if resumed else ("bad_rows", "truncated_rows"):
        assert [row[name] for row in rows] == [row[name] for row in others]
    tokens, expected_tokens = ([row["tokens_per_s"] * row["step_time_s"] for row in r] for r in (rows, others))
    np.testing.assert_allclose(tokens, expected_tokens)
    (weights, grads), (expected_weights, expected_grads) = (
        saved(r / "checkpoints", rows[-1]["step"]) for r in (found, expected)
    )
    assert weights.keys() == expected_weights.keys() == grads.keys() == expected_grads.keys()
    floor = 1e-2 * max(np.abs(grad).max() for grad in expected_grads.values())  # key biases have none but rounding
    for path, grad in expected_grads.items():
        assert np.abs(grads[path] - grad).max() < 1e-3 * max(np.abs(grad).max(), floor), path
        if not path.endswith("attn/k/bias"):
            assert np.abs(weights[path] - expected_weights[path]).mean() < 2e-5, path


def saved(folder: Path, step: int):
    """Weights of a checkpoint, and their mean gradients as Adam keeps them: numpy by path."""
    parts = {"trainable": ocp.StandardCheckpointHandler(), "rest": ocp.StandardCheckpointHandler()}
    with ocp.CheckpointManager(folder.absolute(), item_handlers=parts) as manager:
        trees = {name: manager.item_metadata(step)[name].tree for name in parts}
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), trees)
        read = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        found = manager.restore(step, args=ocp.args.Composite(**read))
    (mean,) = (part["mu"] for part in found["rest"]["opt_state"] if part and "mu" in part)
    return flatten_dict(found["trainable"], sep="/"), flatten_dict(mean, sep="/")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "bases", "processes", "mesh"),
    [
        ("stage1", [], 2, (2, 4, 1)),
        ("stage2", ["lm", "stage1"], 2, (1, 1, 8)),  # both processes hold all rows
        ("stage3", ["stage2"], 2, (2, 2, 2)),
    ],
)
def test_processes_learn_what_one_learns(training, chain, jobs, tmp_path, stage, bases, processes, mesh):
    """The whole command: data, steps, checkpoints and the numbers it logs."""
    config = jobs.config(training.config(stage), stage)
    base = [f"--base={','.join(str(chain / name) for name in bases)}"] if bases else []
    workdir = tmp_path / "run"
    arguments = [config, f"--data={training.corpus}", f"--workdir={workdir}", *base, *mesh_flags(*mesh)]
    texts = jobs.run(processes, 8 // processes, "train", *arguments)
    same_run(workdir, chain / stage)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in (chain / stage).iterdir()}
    assert f"processes: {processes}" in texts[0]
    assert not any("trainable" in text or "step 1/" in text for text in texts[1:])  # one process speaks


@pytest.mark.slow
def test_four_processes_learn_and_score_what_one_does(training, chain, jobs, tmp_path):
    """Meanwhile they write findings together, and the first one scores them."""
    config = training.config("stage3")
    config.evaluate.update({"every": 2, "split": "train", "studies": 12, "batch_size": 5, "max_new_tokens": 6})
    one, four, corpus = tmp_path / "one", tmp_path / "four", Corpus.open(training.corpus)
    develop = Development(config.evaluate, tasks.make_task(config).model, corpus, training.mesh(), parse)
    training.run(config, one, (chain / "stage2",), beside=train.Beside(evaluate=develop))
    arguments = [jobs.config(config, "scored"), f"--data={training.corpus}", f"--base={chain / 'stage2'}"]
    texts = jobs.run(4, 2, "train", *arguments, f"--workdir={four}", *mesh_flags(2, 2, 2))
    same_run(four, one)
    found, expected = (
        [{**row, "time": 0, "evaluate_share": 0} for row in metrics.lines(run / "evaluations.jsonl")]
        for run in (four, one)
    )
    assert found == expected and [row["step"] for row in expected] == [2, 4]
    assert (best := checkpoint.read_best(four)) and best == checkpoint.read_best(one)
    assert "processes: 4" in texts[0]
    assert not any("at step" in text for text in texts[1:])


@pytest.mark.slow
def test_processes_write_what_one_writes(training, chain, jobs, tmp_path):
    """Findings in the corpus's order, by four processes; ranks and attention maps, by two."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    data = f"--data={training.corpus}"
    for out, processes, devices in ((one, 1, 1), (two, 2, 4)):
        writers = (4, 2) if processes > 1 else (1, 1)
        writes = [f"--checkpoint={chain / 'stage3'}", data, "--split=train", "--max_new_tokens=6", "--batch_size=8"]
        jobs.run(*writers, "generate", *writes, f"--out={out / 'predictions.jsonl'}")
        ranks = [f"--checkpoint={chain / 'stage1'}", data, "--split=train", "--batch_size=8"]
        jobs.run(processes, devices, "retrieve", *ranks, f"--out={out / 'retrieval.json'}")
        known = tmp_path / "known.jsonl"
        rows = [json.loads(line) for line in (one / "predictions.jsonl").read_text().splitlines()]
        known.write_text("".join(json.dumps({**row, "prediction": row["reference"]}) + "\n" for row in rows))
        looks = [f"--checkpoint={chain / 'stage3'}", data, f"--predictions={known}", "--batch_size=8"]
        jobs.run(processes, devices, "ground", *looks, f"--out={out / 'grounding'}")
    assert (two / "predictions.jsonl").read_text() == (one / "predictions.jsonl").read_text()
    assert len(rows) > 8
    assert (two / "retrieval.json").read_text() == (one / "retrieval.json").read_text()
    found, wanted = (json.loads((out / "grounding/grounding.json").read_text()) for out in (two, one))
    assert found.pop("shuffled") == pytest.approx(wanted.pop("shuffled"))
    assert found.pop("words") == wanted.pop("words")
    assert found.pop("chosen") == wanted.pop("chosen")
    assert found.pop("signature") == wanted.pop("signature")
    ends, expected_ends = found.pop("ci"), wanted.pop("ci")
    assert ends.keys() == expected_ends.keys()
    for name, interval in expected_ends.items():
        assert ends[name] == pytest.approx(interval, rel=1e-5, abs=1e-9)
    assert found == pytest.approx(wanted, rel=1e-5)  # means over maps, float32
    maps, expected = (np.load(out / "grounding/maps.npz") for out in (two, one))
    assert maps.files == expected.files
    for name in maps.files:
        np.testing.assert_allclose(maps[name], expected[name], atol=1e-6)  # shares of attention, float32


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["the first, which coordinates and writes", "the last"])
def test_killed_process_ends_the_job_and_the_job_goes_on(training, whole, jobs, tmp_path, victim):
    """SIGKILL in step 6 of 8: the other process says so and ends; started again, the job ends as one that was not interrupted."""
    config = training.config("lm", steps=8)
    workdir = tmp_path / "parts"
    arguments = [jobs.config(config, "lm"), f"--data={training.corpus}", f"--workdir={workdir}", *mesh_flags(2, 4, 1)]
    job = jobs.start(2, 4, "train", *arguments, victim=(victim, signal.SIGKILL))
    assert job[victim].wait(timeout=600) == -signal.SIGKILL
    killed = time.monotonic()
    survivor = jobs.end(job)[1 - victim]
    assert time.monotonic() - killed < 120
    # Either a collective fails, and we say it, or it hangs until JAX misses the process, says so and aborts.
    assert survivor.status in (distributed.RESTART, -signal.SIGABRT), survivor.text
    assert re.search(r"another (process of this job has ended: see|task died; see)", survivor.text), survivor.text
    # Orbax's thread may have been writing, and says in its own way that its barrier timed out; none of our frames is shown.
    assert not re.search(r'File ".*/(rad_jax|launch)/', survivor.text), survivor.text

    text = jobs.run(2, 4, "train", *arguments)[0]
    assert re.search("resumed at step [24]", text)  # the save at step 4 may not have been whole yet
    same_run(workdir, whole, resumed=True)


@pytest.mark.slow
def test_terminated_process_makes_the_job_save_and_stop(training, jobs, tmp_path):
    """SIGTERM to one process, as before a machine is taken away."""
    config = training.config("lm", steps=100_000, checkpoint_every=50_000, log_every=50_000)
    arguments = [jobs.config(config, "lm"), f"--data={training.corpus}", f"--workdir={tmp_path / 'run'}"]
    job = jobs.start(2, 4, "train", *arguments, *mesh_flags(2, 4, 1), victim=(1, signal.SIGTERM))
    for process in jobs.end(job):
        assert process.status == distributed.RESTART, process.text
    run = checkpoint.load_run(tmp_path / "run")
    assert 5 < run.step < 100_000
    assert metrics.read(tmp_path / "run")[-1]["step"] == run.step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 2, 2), (1, (1, 2, 1))), ((2, 2, 2), (2, (2, 4, 1))), ((1, 1, 1), (2, (2, 1, 1)))],
    ids=["8 devices to 2", "8 devices to 2 processes of 4", "1 process to 2"],
)
def test_run_goes_on_elsewhere(training, whole, jobs, tmp_path, before, after):
    """Stopped after step 4 of 8 and gone on with on other devices, it learns what it would have learned: rows and weights."""
    config = training.config("lm", steps=8)
    with pytest.raises(KeyboardInterrupt):
        training.run(config, tmp_path / "moved", stop=4, mesh=training.mesh(*before))
    processes, mesh = after
    arguments = [jobs.config(config, "lm"), f"--data={training.corpus}", f"--workdir={tmp_path / 'moved'}"]
    text = jobs.run(
        processes, mesh[0] * mesh[1] * mesh[2] // processes, "train", *arguments, *mesh_flags(*mesh), notes=tmp_path
    )[0]
    assert "resumed at step 4 " in text
    same_run(tmp_path / "moved", whole, resumed=True)
    found: dict[str, list[int]] = collections.defaultdict(list)
    for row in (row for index in range(processes) for row in metrics.lines(tmp_path / f"{index}.jsonl")):
        found[str(row["step"])] += row["rows"]
    expected = json.loads((whole.parent / "rows.json").read_text())
    assert {step: sorted(rows) for step, rows in found.items()} == {step: expected[step] for step in "5678"}


@pytest.mark.slow
def test_loader_that_stalls_ends_the_run_to_be_started_again(training, jobs, tmp_path):
    config = training.config("lm", steps=8, checkpoint_every=2)
    arguments = [jobs.config(config, "lm"), f"--data={training.corpus}", f"--workdir={tmp_path / 'run'}"]
    jobs.run(1, 1, "train", *arguments, "--config.steps=8")  # compiles, so that it does not look like a stall
    shutil.rmtree(tmp_path / "run")
    (ended,) = jobs.end(jobs.start(1, 1, "train", *arguments, "--stall_minutes=0.3", victim=(0, 0)))
    assert ended.status == distributed.RESTART, ended.text
    assert re.search(r"note: nothing has moved for \d+ s while waiting for data; all threads:", ended.text)
    assert re.search(r"error: nothing has moved for \d+ s while waiting for data: ending, start again\.", ended.text)
    assert re.search(r'File ".*/rad_jax/train.py", line \d+ in loop', ended.text)
    assert "resumed at step 4 " in jobs.run(1, 1, "train", *arguments)[0]


def test_flags_of_a_job(monkeypatch):
    """Those that belong to --multihost are not taken silently without it."""
    from absl import flags

    values = flags.FlagValues()
    for define in (flags.DEFINE_boolean, flags.DEFINE_string, flags.DEFINE_integer):
        monkeypatch.setattr(
            flags, define.__name__, lambda *a, _define=define, **k: _define(*a, flag_values=values, **k)
        )
    monkeypatch.setattr(flags, "FLAGS", values)
    distributed.define_flags()
    values(["command", "--num_processes=2"])
    with pytest.raises(UserError, match="belong to --multihost: add it"):
        distributed.join()
    values(["command", "--multihost", "--process_id=3", "--num_processes=2", "--coordinator=localhost:1"])
    asked = {}

    def initialize(**given):  # in a process that has used its devices, JAX's own stops before it reads what is given
        asked.update(given)
        raise ValueError("process_id is not one of them\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"cannot join its job \(process_id is not one of them\): give --coordinator"):
        distributed.join()
    assert (asked["coordinator_address"], asked["num_processes"], asked["process_id"]) == ("localhost:1", 2, 3)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Gloo all-reduce failed: Connection closed by peer"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:11181: Connection reset by peer"), True),
        (ValueError("barrier"), False),
        (RuntimeError("out of memory"), False),
    ],
)
def test_loss_of_a_process_is_told_from_other_errors(error, said):
    assert distributed.says_lost(error) == said
    outer = KeyError("restoring")
    outer.__cause__ = error
    assert distributed.says_lost(outer) == said


def test_one_process_alone_ends_as_ever():
    """`leave` and `end` are for processes of a job."""
    distributed.end(ValueError())
    distributed.leave(3, grace=0)
    with pytest.raises(SystemExit) as ended:
        errors.fail("wrong")
    assert ended.value.code == 2


class Device:
    """Of a machine that is not here."""

    platform = "cpu"

    def __init__(self, index, process, slice_index=0):
        self.id, self.process_index, self.slice_index = index, process, slice_index
        self.device_kind = "fake"


@pytest.mark.parametrize(
    ("mesh", "processes", "share"),
    [
        ((1, 8, 1), 2, [0, 1]),
        ((2, 2, 2), 4, [0, 1, 2, 3]),
        ((1, 1, 8), 2, [0, 0]),
        ((1, 2, 4), 4, [0, 0, 1, 1]),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same_share(monkeypatch, mesh, processes, share):
    devices = [Device(index, index * processes // 8) for index in range(8)]
    data, fsdp, tensor = mesh
    placed = sharding.make_mesh(data, fsdp, tensor, devices)
    found = []
    for process in range(processes):
        monkeypatch.setattr(sharding.jax, "process_index", lambda process=process: process)
        found.append(sharding.process_share(placed))
    assert found == [(part, max(share) + 1) for part in share]


def test_tensor_axis_across_part_of_a_process():
    devices = [Device(index, index // 3) for index in range(6)]
    with pytest.raises(UserError, match="tensor=2 cuts across processes"):
        sharding.process_share(sharding.make_mesh(1, 3, 2, devices=devices))


def test_slices_are_the_outermost_part_of_data():
    """Two slices of four devices: fsdp and tensor stay inside one."""
    devices = [Device(index, index // 2, slice_index=index // 4) for index in range(8)]
    mesh = sharding.make_mesh(4, 1, 2, devices=devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slices[:, 0, 0], [0, 0, 1, 1])
    assert (slices == slices[:, :1, :1]).all()
    with pytest.raises(
        UserError, match=r"data=1 but these devices are 2 slices: set --config.mesh.data to a multiple of 2"
    ):
        sharding.make_mesh(1, 8, 1, devices=devices)
