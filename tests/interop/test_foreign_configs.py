"""Foreign configurations: what is read, and that what is not implemented is refused by key and value."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from rad_jax import images
from rad_jax.errors import UserError
from rad_jax.interop import foreign_configs, open_clip, openai_clip
from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import ClipConfig
from rad_jax.models.llama import LlamaConfig, RopeScaling
from rad_jax.models.vit import VitConfig

VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama_defaults_are_those_of_transformers():
    vicuna = LlamaConfig(32064, 4096, 32, 32, 32, 11008, eps=1e-5, max_positions=4096)
    assert foreign_configs.llama(VICUNA) == vicuna and not foreign_configs.tied(VICUNA)
    assert foreign_configs.llama({"model_type": "llama"}).max_positions == 2048
    mistral = LlamaConfig(32000, 4096, 32, 32, 8, 14336, eps=1e-6, max_positions=4096)
    assert foreign_configs.llama({"model_type": "mistral"}) == mistral
    wide = foreign_configs.llama({"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768})
    assert wide.max_positions == 32768


def test_absent_keys_have_the_defaults_of_the_library_itself():
    """Against the library that is installed, so that a changed default is noticed."""
    transformers = pytest.importorskip("transformers")
    read: dict[str, Callable[[Any], Any]] = {
        "LlamaConfig": foreign_configs.llama,
        "MistralConfig": foreign_configs.llama,
        "Dinov2Config": foreign_configs.dinov2,
        "CLIPVisionConfig": foreign_configs.clip_vision,
        "SiglipVisionConfig": foreign_configs.siglip_vision,
        "BertConfig": foreign_configs.bert,
    }
    for name, reader in read.items():
        full = getattr(transformers, name)().to_dict()
        assert reader({"model_type": full["model_type"]}) == reader(full), name


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, RopeScaling("linear", 4.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, RopeScaling("llama3", 8.0)),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 5e5, RopeScaling("llama3", 8.0)),
    ],
)
def test_rotary_positions_of_both_versions(keys, theta, scaling):
    config = foreign_configs.llama(VICUNA | keys)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    assert foreign_configs.llama(json.loads(json.dumps(foreign_configs.hf_text_config(config)))) == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "qwen2"}, r"model_type = 'qwen2', but only llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but only 'silu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"head_dim": 64}, "head_dim = 64, but only 128"),
        ({"num_attention_heads": 24}, "hidden_size = 4096, but only a multiple of num_attention_heads, 24"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type = 'yarn', but only default, linear"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type = 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor = None"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, "original_max_position_embeddings = None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)  # fmt: skip
def test_llama_refusals(keys, message):
    with pytest.raises(UserError, match=message):
        foreign_configs.llama(VICUNA | keys)


def test_towers_of_transformers():
    dinov2 = foreign_configs.dinov2({"model_type": "dinov2", "image_size": 518}, {"image_mean": [0.1, 0.2, 0.3]})
    expected = VitConfig(
        518, 14, 768, 12, 12, 3072, layer_scale=True, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.229, 0.224, 0.225)
    )
    assert dinov2 == expected and hash(dinov2) == hash(expected)
    part = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    clip = foreign_configs.clip_vision(
        {"model_type": "clip", "text_config": {}, "vision_config": {**part, "image_size": 336}}
    )
    assert clip == VitConfig(
        336, 14, 1024, 24, 16, 4096, eps=1e-5, activation="quick_gelu", patch_bias=False, pre_norm=True
    )  # fmt: skip
    assert (clip.pixel_mean, clip.pixel_std) == (images.MEAN, images.STD)
    siglip = foreign_configs.siglip_vision({"model_type": "siglip_vision_model", **part, "image_size": 384})
    assert siglip.patches == siglip.tokens == 27**2 and siglip.activation == "gelu_tanh"


@pytest.mark.parametrize("kind", ["dinov2", "clip_vision", "siglip_vision"])
def test_towers_come_back_as_they_went(kind):
    config = getattr(foreign_configs, kind)({})
    written = json.loads(json.dumps(foreign_configs.hf_vision_config(config)))
    preprocessor = {"image_mean": list(config.pixel_mean), "image_std": list(config.pixel_std)}
    assert getattr(foreign_configs, kind)(written, preprocessor) == config


@pytest.mark.parametrize(
    ("reader", "config", "preprocessor", "message"),
    [
        ("dinov2", {"model_type": "dinov2_with_registers"}, None, "model_type = 'dinov2_with_registers', but only dinov2"),
        ("dinov2", {"use_swiglu_ffn": True}, None, "use_swiglu_ffn = True"),
        ("dinov2", {"qkv_bias": False}, None, "qkv_bias = False, but only True"),
        ("dinov2", {"num_channels": 1}, None, "num_channels = 1"),
        ("dinov2", {}, {"do_normalize": False}, "do_normalize = False"),
        ("dinov2", {}, {"rescale_factor": 1.0}, "rescale_factor = 1.0, but only 1/255"),
        ("dinov2", {}, {"image_std": [0.5]}, r"image_std = \[0.5\], but only three numbers"),
        ("clip_vision", {"hidden_act": "relu"}, None, "hidden_act = 'relu', but only gelu"),
        ("clip_vision", {"model_type": "siglip"}, None, "model_type = 'siglip'"),
        ("clip_vision", {"image_size": [336, 224]}, None, r"image_size = \[336, 224\]"),
        ("siglip_vision", {"model_type": "siglip2"}, None, "model_type = 'siglip2'"),
        ("siglip_vision", {"vision_config": {"model_type": "siglip2_vision_model"}}, None, "siglip2_vision_model"),
    ],
)  # fmt: skip
def test_tower_refusals(reader, config, preprocessor, message):
    with pytest.raises(UserError, match=message):
        getattr(foreign_configs, reader)(config, preprocessor)


def test_bert_and_its_refusals():
    assert foreign_configs.bert({"model_type": "bert"}) == BertConfig(30522, 768, 12, 12, 3072)
    for keys, message in (
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new', but only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"model_type": "roberta"}, "model_type = 'roberta'"),
    ):
        with pytest.raises(UserError, match=message):
            foreign_configs.bert(keys)


BIOMED = ClipConfig(
    VitConfig(image_size=56, patch_size=14, width=128, depth=2, heads=2, mlp_dim=96, layer_scale=True),
    BertConfig(vocab_size=11, width=64, depth=3, heads=1, mlp_dim=48, max_positions=9),
    embed_dim=32,
)
VISION = {
    "timm_model_name": "vit_base_patch14_dinov2.lvd142m",
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 56,
}
TEXT = {
    "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
    "hf_proj_type": "mlp",
    "hf_pooler_type": "cls_last_hidden_state_pooler",
}
SHAPES = open_clip.table(BIOMED).shapes()


def test_biomedclip_takes_its_sizes_from_the_tensors():
    model = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
    assert foreign_configs.open_clip(model, SHAPES) == BIOMED
    older = {key: value for key, value in TEXT.items() if key == "hf_model_name"}
    older |= {"proj": "mlp", "pooler_type": "cls_last_hidden_state_pooler"}
    within = {
        "model_cfg": {**model, "text_cfg": older},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    found = foreign_configs.open_clip(within, SHAPES)
    vision = dataclasses.replace(BIOMED.vision, pixel_mean=(0.5,) * 3, pixel_std=(0.25,) * 3)
    assert found == dataclasses.replace(BIOMED, vision=vision)
    plain = dataclasses.replace(BIOMED, vision=dataclasses.replace(BIOMED.vision, layer_scale=False))
    model["vision_cfg"] = {**VISION, "timm_model_name": "vit_base_patch16_224"}
    assert foreign_configs.open_clip(model, open_clip.table(plain).shapes()) == plain


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"timm_model_name": "convnext_base"}, {}, "timm_model_name = 'convnext_base', but only a plain ViT"),
        ({"timm_model_name": "vit_base_patch14_reg4_dinov2"}, {}, "vit_base_patch14_reg4_dinov2"),
        ({"timm_model_name": "vit_base_patch16_clip_224"}, {}, "vit_base_patch16_clip_224"),
        ({"timm_pool": "avg"}, {}, "timm_pool = 'avg'"),
        ({"timm_pool": "abs_attn"}, {}, "timm_pool = 'abs_attn'"),
        ({"timm_proj": "mlp"}, {}, "timm_proj = 'mlp'"),
        ({"image_size": 224}, {}, "image_size is 224, but the position table of the weights has 16 patches of 14"),
        ({}, {"hf_model_name": "roberta-base"}, "hf_model_name = 'roberta-base', but only a BERT"),
        ({}, {"hf_model_name": None, "width": 512}, "hf_model_name = None"),
        ({}, {"hf_proj_type": "linear"}, "hf_proj_type = 'linear', but only 'mlp'"),
        ({}, {"hf_pooler_type": "mean_pooler"}, "hf_pooler_type = 'mean_pooler'"),
    ],
)
def test_biomedclip_refusals(vision, text, message):
    config = {"embed_dim": 32, "vision_cfg": VISION | vision, "text_cfg": TEXT | text}
    with pytest.raises(UserError, match=message):
        foreign_configs.open_clip(config, SHAPES)


def test_a_timm_pool_that_is_not_said_is_the_mean_in_open_clip():
    vision = {key: value for key, value in VISION.items() if key != "timm_pool"}
    with pytest.raises(UserError, match="timm_pool = 'avg'"):
        foreign_configs.open_clip({"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}, SHAPES)


def test_a_dinov2_without_layer_scale_is_refused():
    shapes = {name: shape for name, shape in SHAPES.items() if ".ls" not in name}
    with pytest.raises(UserError, match="tower without LayerScale keys"):
        foreign_configs.open_clip({"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}, shapes)


def test_tensors_of_another_model_are_refused():
    with pytest.raises(UserError, match=r"have no visual\.trunk\.patch_embed\.proj\.weight"):
        foreign_configs.open_clip({"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}, {})


NATIVE = VitConfig(56, 14, 128, 2, 2, 512, eps=1e-5, patch_bias=False, pre_norm=True)
NATIVE_CFG = {"layers": 2, "width": 128, "patch_size": 14, "image_size": 56}


def test_openai_clip():
    shapes = openai_clip.table(NATIVE).shapes()
    config = {"embed_dim": 32, "vision_cfg": NATIVE_CFG, "text_cfg": {"width": 512}}
    assert foreign_configs.open_clip(config, shapes) == NATIVE
    quick = dataclasses.replace(NATIVE, activation="quick_gelu")
    assert foreign_configs.open_clip({**config, "quick_gelu": True}, shapes) == quick
    assert foreign_configs.open_clip(config, shapes, "ViT-B-16-quickgelu") == quick
    config["vision_cfg"] = {**NATIVE_CFG, "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    assert foreign_configs.open_clip(config, shapes) == dataclasses.replace(NATIVE, eps=1e-6, activation="gelu_tanh")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": [3, 4, 6, 3]}, r"vision_cfg.layers = \[3, 4, 6, 3\], but only the number of a ViT's blocks"),
        ({"attentional_pool": True}, "vision_cfg.attentional_pool = True"),
        ({"ls_init_value": 1e-5}, "vision_cfg.ls_init_value"),
        ({"no_ln_pre": True}, "vision_cfg.no_ln_pre"),
        ({"qk_norm": True}, "vision_cfg.qk_norm"),
        ({"head_width": 80}, "width = 128, but only a multiple of head_width, 80"),
        ({"image_size": 224}, "image_size is 224"),
    ],
)
def test_openai_clip_refusals(keys, message):
    with pytest.raises(UserError, match=message):
        foreign_configs.open_clip({"vision_cfg": NATIVE_CFG | keys}, openai_clip.table(NATIVE).shapes())


def test_a_contrastive_model_needs_a_class_token():
    with pytest.raises(ValueError, match="by its class token"):
        ClipConfig(dataclasses.replace(BIOMED.vision, class_token=False), BIOMED.text, 32)
