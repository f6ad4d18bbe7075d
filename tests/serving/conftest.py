"""Bundles of small random models, exported as users export theirs."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from rad_jax.interop.export import export
from rad_jax.models.llama import RopeScaling
from rad_jax.prompts import train_tokenizer
from rad_jax.serving import loading
from rad_jax.serving.engine import Engine


def _interop() -> ModuleType:
    """The fixtures of tests/interop, which make the models."""
    path = Path(__file__).parents[1] / "interop" / "conftest.py"
    spec = importlib.util.spec_from_file_location("interop_conftest", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault("interop_conftest", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


MODELS = _interop()
TOWERS: dict[str, tuple[bool, dict[str, Any], RopeScaling | None]] = {
    "dinov2": (True, {}, None),
    "vit": (False, {}, RopeScaling("linear", 2.0)),
    "clip": (False, MODELS.OTHER_TOWERS["CLIP"], RopeScaling("llama3", 4.0, original_max_positions=32)),
    "siglip": (False, MODELS.OTHER_TOWERS["SigLIP"], None),
    "wide": (True, {}, None),
}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Makes a model with a tower of this kind and its bundle in this dtype; the same ones again from the second time on."""
    import numpy as np

    made: dict[tuple[str, str], tuple[Any, Path]] = {}
    root = tmp_path_factory.mktemp("bundles")
    rng = np.random.default_rng(0)
    texts = [(None, " ".join(rng.choice(MODELS.WORDS, 9)) + ".") for _ in range(80)]
    train_tokenizer(texts, 512, root / "tokenizer.json")

    def make(kind: str = "dinov2", dtype: str = "float32") -> tuple[Any, Path]:
        if (kind, dtype) not in made:
            wide = {"width": 128, "mlp_dim": 192} if kind == "wide" else {}  # NF4 has blocks of 64
            example = MODELS.make_example(root / "tokenizer.json", *TOWERS[kind], **wide)
            folder = root / f"{kind}-{dtype}"
            export(example.exported(), "hf", folder, dtype)
            made[kind, dtype] = example, folder
        return made[kind, dtype]

    return make


@pytest.fixture
def engine(bundle: Callable[..., tuple[Any, Path]]) -> Iterator[Callable[..., Engine]]:
    """Loads the bundle of `bundle`'s arguments with `loading.load`'s; closed when the test ends."""
    engines: list[Engine] = []

    def start(kind: str = "dinov2", bundle_dtype: str = "float32", **arguments: Any) -> Engine:
        engines.append(loading.load(bundle(kind, bundle_dtype)[1], device="cpu", say=lambda _: None, **arguments))
        return engines[-1]

    yield start
    for one in engines:
        one.close(drain=False)
