"""What looks after a run: the lock, the clock, skipped steps, spikes, slow data, standstill, and how SIGTERM is taken."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rad_jax import distributed, goodput, guards, metrics
from rad_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_second_job_on_a_folder_is_refused(tmp_path):
    with guards.lock(tmp_path):
        assert guards.holder(tmp_path) == f"process {os.getpid()} on {os.uname().nodename}"
        with (
            pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*: wait for it to end, or give"),
            guards.lock(tmp_path),
        ):
            pass
    assert guards.holder(tmp_path) is None
    with guards.lock(tmp_path):  # free again
        pass


def test_lock_of_a_killed_process_is_free(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from rad_jax import guards
with guards.lock(Path({str(tmp_path)!r})):
    print("held", flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert guards.holder(tmp_path) == f"process {process.pid} on {os.uname().nodename}"
        process.kill()
        process.wait()
    assert guards.holder(tmp_path) is None


def test_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(guards.fcntl, "flock", refuse)
    with guards.lock(tmp_path):
        pass
    assert "files cannot be locked here (No locks available); see that no other job" in capsys.readouterr().err


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """As on a bucket that several machines have mounted: no locks. Gives the list whose first is this machine's name, which may change."""

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    host = ["one"]
    monkeypatch.setattr(guards.fcntl, "flock", refuse)
    monkeypatch.setattr(guards.socket, "gethostname", lambda: host[0])
    monkeypatch.setattr(guards, "_BEAT_SECONDS", 0.02)
    return host


def test_job_on_another_machine_is_refused_by_its_signs_of_life(elsewhere, tmp_path, capsys):
    with guards.lock(tmp_path):
        first = json.loads((tmp_path / "lock").read_text())
        assert first.keys() == {"host", "pid", "since", "time"} and first["host"] == "one"
        elsewhere[0] = "two"
        assert guards.holder(tmp_path) == f"process {os.getpid()} on one"
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on one: wait"), guards.lock(tmp_path):
            pass
        assert json.loads((tmp_path / "lock").read_text())["time"] > first["time"]
        assert "has not let go of" in capsys.readouterr().err
    assert guards.holder(tmp_path) is None
    with guards.lock(tmp_path):  # at once
        assert "waiting" not in capsys.readouterr().err


def test_machine_that_was_taken_away_lets_go_in_a_while(elsewhere, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guards, "_SILENT_SECONDS", 0.5)
    gone = {"host": "two", "pid": 17, "since": time.time() - 99}
    (tmp_path / "lock").write_text(json.dumps({**gone, "time": time.time()}) + "\n")
    assert guards.holder(tmp_path) == "process 17 on two"
    began = time.monotonic()
    with guards.lock(tmp_path):
        assert time.monotonic() - began > 0.4
        assert "process 17 on two has not let go of" in capsys.readouterr().err
        assert json.loads((tmp_path / "lock").read_text())["host"] == "one"
    # Long ago, and by a version that gave no signs: free at once.
    for old in ({**gone, "time": time.time() - 3600}, gone):
        (tmp_path / "lock").write_text(json.dumps(old) + "\n")
        assert guards.holder(tmp_path) is None
        with guards.lock(tmp_path):
            assert "has not let go" not in capsys.readouterr().err


def test_process_that_ends_in_the_middle_lets_go(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed.os, "_exit", lambda _: None)
    end: Any = distributed.exit_now
    with guards.lock(tmp_path):
        assert guards.holder(tmp_path) is not None
        end(distributed.RESTART)
        assert guards.holder(tmp_path) is None and (tmp_path / "lock").read_text() == ""


def test_second_writer_is_said(elsewhere, tmp_path, capsys):
    """Two that began in the same moment."""
    with guards.lock(tmp_path):
        other = {"host": "two", "pid": 17, "since": 0.0, "time": time.time()}
        for _ in range(500):
            (tmp_path / "lock").write_text(json.dumps(other))
            time.sleep(0.01)
            if "process 17 on two writes to" in capsys.readouterr().err:
                break
        else:
            pytest.fail("it is not said")


@pytest.mark.parametrize(("wrong", "said"), [(0, ""), (3600, "3600 s ahead of"), (-60, "60 s behind")])
def test_clock_that_is_not_the_folders(tmp_path, monkeypatch, capsys, wrong, said):
    now = time.time
    monkeypatch.setattr(guards.time, "time", lambda: now() + wrong)
    guards.check_clock(tmp_path)
    err = capsys.readouterr().err
    assert said in err and bool(said) == bool(err)
    assert list(tmp_path.iterdir()) == []


def test_skipped_steps_are_listed_and_end_a_run(tmp_path, capsys):
    skips = guards.Skips(tmp_path, lambda rows: [f"film{row}" for row in rows], before=2)
    for step in range(1, guards.SKIPS):
        skips.see(step, float("nan"), 1.0, True, lambda: [7, 8])
    skips.see(guards.SKIPS, 1.0, 1.0, False, list)  # one that is not skipped ends the row
    for step in range(10, 9 + guards.SKIPS):
        skips.see(step, 2.0, float("inf"), True, lambda: [9])
    with pytest.raises(UserError, match=r"the loss is 2.0 at step 20: lower optimizer.peak_lr, or look at .* 5 steps"):
        skips.see(20, 2.0, float("inf"), True, lambda: [9])
    assert skips.total == 2 + 2 * guards.SKIPS - 1
    rows = metrics.lines(tmp_path / "skipped.jsonl")
    assert rows[0] == {"step": 1, "loss": "nan", "grad_norm": "1.0", "rows": [7, 8], "ids": ["film7", "film8"]}
    assert len(rows) == 2 * guards.SKIPS - 1
    assert "note: step 1 is skipped: its loss is nan and its gradient's norm 1.0" in capsys.readouterr().err


def test_bad_rows_are_listed_once_and_too_many_end_a_run(tmp_path):
    def names(rows):
        return [f"film{row}" for row in rows]

    bad = guards.BadRows(tmp_path, names, limit=0.002)
    bad.see(1, 100, 0, lambda: pytest.fail("asked without need"))
    bad.see(2, 100, 2, lambda: [7, 3])  # one in a hundred, but of too few rows to judge
    with (tmp_path / "bad_rows.jsonl").open("a") as file:
        file.write('{"step": 5, "ro')  # of a line that a full disk, or a kill, has cut
    again = guards.BadRows(tmp_path, names, limit=0.002)  # the run starts again
    again.see(9, 1500, 3, lambda: [7, 11, 7])
    listed = [{"step": 2, "row": 3, "id": "film3"}, {"step": 2, "row": 7, "id": "film7"}]
    assert metrics.lines(tmp_path / "bad_rows.jsonl") == [*listed, {"step": 9, "row": 11, "id": "film11"}]
    with pytest.raises(UserError, match=r"4 of 1600 rows up to step 10 could not .* more than --bad_rows=0.002 allows"):
        again.see(10, 100, 1, lambda: [3])
    assert again.total == 4


def test_spikes_are_said_and_listed_and_usual_noise_is_not(tmp_path, capsys):
    def names(rows):
        return [f"film{row}" for row in rows]

    spikes = guards.Spikes(tmp_path, names)
    losses = [2.0 + 0.05 * ((7 * step) % 11 - 5) for step in range(60)]
    assert not any(spikes.see(step, loss, lambda: pytest.fail("asked")) for step, loss in enumerate(losses))
    assert spikes.see(61, 9.0, lambda: [7, 8])
    assert "the loss jumps to 9.0000 at step 61; the median of the last 60 is 2.0000" in capsys.readouterr().err
    (row,) = metrics.lines(tmp_path / "spikes.jsonl")
    assert row == {"step": 61, "loss": 9.0, "median": 2.0, "rows": [7, 8], "ids": ["film7", "film8"]}
    # Started again from step 70 it still counts; from step 50, step 61 is still to come.
    assert [guards.Spikes(tmp_path, names, before).total for before in (70, 50)] == [1, 0]


def test_slow_data_is_said_once_each_time(capsys):
    slow = guards.SlowData()
    for share in (0.1, 0.5, 0.6, 0.0, 0.3):
        slow.see(share)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of ")[0] for line in lines] == ["note: 50%", "note: 30%"]
    assert "raise --config.data.num_threads" in lines[0]


def test_slow_data_of_another_process_is_said_by_itself(capsys, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "process_index", lambda: 3)
    guards.SlowData().see(0.5)
    assert capsys.readouterr().err.startswith("note: 50% of the time of process 3 is waiting for data: ")


def test_standstill_is_said_with_stacks_and_ends_the_process(tmp_path):
    ended = threading.Event()
    status: list[int] = []

    def end(found: int) -> None:
        status.append(found)
        ended.set()

    with (tmp_path / "said").open("w+") as file:
        watchdog = guards.Watchdog(0.2, lambda: "waiting for data", end, file)
        for _ in range(5):
            time.sleep(0.05)
            watchdog.beat()
        assert not ended.is_set()
        assert ended.wait(10)
        watchdog.close()
        file.seek(0)
        text = file.read()
    assert status == [distributed.RESTART]
    assert "while waiting for data; all threads:\n" in text
    assert "test_standstill_is_said_with_stacks" in text  # the stack of this test
    assert text.count("note: nothing has moved") == 1
    assert "while waiting for data: ending, start again." in text.splitlines()[-1]


def test_compile_that_takes_long_is_said_and_goes_on(tmp_path):
    ended: list[int] = []
    with (tmp_path / "said").open("w+") as file:
        watchdog = guards.Watchdog(0.1, lambda: "compiling", ended.append, file)
        with watchdog.patient():
            time.sleep(0.6)
        watchdog.close()
        file.seek(0)
        text = file.read()
    assert ended == []
    assert text.count("note: nothing has moved") == 1 and "error: " not in text


def test_phases_add_up_and_tell_what_is_done():
    now = iter(range(100))
    phases = goodput.Phases(clock=lambda: next(now))
    moved = []
    phases.moved = lambda: moved.append(phases.doing())
    with phases("save"):
        assert phases.doing() == "saving"
        with phases("compile"):
            pass
    with phases("data"):
        pass
    phases.forgive("data")
    seconds = phases.seconds()
    assert seconds == {"start": 0, "compile": 1, "learn": 4, "data": 0, "save": 2, "evaluate": 0}
    assert phases.goodput() == pytest.approx(5 / 8)  # another second has passed
    assert moved == ["saving", "compiling", "saving", "computing steps", "waiting for data", "computing steps"]


WAITS = """
import hashlib, sys, time
from rad_jax import distributed

stop = distributed.Stop()
stop.listen()
kind = sys.argv[1]
with stop.at_once(lambda: print("before", flush=True)):
    if kind == "at once":
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as a compile: no Python runs in this thread meanwhile
print("ready", flush=True)
while not stop.reached():
    time.sleep(0.01)
print("reached", flush=True)
with stop.at_once():
    pass
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def told_to_stop(process):
    """SIGTERM once the process says that it is ready: what it wrote after that."""
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=30)
    finally:
        process.kill()


@pytest.mark.parametrize(("kind", "said"), [("at once", ["before"]), ("later", ["reached"])])
def test_sigterm_of_a_process_alone(kind, said):
    """Where nothing would be lost it ends right there, even out of a long call; elsewhere it is asked for."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITS, kind], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, err = told_to_stop(process)
    assert process.returncode == distributed.RESTART, err
    assert out.split("\n")[:-1] == said
    assert err == "told to stop (SIGTERM): start again to go on.\n"


def test_sigterm_before_a_process_listens(tmp_path):
    """While launch.train reads its flags, before anything heavy is imported."""
    (tmp_path / "config.py").write_text("print('ready', flush=True)\nimport time\ntime.sleep(100)\n")
    arguments = [f"--config={tmp_path}/config.py", f"--data={tmp_path}", f"--workdir={tmp_path}/run"]
    with subprocess.Popen(
        [sys.executable, "-m", "launch.train", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        _, err = told_to_stop(process)
    assert (process.returncode, err) == (distributed.RESTART, "told to stop (SIGTERM): start again to go on.\n")
    assert not (tmp_path / "run").exists()


def test_sigterm_while_a_process_waits_for_its_job(tmp_path):
    """The first of two processes, whose other one never comes: it waits in C++, and JAX does not listen yet."""
    port = free_port()
    arguments = ["--config=configs/phantom.py:lm", f"--data={tmp_path}", f"--workdir={tmp_path}/run", "--multihost"]
    job = [f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=0"]
    with subprocess.Popen(
        [sys.executable, "-m", "launch.train", *arguments, *job], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while process.poll() is None:
                with socket.socket() as asking:
                    if asking.connect_ex(("localhost", port)) == 0:
                        break
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == distributed.RESTART, err
    assert err.endswith("told to stop (SIGTERM): start again to go on.\n")
    assert not (tmp_path / "run").exists()


JOINED = """
import time
from absl import flags
from rad_jax import distributed

distributed.define_flags()
flags.FLAGS(["job", "--multihost", "--coordinator=localhost:PORT", "--num_processes=1", "--process_id=0"])
distributed.before_listening()
distributed.join()
stop = distributed.Stop()
stop.listen()
time.sleep(3)  # JAX listens in a thread of its own
print("ready", flush=True)
while not stop.reached():
    time.sleep(0.01)
print("reached", flush=True)
"""


def test_of_a_job_jax_hears_sigterm_and_the_early_handler_does_not():
    code = JOINED.replace("PORT", str(free_port()))
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, err = told_to_stop(process)
    assert (process.returncode, out) == (0, "reached\n"), err
    assert "told to stop" not in err


def test_what_belongs_to_the_end_is_done_when_a_process_ends_in_the_middle(monkeypatch):
    done: list[Any] = []
    end: Any = distributed.exit_now
    monkeypatch.setattr(distributed.os, "_exit", done.append)
    with distributed.at_exit(lambda: done.append("inner")):
        end(3)
        assert done == ["inner", 3]
    assert done == ["inner", 3, "inner"]
    end(4)
    assert done[3:] == [4]


def test_writers_that_are_not_installed(tmp_path, monkeypatch):
    for name in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install tensorboardX, or leave it out"):
        metrics.tensorboard(tmp_path)
    with pytest.raises(UserError, match="pip install wandb, or leave it out"):
        metrics.wandb(tmp_path, "project")


def test_messages_stand_beside_a_bar(capsys):
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        guards.say("something.")
    assert stream.getvalue() == "note: something.\n"
