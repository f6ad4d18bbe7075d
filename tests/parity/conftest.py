"""What the parity tests share: torch models with random weights, their tensors by the names on disk, and the table of differences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rad_jax.interop.tables import flatten

FORWARD = 1e-5  # float32 rounding of two different summation orders, at activations of size 1 to 10
GRADIENT = 1e-4  # the same through the backward pass, relative


class Parity:
    """Compares, and keeps a row for the table that is printed at the end of the run."""

    def __init__(self, node: pytest.Item):
        self._node = node

    def forward(self, what: str, against: str, ours: Any, theirs: Any, tolerance: float = FORWARD) -> None:
        """Largest absolute difference, over arrays of the same shape."""
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        self._row(what, against, float(np.abs(ours - theirs).max()), tolerance, "absolute")

    def gradients(self, what: str, against: str, ours: Any, theirs: Any, tolerance: float = GRADIENT) -> None:
        """Largest difference of each leaf relative to its largest entry, or to a hundredth of the largest gradient anywhere.

        The floor is for gradients that are zero but for rounding, such as the key bias's (a softmax does not see a constant).
        """
        mine, other = flatten(ours), flatten(theirs)
        assert mine.keys() == other.keys()
        floor = 1e-2 * max(np.abs(g).max() for g in other.values())
        assert floor > 0
        worst = max(np.abs(mine[path] - g).max() / max(np.abs(g).max(), floor) for path, g in other.items())
        self._row(what, against, float(worst), tolerance, "relative")

    def equal(self, what: str, against: str, ours: Any, theirs: Any) -> None:
        """Equal lists of ids."""
        self._row(what, against, float(list(ours) != list(theirs)), 0.0, "ids equal")

    def _row(self, what: str, against: str, difference: float, tolerance: float, kind: str) -> None:
        self._node.user_properties.append(("parity", [what, against, difference, tolerance, kind]))
        assert difference <= tolerance, f"{what} against {against}: {difference:.2e} is over {tolerance:.0e} ({kind})"


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    return Parity(request.node)


@pytest.fixture
def randomised() -> Callable[..., Any]:
    """Random weights everywhere, norms, biases and gains included, so that no term can be left out unseen."""

    def fill(model: Any, seed: int = 0) -> Any:
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim < 2:
                    parameter.add_(0.2 * noise)
                else:
                    parameter.copy_(noise / parameter[0].numel() ** 0.5)
        return model.eval()

    return fill


@pytest.fixture
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, np.ndarray]]:
    """A transformers model's tensors by the names it gives them in a file; with `gradients`, their gradients instead."""

    def tensors(model: Any, gradients: bool = False) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        weights = {name: parameter.data for name, parameter in model.named_parameters()}
        if gradients:
            for parameter in model.parameters():
                parameter.data = parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        return load_file(folder / "model.safetensors")

    return tensors


def state(model: Any, gradients: bool = False) -> dict[str, np.ndarray]:
    """A torch module's parameters, or their gradients, by name."""
    return {n: (p.grad if gradients else p.detach()).numpy().copy() for n, p in model.named_parameters()}


@pytest.fixture(name="state")
def state_fixture() -> Callable[..., dict[str, np.ndarray]]:
    return state


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "parity"]
    if not rows:
        return
    terminalreporter.section("parity")
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    terminalreporter.line(f"{'what':{widths[0]}}  {'against':{widths[1]}}  difference  tolerance")
    for what, against, difference, tolerance, kind in rows:
        verdict = "" if difference <= tolerance else "  OVER"
        terminalreporter.line(
            f"{what:{widths[0]}}  {against:{widths[1]}}  {difference:10.1e}  {tolerance:9.0e}  {kind}{verdict}"
        )
