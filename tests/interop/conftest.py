"""A small LLaVA with its own tokenizer, and the bundle made of it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.interop import tables, timm_vit
from rad_jax.lora import LoraSpec
from rad_jax.models.llama import LlamaConfig
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


@pytest.fixture(scope="session")
def plain_example(tokenizer_path) -> Example:
    return make_example(tokenizer_path, False)


def make_example(tokenizer_path: Path, layer_scale: bool) -> Example:
    vision = VitConfig(
        image_size=28,
        patch_size=7,
        width=24,
        depth=3,
        heads=4,
        mlp_dim=48,
        layer_scale=layer_scale,
        feature_layer=-2,
    )
    config = LlavaConfig(
        LlamaConfig(vocab_size=512, width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, max_positions=256),
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
