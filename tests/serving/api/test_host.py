"""What a host is given to run the server: the systemd unit and the image."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rad_jax.serving import command

ROOT = Path(__file__).resolve().parents[3]
HOST = ROOT / "launch" / "serving_host"
UNIT = (HOST / "rad-jax.service").read_text(encoding="utf-8")


def test_the_unit_starts_the_command_with_flags_that_it_has():
    started = re.search(r"^ExecStart=(.+\\\n)*.+$", UNIT, re.MULTILINE)
    assert started is not None and "-m rad_jax.serving" in started[0]
    flags = re.findall(r"--(\w+)=", started[0])
    assert {"device", "tokens", "audit"} == set(flags) <= {option.name for option in command.OPTIONS}
    assert "--device=cuda " in started[0]  # and not auto, which takes the CPU where no card is seen
    devices = re.findall(r"^DeviceAllow=(.+)$", UNIT, re.MULTILINE)
    assert devices == [f"char-{name} rw" for name in ("nvidia", "nvidia-frontend", "nvidia-uvm")]


def test_the_unit_waits_longer_than_a_request_may_take():
    longest = next(option.default for option in command.OPTIONS if option.name == "timeout")
    stop = re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert stop is not None and int(stop[1]) > longest
    # And the decoders are not ended before the server has its film of them.
    assert re.search(r"^KillMode=mixed$", UNIT, re.MULTILINE)


def test_the_unit_is_one_that_systemd_takes_and_calls_safe(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    here = tmp_path / "rad-jax.service"
    here.write_text(UNIT.replace("/opt/rad-jax/venv/bin/python", "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True)
    assert "rad-jax.service:" not in checked.stderr, checked.stderr
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(here)], capture_output=True, text=True
    )
    exposure = re.search(r"Overall exposure level for rad-jax\.service: ([\d.]+)", judged.stdout)
    assert exposure is not None and float(exposure[1]) < 2, judged.stdout + judged.stderr


def instructions(text):
    """The stages of a Dockerfile, each a list of (instruction, its arguments)."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    found = [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]
    stages: list[list[tuple[str, str]]] = []
    for one in found:
        if one[0] == "FROM":
            stages.append([])
        if stages:  # before the first there may be ARG
            stages[-1].append(one)
    return stages


@pytest.fixture(scope="module")
def image():
    return instructions((HOST / "Dockerfile").read_text(encoding="utf-8"))


def test_the_image_is_made_of_the_lock_and_runs_as_an_ordinary_user(image):
    build, last = image
    runs = [arguments for kind, arguments in build if kind == "RUN"]
    assert len(runs) == 2 and "-r requirements-serve.txt" in runs[0] and runs[1].endswith(" --no-deps .")
    lock = (ROOT / "requirements-serve.txt").read_text(encoding="utf-8")
    pins = [line for line in lock.splitlines() if line and not line.startswith(("#", " ", "-"))]
    assert len(pins) > 20 and all(re.match(r"[\w.\[\]-]+(==| @ )\S+", pin) for pin in pins)
    kinds = [kind for kind, _ in last if kind != "ARG"]
    assert kinds == [
        "FROM",
        "RUN",
        "COPY",
        "ENV",
        "USER",
        "STOPSIGNAL",
        "ENTRYPOINT",
    ]  # nothing is run, or copied, after USER
    said = dict(last)
    assert int(said["USER"]) >= 1000 and re.fullmatch(
        rf"useradd --uid={said['USER']} --no-create-home --shell=/usr/sbin/nologin \w+", said["RUN"]
    )
    assert said["COPY"] == "--from=build /venv /venv" and said["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(said["ENTRYPOINT"]) == ["/venv/bin/python", "-m", "rad_jax.serving", "/bundle"]
    assert said["FROM"] == build[0][1].removesuffix(" AS build")  # the environment is of this Python, and at this place


def test_what_the_image_copies_is_all_that_its_package_is_built_of(image, tmp_path):
    """The second RUN of the build, without its installer: what comes out holds the page and answers to the entry point."""
    context, built = tmp_path / "build", tmp_path / "built"
    context.mkdir()
    for kind, arguments in image[0]:
        if kind == "COPY":
            *names, target = arguments.split()
            for name in names:
                assert (ROOT / name).exists(), name
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, context / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, context / target)
    make = [sys.executable, "setup.py", "-q", "build", f"--build-lib={built}", f"--build-temp={tmp_path / 'temp'}"]
    done = subprocess.run(make, cwd=context, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (built / "rad_jax/serving/page.html").is_file()
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import runpy; runpy.run_module('rad_jax.serving', run_name='__main__', alter_sys=True)"
    started = [sys.executable, "-I", "-c", code, str(built), "--help"]
    done = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "BUNDLE" in done.stdout, done.stderr
