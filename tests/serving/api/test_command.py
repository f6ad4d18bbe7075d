"""Both commands over a bundle of a real model: what they answer is what the engine writes."""

import csv
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest

from rad_jax import prompts
from rad_jax.serving.engine import Request

ROOT = Path(__file__).resolve().parents[3]


def expected(engine, film, indication):
    request = Request(film, prompts.question(indication), max_new_tokens=12)
    return "".join(piece.text for piece in engine.submit(request)).strip()


@pytest.mark.slow
def test_a_bundle_served_and_in_batch(bundle, engine, tmp_path, made):
    example, folder = bundle("dinov2")
    studies = [(film, (reason or "").replace("\n", " ") or None) for film, reason in example.studies]
    loaded = engine("dinov2")
    texts = [expected(loaded, film, reason) for film, reason in studies]
    assert len(set(texts)) == len(texts)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "launch.serve", str(folder), "--device=cpu", f"--port={port}"]
    with open(tmp_path / "errors", "wb") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            try:
                httpx.get(f"{url}/readyz")
                break
            except httpx.TransportError:
                time.sleep(0.2)
        for (film, reason), text in zip(studies, texts, strict=True):
            fields = {"max_new_tokens": "12", **({"indication": reason} if reason else {})}
            answer = httpx.post(f"{url}/v1/findings", files={"file": made.png(film)}, data=fields, timeout=60)
            assert answer.json()["findings"] == text
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0, (tmp_path / "errors").read_text()
    assert out.startswith("memory plan") and out.count("POST /v1/findings 200") == len(studies)

    with open(tmp_path / "in.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "indication"])
        for number, (film, reason) in enumerate(studies):
            (tmp_path / f"{number}.png").write_bytes(made.png(film))
            writer.writerow([f"{number}.png", reason or ""])
        writer.writerow(["missing.png", ""])
    command = [sys.executable, "-m", "rad_jax.serving", str(folder), "--device=cpu", "--max_new_tokens=12"]
    command += ["--batch", str(tmp_path / "in.csv"), str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "findings for 3 films. 1 have none" in done.stdout, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["findings"] for row in rows] == texts
