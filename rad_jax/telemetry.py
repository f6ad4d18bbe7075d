"""How well a run uses its machine: rates per chip, utilisation by two accountings, memory, recompiles, a profile on request."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rad_jax import chips, flops
from rad_jax.errors import UserError

# bf16 FLOP/s without sparsity by what JAX calls the device; NVIDIA's data sheets.
_GPUS = {
    "NVIDIA A100-SXM4-80GB": 3.12e14,
    "NVIDIA A100-SXM4-40GB": 3.12e14,
    "NVIDIA H100 80GB HBM3": 9.89e14,
    "NVIDIA H200": 9.89e14,
}
PEAKS = {chip.kind: chip.peak for chip in chips.CHIPS.values()} | _GPUS

_compiles = 0
_listening = False


def compiles() -> int:
    """Programs that were compiled, or taken from the cache of compiled ones, since this was first asked."""
    global _listening
    if not _listening:
        _listening = True
        jax.monitoring.register_event_duration_secs_listener(_heard)
    return _compiles


def _heard(event: str, duration_secs: float, **_: Any) -> None:
    global _compiles
    _compiles += event == "/jax/core/compile/backend_compile_duration"


def hbm_peak() -> float | None:
    """GiB that were in use at most on this process's fullest device; None where devices do not tell (CPUs)."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [size for size in found if size is not None]
    return max(known) / chips.GIB if known else None


class Utilisation:
    """FLOPs that a step's real tokens take, over what the devices could do: see `rad_jax.flops`.

    `lora_mfu` counts what is needed: 4 N for frozen weights that a gradient passes through. `mfu_6n` counts 6 N throughout, as others do.
    Rows are taken at their mean length, so attention's square counts a little less than it is.
    """

    def __init__(self, config: Any, model: Any, kind: str, devices: int):
        self._config, self._model = config, model
        self._peak, self._devices = PEAKS.get(kind), devices

    def row(self, counts: Mapping[str, int], seconds: float) -> dict[str, float]:
        """Rates of some steps; utilisation where the device's peak is known.

        Args:
            counts: rows, tokens (with images'), text and targets among them.
            seconds: that the steps took.
        """
        rates = {"tokens_per_s_per_chip": counts["tokens"] / seconds / self._devices}
        if self._peak is None or not counts["rows"]:
            return rates
        c, rows = self._config, counts["rows"]
        lengths = flops.Lengths(
            counts["text"] / rows, counts["targets"] / rows, c.data.text_length, c.data.target_length
        )
        work = flops.total(flops.training(self._model, c.trainable, lengths, c.batch_size, c.num_micro))
        per_second = rows / seconds / self._devices / self._peak
        return rates | {"lora_mfu": work.needed * per_second, "mfu_6n": work.trained * per_second}


class Profile:
    """A profiler trace of some steps under WORKDIR/profile, for TensorBoard or Perfetto.

    Args:
        steps: the first and the last, 1 being the run's first step; None for no trace.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._on = workdir / "profile", steps, False

    def before(self, step: int) -> None:
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, numbers: Any) -> None:
        if self._on and self._steps and step >= self._steps[1]:
            jax.block_until_ready(numbers)
            self.close()

    def close(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def steps_to_profile(text: str | None) -> tuple[int, int] | None:
    """Reads --profile=FIRST:LAST.

    Raises:
        UserError: it is something else.
    """
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise UserError(f"--profile={text} cannot be read: give the first and the last step, 10:12 say.")
    return int(first), int(last)
