"""In a process of a job: writes down which rows each step learns from, for tests that compare them."""

import json
from pathlib import Path
from typing import Any

from rad_jax.runlog import RunLog


def rows_of_steps(file: Path) -> None:
    """Has every run of this process add a line {"step", "rows"} to `file` for each step: this process's rows, by number."""
    take, add = RunLog.fetch, RunLog.add
    rows: list[int] = []

    def fetch(self: RunLog, batches: Any) -> Any:
        batch = take(self, batches)
        rows[:] = batch["index"].tolist()
        return batch

    def added(self: RunLog, step: int, numbers: Any, batch: Any) -> None:
        with file.open("a") as opened:
            opened.write(json.dumps({"step": step, "rows": rows}) + "\n")
        add(self, step, numbers, batch)

    RunLog.fetch, RunLog.add = fetch, added  # type: ignore[method-assign]
