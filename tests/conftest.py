"""Set-up before any test module imports jax, and the fixture for real test data."""

import os
from pathlib import Path

import pytest

# Eight fake CPU devices, so that meshes can be tested anywhere. Without a mesh everything still runs on the first one.
DEVICES = "--xla_force_host_platform_device_count"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
# No test may reach a network: a model hub is asked for nothing, not even for its own absence.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real radiographs, reports, trained weights and golden values beside the checkout."""
    if not REAL.is_dir():
        pytest.skip(f"no real test data: {REAL} does not exist")
    return REAL
