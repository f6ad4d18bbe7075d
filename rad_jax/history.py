"""A run's past, read from its folder: all its starts, what of its time was learning, and what is left of it."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from rad_jax import checkpoint, guards, metrics

Row = dict[str, Any]
_LATEST = 20  # rows that a forecast looks back on


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run: its event, the rows it wrote, and when it gave its last sign."""

    event: Row
    rows: list[Row]
    last: float

    @property
    def seconds(self) -> float:
        return self.last - self.event["time"]


@dataclasses.dataclass(frozen=True)
class History:
    """A run as its folder tells it.

    Attributes:
        steps: that the config asks for.
        rows: of every logged step the one that counts.
        starts: in order.
        holder: who is running it now; None for nobody.
        evaluations, skipped: rows of the files of these names; best: of best.json.
        now: when this was read.
    """

    workdir: Path
    steps: int
    rows: list[Row]
    starts: list[Start]
    holder: str | None
    evaluations: list[Row]
    skipped: list[Row]
    best: Row | None
    now: float

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def state(self) -> str:
        """ "running", "finished", "stopped" (told to, or on an error), or "killed"."""
        if self.holder:
            return "running"
        if any(start.event.get("finished") for start in self.starts):
            return "finished"
        return "stopped" if self.starts and "ended" in self.starts[-1].event else "killed"

    def split(self) -> dict[str, float]:
        """Seconds since the first start: learning that counts, learning done again after a restart, and what else there was.

        "starting" is loading, restoring and compiling; "down" is between starts; "rest" is what no row tells, such as the work that a kill
        destroyed since the last one.
        """
        found = dict.fromkeys(("learning", "again", "data", "saving", "evaluating", "starting", "down", "rest"), 0.0)
        for place, start in enumerate(self.starts):
            kept = min((other.event["step"] for other in self.starts[place + 1 :]), default=self.steps)
            known = 0.0
            for number, row in enumerate(start.rows):
                work = row["steps"] * (row["step_time_s"] - row["data_wait_s"])
                share = min(max(row["step"] - kept, 0), row["steps"]) / row["steps"]
                data = row["steps"] * row["data_wait_s"]
                found["learning"] += work * (1 - share)
                found["again"] += work * share
                found["data"] += data
                found["saving"] += row["save_s"]
                found["evaluating"] += row["evaluate_s"]
                known += work + data + row["save_s"] + row["evaluate_s"]
                if not number:
                    found["starting"] += row["time"] - start.event["time"] - known
                    known = row["time"] - start.event["time"]
            found["rest"] += max(start.seconds - known, 0.0)
            if place:
                found["down"] += max(start.event["time"] - self.starts[place - 1].last, 0.0)
        return found

    @property
    def goodput(self) -> float:
        """Learning that counts, by all the time since the first start."""
        split = self.split()
        return split["learning"] / max(sum(split.values()), 1e-9)

    @property
    def chip_hours(self) -> float:
        """Devices times hours, of all starts."""
        return sum(start.event["devices"] * start.seconds for start in self.starts) / 3600

    def left(self) -> tuple[float, float]:
        """Seconds to the end at the latest rows' pace, with their saves and evaluations, and chip-hours until then; 0 and 0 without rows."""
        latest = self.rows[-_LATEST:]
        if not latest:
            return 0.0, 0.0
        steps = sum(row["steps"] for row in latest)
        took = sum(row["steps"] * row["step_time_s"] + row["save_s"] + row["evaluate_s"] for row in latest)
        seconds = (self.steps - self.step) * took / steps
        return seconds, seconds * self.starts[-1].event["devices"] / 3600


def read(workdir: Path, now: float | None = None) -> History:
    """A run's history.

    Raises:
        UserError: `workdir` is no run.
    """
    record, now = checkpoint.read_config(workdir), time.time() if now is None else now
    steps = record["config"].get("steps", 0)
    rows, holder = metrics.lines(workdir / "metrics.jsonl"), guards.holder(workdir)
    events = metrics.lines(workdir / "starts.jsonl")
    begins = [event for event in events if event["event"] == "start"]
    starts = []
    for place, event in enumerate(begins):
        until = begins[place + 1]["time"] if place + 1 < len(begins) else float("inf")
        own = [row for row in rows if event["time"] <= row.get("time", 0.0) < until]
        ends = [end for end in events if end["event"] == "end" and event["time"] <= end["time"] < until]
        last = max([event["time"], *(row["time"] for row in (*own, *ends))])
        if place + 1 == len(begins) and holder:
            last = now
        told = {"ended": True, "finished": ends[-1].get("finished", ends[-1]["step"] >= steps)} if ends else {}
        starts.append(Start({**event, **told}, own, last))
    counting: dict[int, Row] = {}
    for start in starts:
        # What a start had done after the checkpoint that this one goes on from counts no more.
        counting = {step: row for step, row in counting.items() if step <= start.event["step"]}
        counting |= {row["step"]: row for row in start.rows}
    return History(
        workdir=workdir,
        steps=steps,
        rows=list(counting.values()),
        starts=starts,
        holder=holder,
        evaluations=metrics.lines(workdir / "evaluations.jsonl"),
        skipped=metrics.lines(workdir / "skipped.jsonl"),
        best=checkpoint.read_best(workdir),
        now=now,
    )
