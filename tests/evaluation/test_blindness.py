"""Scores without the image: by hand on a few reports, and the command from a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation import blindness, profiles, scoring
from evaluation.metric import Metric, mean, mean_rows
from evaluation.predictions import read_predictions

ROOT = Path(__file__).parents[2]
SETTING = scoring.Setting(range(4), "report", 400, 0)


def metric(values: list[float]) -> Metric:
    return Metric("m", "m", mean_rows(np.array(values)), mean, len(values))


def test_kept_and_lost() -> None:
    systems = {"real": [metric([1, 1, 0.5, 0.5])], "shuffled": [metric([0.5, 0.5, 0.25, 0.25])], "blank": [metric([0] * 4)]}  # fmt: skip
    shuffled, blank = blindness.panel(systems, SETTING)
    assert (shuffled["real"], shuffled["blind"], shuffled["kept"], shuffled["lost"]) == (0.75, 0.375, 0.5, 0.375)
    assert shuffled["n"] == blank["n"] == 4
    assert shuffled["signature"] == "m|unit:report|ci:percentile-400-seed0"
    # Every report keeps half: drawn together, so does every resample.
    assert shuffled["kept_ci"] == pytest.approx((0.5, 0.5))
    assert 0.25 <= shuffled["lost_ci"][0] < 0.375 < shuffled["lost_ci"][1] <= 0.5
    assert (blank["kept"], blank["kept_ci"]) == (0.0, (0.0, 0.0))
    nothing = blindness.panel({"real": systems["blank"], "blank": systems["blank"]}, SETTING)[0]
    assert nothing["kept"] is None and nothing["kept_ci"] is None
    rows = blindness.table([shuffled, blank], ["other", "m"])
    assert rows == [
        ["metric", "film", "shuffled: score; kept (95%)", "blank: score; kept (95%)"],
        ["m", "0.750", "0.375; 0.50 [0.50, 0.50]", "0.000; 0.00 [0.00, 0.00]"],
    ]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.blind", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_command_on_given_files(tmp_path: Path) -> None:
    said = {
        "real": ["Small left pleural effusion.", "Mild cardiomegaly."],
        "shuffled": ["Mild cardiomegaly.", "Small left pleural effusion."],
        "blank": ["The lungs are clear.", "The lungs are clear."],
    }
    files = []
    for name, texts in said.items():
        rows = [{"id": str(i), "query": "", "reference": said["real"][i], "prediction": t} for i, t in enumerate(texts)]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(f"--predictions={','.join(map(str, files))}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/blindness.json").read_text())
    kept = {(row["metric"], row["blinded"]): row["kept"] for row in rows}
    assert kept["rules_micro_14", "shuffled"] == kept["rules_micro_14", "blank"] == 0.0
    assert "rules_micro_14" in done.stdout and "effusion" not in done.stdout
    bad = run(f"--predictions={files[0]}", f"--out={tmp_path / 'out'}")
    assert bad.returncode != 0 and "--predictions" in bad.stderr and "Traceback" not in bad.stderr


@pytest.mark.slow
def test_command_from_a_checkpoint(chain, training, tmp_path: Path) -> None:
    arguments = [f"--checkpoint={chain / 'stage3'}", f"--data={training.corpus}", "--split=train", "--limit=4"]
    done = run(*arguments, "--batch_size=4", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "blindness.json").read_text())
    read = {way: read_predictions(tmp_path / f"{way}.jsonl").rows for way in ("real", "shuffled", "blank")}
    ids = [[row.id for row in own] for own in read.values()]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 4
    native = profiles.PROFILES["native"]
    alone = {
        way: {
            m.name: m.total()
            for m in profiles.text_metrics(native, [r.prediction for r in own], [r.reference for r in own])
        }
        for way, own in read.items()
    }
    found = {(row["metric"], row["blinded"]): row for row in rows}
    assert {"bleu_4", "rouge_l"} <= set(alone["real"])
    for name, value in alone["real"].items():
        for way in ("shuffled", "blank"):
            row = found[name, way]
            assert (row["real"], row["blind"], row["n"]) == (pytest.approx(value), pytest.approx(alone[way][name]), 4)
            assert row["lost"] == pytest.approx(value - alone[way][name])
    assert {way for _, way in found} == {"shuffled", "blank"} and len(found) == len(rows)
