"""A small LLaVA with its own tokenizer, and the bundle made of it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.interop import tables, timm_vit
from rad_jax.interop.exported import Exported
from rad_jax.lora import LoraSpec
from rad_jax.models.llama import LlamaConfig, RopeScaling
from rad_jax.models.llava import Llava, LlavaConfig
from rad_jax.models.vit import VitConfig
from rad_jax.prompts import train_tokenizer

WORDS = [
    "the",
    "lungs",
    "are",
    "clear",
    "no",
    "pleural",
    "effusion",
    "or",
    "pneumothorax",
    "heart",
    "size",
    "is",
    "normal",
    "small",
    "left",
    "right",
    "nodule",
]


@dataclasses.dataclass(frozen=True)
class Example:
    """What is exported: the whole tower inside, as a run's weights over those of its bases are."""

    variables: dict[str, Any]
    config: LlavaConfig
    tokenizer: Path
    studies: list[tuple[np.ndarray, str | None]]

    def exported(self, **changes: Any) -> Exported:
        given = {"variables": self.variables, "config": self.config, "tokenizer": self.tokenizer, **changes}
        return Exported(sources={"run": "test"}, **given)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    texts = [(None, " ".join(rng.choice(WORDS, 9)) + ".") for _ in range(80)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(texts, 512, path)
    return path


@pytest.fixture(scope="session", params=[True, False], ids=["LayerScale", "no LayerScale"])
def example(request, tokenizer_path) -> Example:
    return make_example(tokenizer_path, request.param)


# OpenAI CLIP's tower, and SigLIP's with its own statistics.
OTHER_TOWERS: dict[str, dict[str, Any]] = {
    "CLIP": {"pre_norm": True, "patch_bias": False, "activation": "quick_gelu", "eps": 1e-5},
    "SigLIP": {
        "class_token": False,
        "activation": "gelu_tanh",
        "pixel_mean": (0.5, 0.5, 0.5),
        "pixel_std": (0.5, 0.5, 0.5),
    },
}


@pytest.fixture(scope="session", params=OTHER_TOWERS)
def other_example(request, tokenizer_path) -> Example:
    """With a tower of another family, and long rows."""
    scaling = RopeScaling("llama3", 4.0, original_max_positions=32)
    return make_example(tokenizer_path, False, OTHER_TOWERS[request.param], scaling)


@pytest.fixture(scope="session")
def plain_example(tokenizer_path) -> Example:
    return make_example(tokenizer_path, False)


def make_example(
    tokenizer_path: Path,
    layer_scale: bool,
    tower_settings: Mapping[str, Any] = MappingProxyType({}),
    scaling: RopeScaling | None = None,
    **llm: Any,
) -> Example:
    vision = VitConfig(
        image_size=28,
        patch_size=7,
        width=24,
        depth=3,
        heads=4,
        mlp_dim=48,
        layer_scale=layer_scale,
        feature_layer=-2,
        **tower_settings,
    )
    config = LlavaConfig(
        LlamaConfig(
            **{"vocab_size": 512, "width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_dim": 48} | llm,
            rope_scaling=scaling,
            max_positions=256,
        ),
        vision,
        LoraSpec(rank=4, alpha=8.0, targets=("q", "o", "down")),
    )
    rng = np.random.default_rng(1)

    def drawn(path: str, shape: tuple[int, ...]) -> np.ndarray:
        offset = 1.0 if path.endswith(("scale", "ls1", "ls2")) else 0.0
        spread = 0.2
        return (offset + spread * rng.normal(size=shape)).astype(np.float32)

    def shapes(model: Any, *arguments: Any) -> Any:
        return tables.flatten(unboxed(jax.eval_shape(model.init, jax.random.key(0), *arguments)))

    images = jnp.zeros((1, 28, 28, 3))
    tokens = jnp.zeros((1, 2), jnp.int32)
    leaves = shapes(Llava(config), tokens, jnp.full((1,), 2), images, tokens)
    variables = tables.unflatten({path: drawn(path, leaf.shape) for path, leaf in leaves.items()})
    # Sharp logits, so that greedy texts do not hang on rounding.
    variables["params"]["llm"]["head"]["kernel"] *= 2
    whole = timm_vit.table(dataclasses.replace(vision, feature_layer=None))
    tower = {name: drawn(name, shape) for name, shape in whole.shapes().items()}
    variables["params"]["vision"] = tables.load(whole, tower)
    studies = [
        (rng.integers(0, 256, (28, 28), dtype=np.uint8), indication)
        for indication in ("pleural effusion?\nleft", None, "chest pain")
    ]
    return Example(variables, config, tokenizer_path, studies)


def unboxed(tree: Any) -> Any:
    import flax.linen as nn

    return nn.unbox(tree)
