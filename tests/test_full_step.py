"""What a step of a config takes here, told without weights to start from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rad_jax import metrics

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_stage_3_runs_on_random_frozen_weights(training, tmp_path):
    """With them alone: the same command of launch.train asks for a base."""
    record = repr(training.config("stage3", steps=2).to_dict())
    lines = "import ml_collections", "def get_config():", f"    return ml_collections.ConfigDict({record})"
    (tmp_path / "config.py").write_text("\n".join(lines))
    flags = f"--config={tmp_path}/config.py", f"--data={training.corpus}", f"--workdir={tmp_path}/run"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    status = {
        module: subprocess.run(
            [sys.executable, "-m", module, *flags], cwd=ROOT, env=environment, timeout=300
        ).returncode
        for module in ("launch.train", "tests.full_step")
    }
    assert status == {"launch.train": 2, "tests.full_step": 0}
    rows = metrics.lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and not any(row["skipped"] for row in rows)
    assert all(row["loss"] > 0 and row["step_time_s"] > 0 for row in rows)
