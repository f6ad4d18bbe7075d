"""What the parity tests share: torch models with random weights, and their tensors by the names on disk."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


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
