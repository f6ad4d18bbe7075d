"""The image tower against timm, transformers and open_clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.interop import foreign_configs, hf_clip_vision, hf_dinov2, hf_siglip_vision, openai_clip, tables, timm_vit
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
    name = "of OpenAI CLIP, block -2", "transformers CLIPVisionModel"

    tensors = on_disk(model)
    table = hf_clip_vision.table(config, hf_clip_vision.level(tensors))
    assert foreign_configs.clip_vision(model.config.to_dict()) == dataclasses.replace(config, feature_layer=None)
    compare(
        parity, name, config, tables.load(table, tensors), x, theirs, lambda: tables.load(table, on_disk(model, True))
    )


@pytest.mark.parametrize("feature_layer", [None, -2])
@pytest.mark.parametrize("size", [28, 31])  # of 31 pixels, the last 3 fill no patch
def test_siglip_vision(size, feature_layer, parity, randomised, on_disk):
    transformers = pytest.importorskip("transformers")
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=24, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, image_size=size, patch_size=7
        )
    )  # fmt: skip
    config = foreign_configs.siglip_vision(model.config.to_dict())
    assert config.pixel_mean == config.pixel_std == (0.5, 0.5, 0.5) and config.patches == 16
    config = dataclasses.replace(config, feature_layer=feature_layer)
    randomised(model)
    x = images(size)
    output = model(channels_first(x), output_hidden_states=True)
    theirs = output.last_hidden_state if feature_layer is None else output.hidden_states[-2]
    tensors = on_disk(model)
    table = hf_siglip_vision.table(config, hf_clip_vision.level(tensors))
    name = f"of SigLIP, {size} pixels{', block -2' if feature_layer else ''}", "transformers SiglipVisionModel"
    compare(
        parity, name, config, tables.load(table, tensors), x, theirs, lambda: tables.load(table, on_disk(model, True))
    )


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("feature_layer", [None, -2])
def test_openai_layout(feature_layer, quick_gelu, parity, randomised, state):
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 3, "width": 24, "head_width": 6, "patch_size": 7, "image_size": 28}
    text = {"context_length": 8, "vocab_size": 32, "width": 12, "heads": 2, "layers": 1}
    model = randomised(open_clip.model.CLIP(10, vision, text, quick_gelu=quick_gelu))
    x = images()
    if feature_layer is None:
        model.visual.output_tokens = True
        model.visual.proj = None  # the class token before the image head
        token, patches = model.visual(channels_first(x))
        theirs = torch.cat([token[:, None], patches], dim=1)
    else:
        states = model.visual.forward_intermediates(
            channels_first(x), indices=[1], intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
        )
        prefix, patches = states["image_intermediates_prefix"][0], states["image_intermediates"][0]
        theirs = torch.cat([prefix, patches], dim=1)
    tensors = state(model)
    config = foreign_configs.open_clip(
        {"embed_dim": 10, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu},
        {name: tensor.shape for name, tensor in tensors.items()},
    )
    assert isinstance(config, VitConfig)
    config = dataclasses.replace(config, feature_layer=feature_layer)
    table = openai_clip.table(config)
    name = (
        f"in OpenAI's layout{', quick_gelu' if quick_gelu else ''}{', block -2' if feature_layer else ''}",
        "open_clip CLIP",
    )

    def gradients():
        return tables.load(table, dict(zip(tensors, _grads(model), strict=True)))

    compare(parity, name, config, tables.load(table, tensors), x, theirs, gradients)
