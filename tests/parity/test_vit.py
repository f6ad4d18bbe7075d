"""The image tower against timm and transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.interop import hf_clip_vision, hf_dinov2, tables, timm_vit
from rad_jax.models.vit import Vit, VitConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

CONFIG = VitConfig(image_size=28, patch_size=7, width=24, depth=3, heads=4, mlp_dim=96)


def images(size: int = 28) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


def channels_first(x: np.ndarray):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def compare(parity, name, config, tree, x, theirs, gradients):
    """Output, and the gradient of a random projection of it with respect to every parameter."""
    probe = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.from_numpy(probe)).sum().backward()
    params = jax.tree.map(jnp.asarray, tree)

    def loss(p):
        output = Vit(config).apply({"params": p}, x)
        return (output * probe).sum(), output

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    parity.forward(f"ViT {name[0]}", name[1], ours, theirs.detach())
    parity.gradients(f"ViT {name[0]}, gradients", name[1], grads, gradients())


@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("feature_layer", [None, -2])
def test_timm(layer_scale, feature_layer, parity, randomised, state):
    timm = pytest.importorskip("timm")
    config = dataclasses.replace(CONFIG, layer_scale=layer_scale, feature_layer=feature_layer)
    model = timm.models.VisionTransformer(
        img_size=28,
        patch_size=7,
        embed_dim=24,
        depth=3,
        num_heads=4,
        num_classes=0,
        init_values=1e-5 if layer_scale else None,
    )
    randomised(model)
    x = images()
    if feature_layer is None:
        theirs = model.forward_features(channels_first(x))
    else:
        patches, token = model.forward_intermediates(
            channels_first(x), indices=[1], intermediates_only=True, return_prefix_tokens=True, output_fmt="NLC"
        )[0]
        theirs = torch.cat([token, patches], dim=1)
    table = timm_vit.table(config)
    name = f"{'features of block -2' if feature_layer else 'whole'}{', LayerScale' if layer_scale else ''}", "timm"

    def gradients():
        used = dict(zip(state(model), _grads(model), strict=True))
        return tables.load(table, used)

    compare(parity, name, config, tables.load(table, state(model)), x, theirs, gradients)


def _grads(model):
    return [np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() for p in model.parameters()]


@pytest.mark.parametrize("feature_layer", [None, -2])
def test_dinov2(feature_layer, parity, randomised, on_disk):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, layer_scale=True, feature_layer=feature_layer)
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            mlp_ratio=4,
            image_size=28,
            patch_size=7,
            layer_norm_eps=1e-6,
        )
    )
    randomised(model)
    x = images()
    output = model(channels_first(x), output_hidden_states=True)
    theirs = output.last_hidden_state if feature_layer is None else output.hidden_states[-2]
    table = hf_dinov2.table(config)
    name = "whole" if feature_layer is None else "features of block -2", "transformers Dinov2Model"
    tree = tables.load(table, on_disk(model))
    compare(parity, name, config, tree, x, theirs, lambda: tables.load(table, on_disk(model, gradients=True)))


def test_clip_vision(parity, randomised, on_disk):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(
        CONFIG, pre_norm=True, patch_bias=False, activation="quick_gelu", eps=1e-5, feature_layer=-2
    )
    model = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
        )
    )
    randomised(model)
    x = images()
    theirs = model(channels_first(x), output_hidden_states=True).hidden_states[-2]
    table = hf_clip_vision.table(config)
    name = "of OpenAI CLIP, block -2", "transformers CLIPVisionModel"

    def tensors(gradients=False):
        # Files of version 4 have the level `vision_model.`, those of version 5 have not.
        return {"vision_model." + n.removeprefix("vision_model."): x for n, x in on_disk(model, gradients).items()}

    compare(parity, name, config, tables.load(table, tensors()), x, theirs, lambda: tables.load(table, tensors(True)))
