"""What a host is given to run the server: the systemd unit and the image."""

import re
import shutil
import subprocess
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
    assert {"tokens", "audit"} == set(flags) <= {option.name for option in command.OPTIONS}


def test_the_unit_waits_longer_than_a_request_may_take():
    longest = next(option.default for option in command.OPTIONS if option.name == "timeout")
    stop = re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert stop is not None and int(stop[1]) > longest


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


def test_the_image_is_made_of_the_lock_and_runs_as_an_ordinary_user():
    image = (HOST / "Dockerfile").read_text(encoding="utf-8")
    for names in re.findall(r"^COPY (?!--from)(.+) \S+$", image, re.MULTILINE):
        assert all((ROOT / name).exists() for name in names.split())
    assert "-r requirements-serve.txt" in image and "--no-deps ." in image
    last = image.rpartition("FROM ")[2]
    user = re.search(r"^USER (\d+)$", last, re.MULTILINE)
    assert user is not None and int(user[1]) >= 1000 and f"--uid={user[1]}" in last
    assert 'ENTRYPOINT ["/venv/bin/python", "-m", "rad_jax.serving", "/bundle"]' in last
