"""Fleets: what is rendered fits configs/hardware.py and passes linters, and a dry run prints every command."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import hardware
from launch import pod
from rad_jax import errors
from rad_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TPUS = [name for name in hardware.MACHINES if name.split("-")[0] in pod.GENERATIONS]
GPUS = ["a100-8", "h100-8"]
COMMAND = ("launch.train", "--config=configs/stage3.py:v5e-64", "--workdir=/mnt/rad/run with blank")


def job(where="gke", machine="v5e-64", command=COMMAND, **changes):
    given: dict[str, Any] = {
        "zone": "ZONE",
        "project": "",
        "spot": True,
        "bucket": "BUCKET",
        "mount": "/mnt/rad",
        "image": "IMAGE",
    }
    given |= {"account": "default", "cluster": "CLUSTER", "python": ".venv/bin/python", **changes}
    return pod.Job(where, "rad", pod.Machine.find(machine), tuple(command), **given)


def linter(name):
    """A linter beside this Python, or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed, but requirements-dev.txt has it")
    return found


@pytest.mark.parametrize("machine", [*TPUS, "v5e-256x4"])
def test_jobset_has_the_chips_of_the_machine(machine):
    text = pod.jobset(job(machine=machine))
    found = yaml.safe_load(text)
    (slices,) = found["spec"]["replicatedJobs"]
    spec = slices["template"]["spec"]
    inner = spec["template"]["spec"]
    (container,) = inner["containers"]
    kind, _, times = machine.partition("x")
    wanted = hardware.MACHINES[kind]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert slices["replicas"] == int(times or 1)
    assert spec["parallelism"] == spec["completions"]
    assert chips * spec["completions"] == wanted.data * wanted.fsdp * wanted.tensor
    topology = inner["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    extents = [int(n) for n in topology.split("x")]
    assert len(extents) == (2 if kind.startswith(("v5e", "v6e")) else 3)
    size = 1
    for extent in extents:
        size *= extent
    assert size == chips * spec["completions"]
    several = ["--multihost"] if spec["completions"] * slices["replicas"] > 1 else []
    assert container["command"] == ["bash", "launch/pods/run.sh", *COMMAND, *several]
    # A user's mistake (2) ends all, everything else starts all again.
    assert spec["backoffLimit"] == 0
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert found["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert inner["terminationGracePeriodSeconds"] >= 30


@pytest.mark.parametrize("spot", [True, False])
def test_jobset_is_clean_yaml(tmp_path, spot):
    file = tmp_path / "jobset.yaml"
    file.write_text(pod.jobset(job(machine="v5e-256x2", spot=spot)))
    assert ("cloud.google.com/gke-spot: " in file.read_text()) == spot
    rules = "{extends: default, rules: {line-length: {max: 140}, document-start: disable}}"
    done = subprocess.run([linter("yamllint"), "--strict", "-d", rules, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_are_clean_shell(tmp_path):
    batch = tmp_path / "job.sbatch"
    batch.write_text(pod.sbatch(job("slurm", "h100-8x4")))
    for file in (ROOT / "launch/pods/run.sh", ROOT / "launch/pods/setup.sh", batch):
        done = subprocess.run([linter("shellcheck"), str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("machine", "nodes"), [("a100-8", 1), ("h100-8", 1), ("h100-8x4", 4)])
def test_batch_script_has_a_process_per_gpu(machine, nodes):
    lines = pod.sbatch(job("slurm", machine)).splitlines()
    for line in (f"--nodes={nodes}", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--signal=TERM@60"):
        assert f"#SBATCH {line}" in lines
    (run,) = (line for line in lines if line.startswith("srun"))
    assert "'--workdir=/mnt/rad/run with blank' --multihost ||" in run


@pytest.mark.parametrize(
    ("srun", "requeued"),
    [
        ("exit 42", True),
        ("exit 143", True),
        ("exit 0", False),
        ("exit 2", False),
        ('touch "$RAD_REFUSED"; exit 134', False),
    ],
)
def test_batch_job_goes_back_into_the_queue(tmp_path, srun, requeued):
    """After a notice or a kill; not where a process has ended with 2, though the highest status is that of another one."""
    for name, text in (("srun", srun), ("scontrol", 'echo "$*" >requeued')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job").write_text(pod.sbatch(job("slurm", "h100-8")))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    subprocess.run(["bash", "job"], cwd=tmp_path, env=environment, timeout=30)
    assert (tmp_path / "requeued").exists() == requeued


def test_process_that_ends_with_2_leaves_a_file_for_the_batch_job(tmp_path, monkeypatch):
    monkeypatch.setenv("RAD_REFUSED", str(tmp_path / "refused"))
    with pytest.raises(SystemExit) as ended:
        errors.fail("the disk is full.")
    assert ended.value.code == 2 and (tmp_path / "refused").exists()


@pytest.mark.parametrize("where", ["tpu-vm", "queued"])
def test_babysit_makes_machines_again_until_the_command_is_done(where):
    """Taken away in the first run (status 255), told to restart in the second, done in the third."""
    statuses = {"run": [255, 42, 0], "describe": [1, 0, 1, 0, 0]}
    said = []

    def run(commands, dry):
        (last,) = commands[-1:]
        text = " ".join(last)
        kind = "run" if "run.sh" in text else "describe" if "READY" in text else "other"
        said.append(
            next(
                (w for w in ("run.sh", "READY", "delete", "create", "scp") if any(w in " ".join(c) for c in commands)),
                text,
            )
        )
        return statuses[kind].pop(0) if kind in statuses else 0

    assert pod.babysit(job(where), dry=False, wait=0, run=run) == 0
    made = ["READY", "delete", "create", "READY", "scp", "run.sh"]
    assert said == [*made, *made, "READY", "scp", "run.sh"]


class Fleet:
    """A fleet that answers by a script: statuses of creates, of describes (0: ready) and of questions whether it is lost (0: it is)."""

    def __init__(self, creates, ready, lost=()):
        self._left = {"create": list(creates), "READY": list(ready), "=~": list(lost)}
        self.said: list[str] = []

    def __call__(self, commands, dry):
        text = " ".join(commands[-1])
        kind = next(word for word in ("run.sh", "=~", "READY", "delete", "create", "setup.sh") if word in text)
        self.said.append(kind)
        return self._left[kind].pop(0) if kind in self._left else 0


def test_babysit_asks_again_for_a_request_that_failed(monkeypatch):
    """Queued, waits, is suspended: deleted and made again, and comes."""
    monkeypatch.setattr(pod.time, "sleep", lambda _: None)
    fleet = Fleet(creates=[0, 0], ready=[1, 1, 1, 1, 0], lost=[1, 0, 1])
    assert pod.babysit(job("queued"), dry=False, wait=0, run=fleet) == 0
    first = ["READY", "delete", "create", "READY", "=~", "READY", "=~"]
    assert fleet.said == [*first, "delete", "create", "READY", "=~", "READY", "setup.sh", "run.sh"]


@pytest.mark.parametrize(
    ("where", "state", "gone"),
    [
        *(("queued", state, True) for state in ("FAILED", "SUSPENDED", "SUSPENDING")),
        *(("queued", state, False) for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "")),
        *(("tpu-vm", "PREEMPTED", True), ("tpu-vm", "CREATING", False), ("tpu-vm", "READY", False)),
    ],
)
def test_what_will_never_be_ready(tmp_path, where, state, gone):
    """As gcloud tells it, played by a script."""
    executable(tmp_path / "gcloud", f'echo "$*" > {tmp_path}/asked\n[[ -n "{state}" ]] && echo "{state}"')
    done = subprocess.run(pod.lost(job(where)), env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (done.returncode == 0) == gone
    kind = {"queued": "queued-resources describe rad --format=value(state.state)", "tpu-vm": "tpu-vm describe rad"}
    assert kind[where] in (tmp_path / "asked").read_text()


def test_creates_that_always_fail_end(monkeypatch, capsys):
    """With waits that grow: there may be no room for a while."""
    waits: list[float] = []
    monkeypatch.setattr(pod.time, "sleep", waits.append)
    fleet = Fleet(creates=[7] * 8, ready=[1])
    assert pod.babysit(job("tpu-vm"), dry=False, wait=30, creates=8, run=fleet) == 7
    assert waits == [30, 60, 120, 240, 480, 600, 600]
    assert fleet.said == ["READY", *["delete", "create"] * 8]
    assert "error: 8 creates in a row gave no machines" in capsys.readouterr().err


def test_babysit_leaves_mistakes_to_people_and_gives_up():
    def ends_with(status):
        return lambda commands, dry: status if "run.sh" in " ".join(commands[-1]) else 0

    assert pod.babysit(job("tpu-vm"), dry=False, wait=0, run=ends_with(2)) == 2
    assert pod.babysit(job("tpu-vm"), dry=False, wait=0, run=ends_with(1)) == 1
    with pytest.raises(UserError, match="starts jobs again by itself: use run"):
        pod.babysit(job("gke"), dry=True, wait=0)


@pytest.mark.parametrize(
    ("where", "machine", "action", "words"),
    [
        (
            "tpu-vm",
            "v5e-64",
            "create",
            ["tpu-vm create rad", "--accelerator-type=v5litepod-64", "--spot", "--zone=ZONE"],
        ),
        ("tpu-vm", "v5p-64", "create", ["--accelerator-type=v5p-64 ", "--version=v2-alpha-tpuv5 "]),
        ("queued", "v6e-8", "create", ["queued-resources create rad", "--node-id=rad", "--accelerator-type=v6e-8 "]),
        ("queued", "v5e-64", "delete", ["queued-resources delete rad", "--force"]),
        ("tpu-vm", "v5e-64", "run", ["--worker=all", "NOTICE=gce", "run.sh launch.train", "--multihost"]),
        (
            "xpk",
            "v5e-256x2",
            "run",
            [
                "--tpu-type=v5litepod-256",
                "--num-slices=2",
                "--docker-image=IMAGE",
                "--multihost",
                "--cluster=CLUSTER",
                "--spot",
            ],
        ),
        (
            "xpk",
            "v5e-256x2",
            "setup",
            [
                "xpk storage attach rad-bucket",
                "--bucket=BUCKET",
                "--mount-point=/mnt/rad",
                "--cluster=CLUSTER",
                "--readonly=false",
            ],
        ),
        ("xpk", "v5e-256x2", "delete", ["xpk workload delete", "--workload=rad", "--cluster=CLUSTER", "--force"]),
        (
            "tpu-vm",
            "v5e-64",
            "setup",
            ["git archive", "rad.tar.gz --worker=all", "bash rad/launch/pods/setup.sh BUCKET /mnt/rad"],
        ),
        ("slurm", "h100-8", "delete", ["scancel --name=rad"]),
    ],
)
def test_commands(where, machine, action, words):
    text = "\n".join(" ".join(command) for command in pod.plan(action, job(where, machine)))
    assert [word for word in words if word not in text] == []


def test_dry_run_prints_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(pod.subprocess, "run", lambda *a, **k: pytest.fail("it ran"))
    assert pod.babysit(job("queued"), dry=True, wait=0) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = ["READY", "delete", "create", "READY", "git archive", " scp ", "setup.sh BUCKET", "run.sh"]
    assert all(word in line for word, line in zip(wanted, lines, strict=True)), lines


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pod.Machine.find("v9-8"), "--machine=v9-8 is unknown: choose cpu-1"),
        (lambda: pod.jobset(job(machine="h100-8")), "has no TPUs: use --where=slurm"),
        (lambda: pod.sbatch(job("slurm", "v5e-64")), "--where=slurm is for GPUs"),
        (lambda: pod.jobset(job(image="")), "--image is missing: --where=gke needs it"),
        (lambda: pod.plan("create", job("gke")), "--where=gke knows run, delete; its machines are made by others"),
        (lambda: pod.plan("run", job("tpu-vm", "v5e-64x2")), "several slices: use --where=gke or xpk"),
        (lambda: pod.plan("create", job("tpu-vm", zone="")), "--zone is missing"),
        (lambda: pod.plan("run", job("xpk", cluster="")), "--cluster is missing: --where=xpk needs it"),
        (lambda: pod.plan("run", job("xpk", bucket="")), "--bucket is missing: --where=xpk needs it"),
        (lambda: pod.plan("run", job("tpu-vm", command=())), "nothing to run: end the line with"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_entry_becomes_the_command(tmp_path):
    """Same process number before and after, so that SIGTERM reaches it; caches are set."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$$ $JAX_COMPILATION_CACHE_DIR $PWD $*"\n')
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "CACHE": str(tmp_path / "cache")}
    command = ["bash", str(ROOT / "launch/pods/run.sh"), "launch.train", "--a=b c"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=30)
    assert out == f"{process.pid} {tmp_path}/cache {ROOT} -u -m launch.train --a=b c\n"
    assert (tmp_path / "cache").is_dir()


def executable(file, text):
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("answer", ["TRUE", "TERMINATE_ON_HOST_MAINTENANCE"])
def test_notice_of_the_platform_becomes_sigterm(tmp_path, answer):
    """A metadata server that says so, played by another curl."""
    executable(
        tmp_path / "curl", f'[[ "$*" == *{"preempted" if answer == "TRUE" else "maintenance-event"} ]] && echo {answer}'
    )
    python = executable(tmp_path / "python", "trap 'exit 42' TERM\nfor i in {1..300}; do sleep 0.1; done")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(python), "NOTICE": "gce"}
    command = ["bash", str(ROOT / "launch/pods/run.sh"), "launch.train"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 42
    assert "note: this machine will be taken away (" in done.stderr and answer in done.stderr


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_images_are_made_from_the_locks(kind):
    """What the Dockerfiles read from the lock files is there, and they end in the one entry."""
    text = (ROOT / f"launch/pods/Dockerfile.{kind}").read_text()
    prefix = {"tpu": "libtpu==", "gpu": "nvidia-"}[kind]
    assert f"grep '^{prefix}' requirements-dev.txt" in text
    assert any(line.startswith(prefix) for line in (ROOT / "requirements-dev.txt").read_text().splitlines())
    assert any(line.startswith("jax==") for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert 'ENTRYPOINT ["bash", "launch/pods/run.sh"]' in text


def test_buckets_are_mounted_so_that_folders_can_be_renamed():
    """Orbax renames a checkpoint's folder when it is whole; gcsfuse refuses that by default."""
    limit = "rename-dir-limit=200000"
    (volume, _) = yaml.safe_load(pod.jobset(job()))["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
        "spec"
    ]["volumes"]
    assert volume["csi"]["volumeAttributes"] == {
        "bucketName": "BUCKET",
        "hostNetworkPodKSA": "true",
        "mountOptions": f"implicit-dirs,{limit}",
    }
    assert f'gcsfuse --implicit-dirs --{limit} "$bucket" "$mount"' in (ROOT / "launch/pods/setup.sh").read_text()


@pytest.mark.parametrize("bare", [True, False], ids=["bare machine", "machine that is ready"])
def test_setup_installs_what_a_machine_lacks(tmp_path, bare):
    """Every command it calls is played by one that notes how it was called."""
    checkout, bin, log = tmp_path / "rad", tmp_path / "bin", tmp_path / "log"
    (checkout / "launch/pods").mkdir(parents=True)
    bin.mkdir()
    shutil.copy(ROOT / "launch/pods/setup.sh", checkout / "launch/pods")
    (checkout / "requirements-dev.txt").write_text("libtpu==1.2\nother==3\n")
    for name in ("sudo", "apt-get", "add-apt-repository", "curl", "tee", "lsb_release", "gcsfuse", "python3.11"):
        executable(bin / name, f'echo "{name} $*" >> {log}')
    executable(bin / "sudo", 'exec "$@"')
    executable(bin / "chown", "")
    executable(bin / "lsb_release", "echo jammy")
    executable(bin / "tee", f'echo "tee $1: $(cat)" >> {log}')
    executable(bin / "mountpoint", "exit 1")
    # A virtual environment, and what apt-get brings.
    venv = f"mkdir -p .venv/bin; printf '#!/bin/bash\\necho pip $* >> {log}' > .venv/bin/pip; chmod +x .venv/bin/pip"
    executable(bin / "python3.11", f'[[ "$2" == venv ]] && {{ {venv}; }}; exit 0')
    if bare:
        (bin / "python3.11").rename(tmp_path / "python3.11")
        (bin / "gcsfuse").rename(tmp_path / "gcsfuse")
        brings = f'echo "apt-get $*" >> {log}; for name in python3.11 gcsfuse; do'
        executable(
            bin / "apt-get", f'{brings} [[ "$*" == *"install $name"* ]] && cp {tmp_path}/$name {bin}/; done; exit 0'
        )
    for name in ("bash", "mkdir", "grep", "cat", "cp", "chmod", "dirname", "id", "env"):
        (bin / name).symlink_to(shutil.which(name) or name)
    command = ["bash", str(checkout / "launch/pods/setup.sh"), "BUCKET", str(tmp_path / "mount")]
    done = subprocess.run(command, env={"PATH": str(bin)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = log.read_text()
    assert f"gcsfuse --implicit-dirs --rename-dir-limit=200000 BUCKET {tmp_path}/mount" in said
    assert "pip install --quiet --use-pep517 -r requirements.txt -r tpu.txt" in said
    assert (checkout / "tpu.txt").read_text() == "libtpu==1.2\n"
    wanted = [
        "add-apt-repository -y ppa:deadsnakes/ppa",
        "install python3.11 python3.11-venv",
        "gcsfuse-jammy main",
        "install gcsfuse",
    ]
    assert [word in said for word in wanted] == [bare] * 4


def test_process_of_an_earlier_start_is_stopped_first(tmp_path):
    """A broken connection may leave one behind on a host; one that does not listen is killed."""
    python = executable(
        tmp_path / "python",
        f"[[ $* == *first* ]] && trap 'echo stopped >> {tmp_path}/said; exit 42' TERM\n[[ $* == *stubborn* ]] && trap '' TERM\n"
        f"echo $* >> {tmp_path}/said\n[[ $* == *last* ]] && exit 0\nwhile sleep 0.1; do :; done",
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "PIDFILE": str(tmp_path / "pid"), "PATIENCE": "2"}
    started = []
    for name in ("first", "stubborn", "last"):
        command = ["bash", str(ROOT / "launch/pods/run.sh"), "launch.train", name]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        for _ in range(600):
            if (tmp_path / "said").exists() and f"launch.train {name}" in (tmp_path / "said").read_text():
                break
            time.sleep(0.05)
    try:
        texts = [process.communicate(timeout=30)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [42, -signal.SIGKILL, 0]
    assert texts[1:] == [
        f"note: process {started[place].pid} of an earlier start is still there: it is told to stop\n"
        for place in (0, 1)
    ]
    assert (tmp_path / "said").read_text().splitlines()[1] == "stopped"


def test_number_of_another_process_is_left_alone(tmp_path):
    python = executable(tmp_path / "python", "exit 0")
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "pid").write_text(f"{other.pid}\n")
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "PIDFILE": str(tmp_path / "pid")}
        command = ["bash", str(ROOT / "launch/pods/run.sh"), "launch.train"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr, other.poll()) == (0, "", None)
        other.kill()
