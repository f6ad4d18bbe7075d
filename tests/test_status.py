"""A run's history from its folder, and what launch.status makes of it."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from launch import status
from rad_jax import guards, history

ROW = {
    "lr": 1e-3,
    "grad_norm": 2.0,
    "skipped": 0,
    "recompiles": 0,
    "bad_rows": 3,
    "goodput": 0.9,
    "tokens_per_s": 1000.0,
    "tokens_per_s_per_chip": 250.0,
    "save_s": 0.0,
    "evaluate_s": 0.0,
    "data_wait_s": 0.1,
}


def row(step, time, loss, **changes):
    return {**ROW, "step": step, "time": time, "loss": loss, "steps": 10, "step_time_s": 1.1, **changes}


@pytest.fixture
def run(tmp_path):
    """100 steps asked for. First start: 30 steps, killed after a checkpoint at 20. Second, 100 s later: from 20 to 50, told to stop."""
    workdir = tmp_path / "stage3"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"format_version": 1, "config": {"steps": 100}}))
    starts = [
        {"time": 1000.0, "event": "start", "step": 0, "devices": 4},
        {"time": 1200.0, "event": "start", "step": 20, "devices": 8},
        {"time": 1260.0, "event": "end", "step": 50, "phases": {}},
    ]
    rows = [
        *(row(10, 1031.0, 5.0), row(20, 1042.0, 4.0), row(30, 1055.0, 3.5, save_s=2.0)),
        *(row(30, 1221.0, 3.5), row(40, 1232.0, 3.0), row(50, 1243.0, 2.0, lora_mfu=0.41, mfu_6n=0.62)),
    ]
    for name, lines in (("starts", starts), ("metrics", rows)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def test_time_is_split_over_all_starts(run):
    found = history.read(run, now=2000.0)
    split = found.split()
    assert sum(split.values()) == pytest.approx(1260 - 1000)
    assert split == pytest.approx(
        {
            "learning": 10 * 5,  # the steps that count, without what they waited
            "again": 10,  # steps 21 to 30 of the first start
            "data": 6,
            "saving": 2,
            "evaluating": 0,
            "starting": 20 + 10,
            "down": 1200 - 1055,
            "rest": 1260 - 1243,
        }
    )
    assert found.goodput == pytest.approx(50 / 260)
    assert found.chip_hours == pytest.approx((4 * 55 + 8 * 60) / 3600)
    assert found.left() == pytest.approx((50 * 1.1, 8 * 55 / 3600), rel=0.05)  # and a save now and then
    assert (found.state, found.step, found.steps, len(found.starts)) == ("stopped", 50, 100, 2)


def test_states(run):
    events = (run / "starts.jsonl").read_text().splitlines(keepends=True)
    (run / "starts.jsonl").write_text("".join(events[:-1]))
    assert history.read(run, now=2000.0).state == "killed"
    with guards.lock(run):
        found = history.read(run, now=1300.0)
        assert found.state == "running"
        assert found.starts[-1].last == 1300.0
        assert "running, process" in status.page(found, None) and "the last sign 57 s ago" in status.page(found, None)
    assert history.read(run, now=1300.0).state == "killed"
    # On another machine, which has the folder mounted too.
    sign = {"host": "elsewhere", "pid": 17, "since": 1200.0, "time": time.time()}
    (run / "lock").write_text(json.dumps(sign))
    assert "running, process 17 on elsewhere" in status.page(history.read(run, now=1300.0), None)
    (run / "lock").write_text(json.dumps({**sign, "time": time.time() - 1000}))
    assert history.read(run, now=1300.0).state == "killed"
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(rows + json.dumps(row(100, 1400.0, 1.0)) + "\n")
    assert history.read(run, now=2000.0).state == "killed"  # before the last step was saved and scored
    end = {"time": 1410.0, "event": "end", "step": 100, "phases": {}}
    for finished, state in ((False, "stopped"), (True, "finished")):
        lines = [*events[:-1], json.dumps({**end, "finished": finished}) + "\n"]
        (run / "starts.jsonl").write_text("".join(lines))
        found = history.read(run, now=2000.0)
        assert found.state == state
    assert "left " not in status.page(found, None)


def test_what_was_done_after_the_checkpoint_counts_no_more(run):
    """From the restart on, before its first row."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    found = history.read(run, now=2000.0)
    assert (found.step, [row["step"] for row in found.rows]) == (20, [10, 20])


def test_page_says_what_people_ask(run):
    (run / "evaluations.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "metric": "rouge_l", "value": value, "low": value - 0.1, "high": value + 0.1})
            + "\n"
            for step, value in ((20, 0.2), (40, 0.4))
        )
    )
    (run / "best.json").write_text(json.dumps({"step": 40, "metric": "rouge_l", "value": 0.4, "low": 0.3, "high": 0.5}))
    found = history.read(run, now=2000.0)
    text = status.page(found, price=2.0)
    for words in (
        "stopped at step 50: start it again with the same command to go on",
        "step        50 of 100",
        "5 to 2",  # the loss
        "best        rouge_l 0.4000 [0.3000, 0.5000] at step 40",
        "41.0% (needed FLOPs: 4 N for frozen weights), 62.0% (6 N)",
        "goodput     19.2% of 4 min 20 s in 2 starts: learning 19.2%, again 3.8%",
        "0.19 chip-hours so far",
        "0.39 so far",
        "3 rows without weight",
    ):
        assert words in text, text
    status.draw(found, run / "curves.png")
    with Image.open(run / "curves.png") as picture:
        assert picture.format == "PNG" and picture.size[1] > 1000
    assert json.loads(json.dumps(status.figures(found)))["best"]["step"] == 40


@pytest.mark.parametrize(
    ("values", "shape"), [([1.0], "▁"), ([0.0, 1.0], "▁█"), ([2.0] * 3, "▁▁▁"), (list(range(120)), "▁")]
)
def test_curve_in_a_line(values, shape):
    line = status.spark(values)
    assert line.startswith(shape) and len(line) <= 60
    assert line.rstrip()[-1] == ("█" if max(values) > min(values) else "▁")


def test_curve_with_steps_that_have_no_number():
    nothing = float("nan")
    assert status.spark([0.0, nothing, 2.0, float("inf")]) == "▁×█×"
    assert status.spark([nothing]) == "×"
    assert "×" not in status.spark([1.0] * 60 + [nothing, 1.0] * 30)  # numbers beside it are shown


def test_run_that_has_not_logged_yet(run):
    (Path(run) / "metrics.jsonl").unlink()
    found = history.read(run, now=2000.0)
    assert "nothing is logged yet" in status.page(found, None)
