"""What a loop tells of its steps: collected without waiting for the device, read one step late, judged, and written as a row."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rad_jax import distributed, goodput, guards, metrics, optim, sharding, telemetry

Batch = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclasses.dataclass
class Span:
    """Some steps, still on the device: their numbers, what was counted in their batches, and the row numbers and weights of these."""

    steps: list[int] = dataclasses.field(default_factory=list)
    numbers: list[Mapping[str, jax.Array]] = dataclasses.field(default_factory=list)
    counts: list[Mapping[str, jax.Array]] = dataclasses.field(default_factory=list)
    rows: list[tuple[jax.Array, jax.Array]] = dataclasses.field(default_factory=list)


class RunLog:
    """Numbers of a run from the loop to metrics.jsonl, a progress bar, and whoever else takes rows.

    Args:
        config: the experiment; model: its shapes.
        workdir: where metrics.jsonl, skipped.jsonl and spikes.jsonl go.
        first: steps done before; updates: how many of them changed the weights.
        phases: of this process's time.
        names: ids of records by their row numbers.
        writers: get every row too, in process 0.
        bad_rows: share of the rows that may be bad.
    """

    def __init__(
        self,
        config: Any,
        model: Any,
        workdir: Path,
        first: int,
        updates: int,
        phases: goodput.Phases,
        names: Callable[[Sequence[int]], list[str]],
        writers: Sequence[Callable[[Row], None]],
        bad_rows: float,
    ):
        rate = optim.schedule(config.optimizer.peak_lr, config.steps, config.optimizer.warmup_ratio)
        # All rates at once: asked for step by step, they would queue behind the steps.
        self._rates = np.asarray(rate(np.arange(config.steps)))
        self._phases, self._writers = phases, list(writers)
        self._progress = metrics.Progress(workdir, config.steps, first, workdir.name, distributed.first())
        device = jax.devices()[0]
        self._utilisation = telemetry.Utilisation(config, model, device.device_kind, jax.device_count())
        self._skips, self._spikes, self._slow = (
            guards.Skips(workdir, names, first - updates),
            guards.Spikes(workdir, names, first),
            guards.SlowData(),
        )
        self._bad = guards.BadRows(workdir, names, bad_rows)
        self._count = jax.jit(functools.partial(count, model.image_tokens))
        self._span, self._due, self._before = Span(), Span(), phases.seconds()
        self._truncated = 0
        self._warm, self._compiled = False, telemetry.compiles()

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. Time passes as waiting for data where the device has nothing else to do by then."""
        with self._phases("data"):
            batch = next(batches)
        latest: Any = self._span.numbers[-1]["loss"] if self._span.numbers else None
        if latest is not None and not latest.is_ready():
            self._phases.forgive("data")
        return batch

    def add(self, step: int, numbers: Mapping[str, jax.Array], batch: Batch) -> None:
        """Takes a step's numbers and its global batch; does not wait for the device."""
        span = self._span
        span.steps.append(step)
        span.numbers.append(numbers)
        span.counts.append(self._count(dict(batch)))
        span.rows.append((batch["index"], batch["weight"]))
        self._progress.step()

    def due(self) -> None:
        """The steps since it was last called are to be read: by the next `read`."""
        self._due, self._span = self._span, Span()

    def read(self) -> None:
        """Waits for the steps that are due, judges each, and writes a row for them, which has the numbers of the last.

        Raises:
            UserError: too many steps were skipped one after another, or too many rows are bad.
        """
        span, self._due = self._due, Span()
        if not span.steps:
            return
        found = [{name: float(value) for name, value in step.items()} for step in jax.device_get(span.numbers)]
        counts = jax.device_get(span.counts)
        timed = self._timed(len(span.steps))
        for step, values, counted, (rows, weights) in zip(span.steps, found, counts, span.rows, strict=True):
            self._bad.see(
                step, int(counted["rows"]), int(counted["bad_rows"]), functools.partial(_weightless, rows, weights)
            )
            skipped = bool(values.pop("skipped"))
            which = functools.partial(sharding.gather, rows)
            self._skips.see(step, values["loss"], values["grad_norm"], skipped, which)
            if not skipped:
                self._spikes.see(step, values["loss"], which)
        self._slow.see(timed["data_wait_s"] / max(timed["step_time_s"], 1e-9))
        last = span.steps[-1]
        learned = {
            "step": last,
            "lr": float(self._rates[last - 1 - self._skips.total]),
            **found[-1],
            "skipped": self._skips.total,
            "spikes": self._spikes.total,
        }
        self._write(learned | timed | self._counted(counts, timed["step_time_s"] * len(span.steps)))

    @contextlib.contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """A stretch of another phase, whose compiles are no recompiles of the step."""
        before = telemetry.compiles()
        with self._phases(phase):
            yield
        self._compiled += telemetry.compiles() - before

    def close(self) -> None:
        self._progress.close()

    def _timed(self, steps: int) -> dict[str, Any]:
        """Seconds per step since the last row, and seconds beside the steps."""
        now = self._phases.seconds()
        took = {name: now[name] - self._before[name] for name in now}
        self._before = now
        if not self._warm:  # the first row ends the warm-up
            self._warm, self._compiled = True, telemetry.compiles()
        return {
            "steps": steps,
            "step_time_s": (took["learn"] + took["data"]) / steps,
            "data_wait_s": took["data"] / steps,
            "save_s": took["save"],
            "evaluate_s": took["evaluate"],
            "goodput": self._phases.goodput(),
            "time": time.time(),
        }

    def _counted(self, counts: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
        """Rates over these seconds, and what was counted so far."""
        total = {name: sum(int(found[name]) for found in counts) for name in counts[0]}
        self._truncated += total["truncated_rows"]
        peak = telemetry.hbm_peak()
        return {
            "tokens_per_s": total["tokens"] / seconds,
            **self._utilisation.row(total, seconds),
            **({} if peak is None else {"hbm_peak_gib": peak}),
            "recompiles": telemetry.compiles() - self._compiled,
            "bad_rows": self._bad.total,
            "truncated_rows": self._truncated,
        }

    def _write(self, row: Row) -> None:
        self._progress.log(row)
        if distributed.first():
            for write in list(self._writers):
                try:
                    write(row)
                except Exception as error:  # whatever another library raises; the run does not need it
                    self._writers.remove(write)
                    metrics.dropped(getattr(write, "name", "a writer of --tensorboard or --wandb"), error)


def _weightless(rows: jax.Array, weights: jax.Array) -> list[int]:
    """The row numbers of a global batch that have weight 0."""
    return [int(row) for row, weight in zip(sharding.gather(rows), sharding.gather(weights), strict=True) if not weight]


def count(image_tokens: int, batch: Batch) -> dict[str, jax.Array]:
    """Of a batch: rows, tokens without padding, those of texts and targets among them, rows without weight and rows that were cut."""
    rows, text = len(batch["length"]), batch["length"].sum()
    return {
        "rows": jnp.asarray(rows),
        "tokens": text + image_tokens * rows * ("image" in batch),
        "text": text,
        "targets": (batch["target_weights"] > 0).sum() if "target_weights" in batch else jnp.zeros((), jnp.int32),
        "bad_rows": (batch["weight"] == 0).sum(),
        "truncated_rows": batch["truncated"].sum(),
    }
