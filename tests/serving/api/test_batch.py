"""Findings for a list, killed and begun again."""

import csv
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rad_jax.errors import UserError
from rad_jax.serving import audit, batch
from rad_jax.serving.films import Films

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def films(tmp_path, made):
    """Twelve films with different answers, one that is none, and one that is missing; a list of them."""
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(made.png(made.grey(20 * number)))
    (tmp_path / "broken.png").write_bytes(made.png(made.grey())[:40])
    (tmp_path / "film.dcm").write_bytes(made.dicom())
    return tmp_path


def listed(folder, images, **columns):
    with open(folder / "in.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["image", *columns])
        writer.writeheader()
        for number, image in enumerate(images):
            writer.writerow({"image": image, **{name: values[number] for name, values in columns.items()}})
    return folder / "in.csv"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(engine, source, out, **changes):
    return batch.run(engine, source, out, **{"dicom": "mimic_cxr_jpg", "max_new_tokens": 256, **changes})


def test_a_list(scripted, films, made):
    engine, _ = scripted()
    source = listed(films, [f"{n}.png" for n in range(12)] + ["film.dcm"], indication=["Cough."] * 12 + [""])
    assert run(engine, source, films / "out.jsonl") == (13, 0)
    found = lines(films / "out.jsonl")
    assert [row["id"] for row in found] == [str(n) for n in range(1, 14)]
    assert [row["findings"] for row in found[:12]] == [made.said(made.grey(20 * n)) for n in range(12)]
    assert found[12]["warnings"] == ["not_for_clinical_use", "dicom_equalised"]
    assert {row["bundle"] for row in found} == {"ab" * 32} and not (films / "out.bad.jsonl").exists()
    before = (films / "out.jsonl").read_bytes()
    assert run(engine, source, films / "out.jsonl") == (13, 0)
    assert (films / "out.jsonl").read_bytes() == before


def test_bad_rows_are_listed_and_tried_again(scripted, films, made):
    engine, _ = scripted()
    images = ["0.png", "broken.png", "missing.png", "../nothing", "1.png", "2.png"]
    source = listed(films, images, id=list("abcdef"), indication=["", "", "", "", "", "x" * 1001])
    assert run(engine, source, films / "out.jsonl") == (2, 4)
    assert [row["id"] for row in lines(films / "out.jsonl")] == ["a", "e"]
    bad = {row["id"]: row["error"] for row in lines(films / "out.bad.jsonl")}
    assert bad.keys() == set("bcdf")
    assert isinstance(engine.others.__self__, Films) and engine.others() == 0  # all are done
    assert "damaged" in bad["b"] and "No such file" in bad["c"] and "1000 characters" in bad["f"]
    assert (films / "out.bad.jsonl").stat().st_mode & 0o777 == 0o600  # ids and names of files may name patients
    with pytest.raises(UserError, match="other"):
        run(engine, source, films / "out.jsonl", max_new_tokens=3)
    assert {row["id"] for row in lines(films / "out.bad.jsonl")} == set("bcdf")
    (films / "missing.png").write_bytes(made.png(made.grey()))
    assert run(engine, source, films / "out.jsonl") == (3, 3)
    assert [row["id"] for row in lines(films / "out.jsonl")] == ["a", "e", "c"]
    assert {row["id"] for row in lines(films / "out.bad.jsonl")} == set("bdf")


def test_a_torn_line_is_repaired(scripted, films):
    engine, _ = scripted()
    source, out = listed(films, [f"{n}.png" for n in range(4)]), films / "out.jsonl"
    run(engine, source, out)
    whole = out.read_bytes()
    for cut in (1, 5, 40):
        out.write_bytes(whole[:-cut])
        assert run(engine, source, out) == (4, 0)
        assert out.read_bytes() == whole


def test_outputs_of_something_else_are_refused(scripted, films):
    engine, _ = scripted()
    source, out = listed(films, ["0.png", "1.png"]), films / "out.jsonl"
    run(engine, source, out)
    whole = out.read_bytes()
    for text, said in (
        (whole.replace(b"abab", b"cdcd", 1), "another model"),
        (whole.replace(b"0.png", b"9.png"), "not of this list"),
        (whole + whole, "not of this list"),
        (b'{"id": 1}\n', "not one of ours"),
        (b"[]\n", "not one of ours"),
    ):
        out.write_bytes(text)
        with pytest.raises(UserError, match=said):
            run(engine, source, out)
        assert out.read_bytes() == text
    (films / "in.csv").write_text("film\n0.png\n")
    with pytest.raises(UserError, match="no column named image"):
        run(engine, source, films / "new.jsonl")
    with pytest.raises(UserError, match="more than once"):
        run(engine, listed(films, ["0.png", "1.png"], id=["a", "a"]), films / "new.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        run(engine, films / "none.csv", films / "new.jsonl")


def test_a_list_that_is_asked_otherwise_is_refused(scripted, films):
    """Whatever changes a text may not change between the lines of a file."""
    engine, _ = scripted()
    images, out = ["0.png", "1.png", "2.png"], films / "out.jsonl"
    asked = ["COUGHMARK.", "", "Fever."]
    run(engine, listed(films, images, indication=asked), out)
    whole = out.read_bytes()
    assert len({row["asked"] for row in lines(out)}) == 3 and b"COUGHMARK" not in whole
    info = engine.info
    for changes, indication in (
        ({}, ["COUGHMARK.", "Dyspnoea.", "Fever."]),
        ({}, ["COUGHMARK.", "", ""]),
        ({"dicom": "window"}, asked),
        ({"max_new_tokens": 255}, asked),
        ({"weights": "int8"}, asked),
        ({"dtype": "bfloat16"}, asked),
    ):
        engine.info = dataclasses.replace(info, **{k: v for k, v in changes.items() if k in ("weights", "dtype")})
        given = {k: v for k, v in changes.items() if k in ("dicom", "max_new_tokens")}
        with pytest.raises(UserError, match="for another indication, or with other --dicom, --weights, --dtype or"):
            run(engine, listed(films, images, indication=indication), out, **given)
        assert out.read_bytes() == whole
    engine.info = info
    assert run(engine, listed(films, [*images, "3.png"], indication=[*asked, "New."]), out) == (4, 0)
    assert out.read_bytes().startswith(whole)


def test_each_row_is_in_the_audit_log_and_no_patient(scripted, films, made, monkeypatch):
    engine, _ = scripted()
    source = listed(films, ["0.png", "broken.png", "film.dcm"], id=["DOE^A", "DOE^B", "DOE^C"], indication=["DOE."] * 3)
    log = audit.Audit(films / "audit.jsonl", bundle="ab" * 32)
    assert run(engine, source, films / "out.jsonl", audit=log) == (2, 1)
    text = (films / "audit.jsonl").read_text()
    first, bad, last = map(json.loads, text.splitlines())
    assert "DOE" not in text and "png" not in text and "lungs" not in text
    assert first["film"] == hashlib.sha256(b"40x30:" + made.grey(0).tobytes()).hexdigest()
    assert (first["route"], first["status"], first["film_shape"], first["finish"]) == ("batch", 200, [40, 30], "stop")
    assert first["film_bytes"] == (films / "0.png").stat().st_size and first["completion_tokens"] > 1
    assert bad["status"] == 400 and "film" not in bad and last["film"] != first["film"]
    assert {line["bundle"] for line in (first, bad, last)} == {"ab" * 32}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit.os, "write", full)
    with pytest.raises(UserError, match="the audit log cannot be written"):
        run(engine, listed(films, ["1.png"]), films / "more.jsonl", audit=log)
    assert (films / "more.jsonl").read_bytes() == b""
    log.close()


def test_an_engine_that_fails_ends_the_list(scripted, films):
    engine, model = scripted()
    model.broken = True
    source = listed(films, [f"{n}.png" for n in range(12)])
    with pytest.raises(UserError, match=r"3 times in a row .* run the same command again"):
        run(engine, source, films / "out.jsonl")
    assert (films / "out.jsonl").read_bytes() == b""


def test_one_process_writes_at_a_time(scripted, films):
    engine, _ = scripted()
    source = listed(films, ["0.png"])
    with batch.opened(films / "out.jsonl"), pytest.raises(UserError, match="another process"):
        run(engine, source, films / "out.jsonl")


CODE = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("scripted", {conftest!r})
scripted = importlib.util.module_from_spec(spec)
sys.modules["scripted"] = scripted
spec.loader.exec_module(scripted)
from rad_jax.prompts import load_tokenizer
from rad_jax.serving import audit, batch
from rad_jax.serving.films import Films
from rad_jax.serving.engine import Engine
tokenizer, source, out = sys.argv[1:]
tokenizer = load_tokenizer(tokenizer)
model = scripted.ScriptedModel(tokenizer, 2, 0.002)
engine = Engine(model, tokenizer, [False] * tokenizer.vocab_size, frozenset([tokenizer.eos_id]), scripted.INFO, 4, 64, 4096)
print(batch.run(engine, pathlib.Path(source), pathlib.Path(out), dicom="window", max_new_tokens=256))
engine.close()
"""


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(films, small_tokenizer, made):
    source, out = listed(films, [f"{n % 12}.png" for n in range(60)]), films / "out.jsonl"
    code = CODE.format(conftest=str(Path(__file__).with_name("conftest.py")))

    def start():
        arguments = [sys.executable, "-c", code, str(small_tokenizer.path), str(source), str(out)]
        return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    for least in (5, 23):
        process = start()
        end = time.monotonic() + 120
        while time.monotonic() < end and (not out.exists() or out.read_bytes().count(b"\n") < least):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert least <= out.read_bytes().count(b"\n") < 60
    done = start()
    assert done.communicate(timeout=120)[0] == "(60, 0)\n"
    found = lines(out)
    assert [row["id"] for row in found] == [str(n) for n in range(1, 61)]
    assert [row["findings"] for row in found] == [made.said(made.grey(20 * (n % 12))) for n in range(60)]
