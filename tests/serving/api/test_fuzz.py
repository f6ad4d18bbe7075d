"""Requests that nobody would write, and films that are damaged in many ways."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import httpx2 as httpx
import pytest

SCRIPTS = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"serving_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_mutated_films_never_break_the_server(plain):
    fuzz = script("fuzz")
    films = list(fuzz.mutants(fuzz.seeds(None), 150, seed=1))
    total = fuzz.send(plain.url, films, workers=4)
    assert sum(total.values()) == 150
    # Good and bad ones on every route; and nothing else.
    assert set(total) == {f"{route} {status}" for route in ("film", "findings", "chat") for status in (200, 400)}, total
    assert httpx.get(f"{plain.url}/readyz").status_code == 200


def test_growth_is_that_of_the_whole_family_after_warming_up():
    fuzz, load = script("fuzz"), script("load")
    assert fuzz.grown({1: 100, 2: 100}, {1: 104, 3: 116}, 1) == pytest.approx((0.04, 0.10))
    assert load.growth([1, 50, 90, 100, 101, 100, 100, 99, 100]) == 0
    assert load.growth([100.0] * 6 + [110.0] * 3) == pytest.approx(0.1)
    child = subprocess.Popen(
        [sys.executable, "-c", "x = b'x' * (30 << 20); print(flush=True); input()"], stdin=-1, stdout=-1
    )
    try:
        assert child.stdout is not None and child.stdout.readline()
        found = fuzz.resident(os.getpid())
        assert found[child.pid] > 30 << 20 and found[os.getpid()] > 0
        assert load.anonymous(os.getpid()) > (found[os.getpid()] + (30 << 20)) / 2**20 * 0.9
    finally:
        child.kill()
        child.communicate()


@pytest.mark.slow
def test_schemathesis_finds_no_crash(plain):
    """A fixed run over the OpenAPI document: generated requests, valid and not, must get documented answers and never a 500."""
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{plain.url}/openapi.json"]
    command += [
        "--seed=1",
        "--generation-deterministic",
        "--max-examples=25",
        "--workers=1",
        "--phases=examples,coverage,fuzzing",
    ]
    command += [
        "--checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--no-color",
    ]
    environment = {**os.environ, "HYPOTHESIS_DATABASE_FILE": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd="/")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"(\d{3,}) generated, \1 passed", done.stdout)


@pytest.mark.slow
def test_many_clients_for_ten_seconds(serve, made, tmp_path):
    served = serve({"slots": 4, "queue": 24, "seconds": 0.001})
    films = []
    for number in range(4):
        films.append(tmp_path / f"{number}.png")
        films[-1].write_bytes(made.png(made.grey(70 * number)))
    arguments = [served.url, str(os.getpid()), *map(str, films), "--clients=64", "--seconds=10", "--patience=60"]
    # This process also holds the tests, and warms up for all of ten seconds.
    arguments.append("--growth=0.2")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "load.py"), *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'wrong': 0, 'failed': 0, 'hung': 0" in done.stdout and "after warming up" in done.stdout
    assert served.idle()
