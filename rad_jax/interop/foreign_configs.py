"""Configurations of other libraries, and ours.

Each reader takes the contents of a JSON file. What would change the numbers and is not implemented here is refused, by key and value; what
only matters in training (dropout, initialisation) is not looked at. A key that is absent has its own library's default.
"""

import re
from collections.abc import Mapping
from typing import Any

from rad_jax import images
from rad_jax.errors import UserError
from rad_jax.interop.tables import Shape
from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import ClipConfig
from rad_jax.models.llama import LlamaConfig, RopeScaling
from rad_jax.models.vit import VitConfig

Json = Mapping[str, Any]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = images.MEAN, images.STD
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# transformers' names, and ours.
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}

_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "sliding_window": None,
}  # fmt: skip
_MISTRAL = {
    **_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
_VIT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
    "image_size": 224,
}  # fmt: skip
_DINOV2 = {**_VIT, "patch_size": 14, "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
_CLIP = {**_VIT, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {**_VIT, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_BERT = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip


def llama(config: Json) -> LlamaConfig:
    """transformers' LlamaConfig or MistralConfig. Whether its head is tied to the embedding says `tied`.

    A sliding window is not implemented: rows end where it would begin to matter, at `max_positions`.

    Raises:
        UserError: a setting that is not implemented.
    """
    kind = _kind(config, "llama", "mistral")
    c = {**(_MISTRAL if kind == "mistral" else _LLAMA), **config}
    _only(c, "hidden_act", "silu")
    _only(c, "attention_bias", False)
    _only(c, "mlp_bias", False)
    _divided(c, "hidden_size", "num_attention_heads")
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    _only(c, "head_dim", None, c["hidden_size"] // heads)
    theta, scaling = _rope(config)
    return LlamaConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        mlp_dim=c["intermediate_size"],
        eps=c["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=min(c["max_position_embeddings"], c["sliding_window"] or c["max_position_embeddings"]),
    )


def tied(config: Json) -> bool:
    """Whether a Llama or Mistral has its embedding as its head (`hf_llama.table`)."""
    return bool(config.get("tie_word_embeddings", False))


def dinov2(config: Json, preprocessor: Json | None = None) -> VitConfig:
    """transformers' Dinov2Config, the whole tower.

    Args:
        config: of the model.
        preprocessor: contents of preprocessor_config.json, where there is one.

    Raises:
        UserError: a setting that is not implemented.
    """
    _kind(config, "dinov2")
    c = {**_DINOV2, **config}
    _only(c, "use_swiglu_ffn", False)
    _only(c, "qkv_bias", True)
    return _vit(
        c, preprocessor, IMAGENET, mlp_dim=int(c["hidden_size"] * c["mlp_ratio"]), patch_bias=True, layer_scale=True
    )


def clip_vision(config: Json, preprocessor: Json | None = None) -> VitConfig:
    """transformers' CLIPVisionConfig, or that of a whole CLIPConfig; the whole tower. Arguments and errors as of `dinov2`."""
    _kind(config, "clip", "clip_vision_model")
    c = _CLIP | _vision_part(config, "clip", "clip_vision_model")
    return _vit(c, preprocessor, OPENAI, mlp_dim=c["intermediate_size"], patch_bias=False, pre_norm=True)


def siglip_vision(config: Json, preprocessor: Json | None = None) -> VitConfig:
    """transformers' SiglipVisionConfig, or that of a whole SiglipConfig; the whole tower. Arguments and errors as of `dinov2`."""
    _kind(config, "siglip", "siglip_vision_model")
    c = _SIGLIP | _vision_part(config, "siglip", "siglip_vision_model")
    return _vit(c, preprocessor, HALF, mlp_dim=c["intermediate_size"], patch_bias=True, class_token=False)


def bert(config: Json) -> BertConfig:
    """transformers' BertConfig, for the encoder alone.

    Raises:
        UserError: a setting that is not implemented.
    """
    _kind(config, "bert")
    c = {**_BERT, **config}
    _only(c, "hidden_act", "gelu")
    _only(c, "position_embedding_type", "absolute")
    _only(c, "is_decoder", False)
    _divided(c, "hidden_size", "num_attention_heads")
    return BertConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        max_positions=c["max_position_embeddings"],
        token_types=c["type_vocab_size"],
        eps=c["layer_norm_eps"],
    )


# ViTs of timm with a class token, heads of 64 channels and nothing else of their own; LayerScale in the DINOv2 ones.
_TRUNK = re.compile(r"vit_(?:tiny|small|base|large)_patch\d+_(?:\d+(?:_in21k)?|(dinov2))")
_HEAD_DIM = 64


def open_clip(config: Json, shapes: Mapping[str, Shape], name: str = "") -> ClipConfig | VitConfig:
    """open_clip's model configuration: a timm ViT with a Hugging Face BERT (BiomedCLIP), or OpenAI's own ViT.

    Sizes of a timm trunk and of a BERT stand in neither file: they are taken from the tensors.

    Args:
        config: {"embed_dim", "vision_cfg", "text_cfg"}, or an `open_clip_config.json` with that under "model_cfg".
        shapes: of the checkpoint's tensors, by their names in the model ("visual....", without "module.").
        name: of the model, where it is known: "ViT-B-32-quickgelu" says what its configuration may not.

    Returns:
        Both towers for `interop.open_clip`, or the image tower for `interop.openai_clip`.

    Raises:
        UserError: another kind of tower, a setting that is not implemented, or tensors of another model.
    """
    model = config.get("model_cfg", config)
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    pixels = _pixels(config.get("preprocess_cfg"), OPENAI, "mean", "std")
    if vision.get("timm_model_name"):
        _whole({"embed_dim": None} | model, "embed_dim")
        towers = _timm_trunk(vision, shapes, pixels), _open_clip_bert(text, shapes)
        return ClipConfig(*towers, model["embed_dim"], "sigmoid" if "logit_bias" in shapes else "softmax")
    return _native_vit(vision, shapes, pixels, bool(model.get("quick_gelu")) or "quickgelu" in name)


def _timm_trunk(vision: Json, shapes: Mapping[str, Shape], pixels: dict[str, Any]) -> VitConfig:
    trunk = vision["timm_model_name"].split("/")[-1].split(".")[0]
    known = _TRUNK.fullmatch(trunk)
    if known is None:
        raise _refused(
            "timm_model_name", vision["timm_model_name"], "a plain ViT such as vit_base_patch16_224, or DINOv2's"
        )
    _only(vision, "timm_pool", "", "token", absent="avg")
    _only(vision, "timm_proj", "linear", absent="linear")
    _only(vision, "timm_proj_bias", False)
    prefix = "visual.trunk."
    kernel = _shape(shapes, f"{prefix}patch_embed.proj.weight", 4)
    scaled = f"{prefix}blocks.0.ls1.gamma" in shapes
    if known[1] and not scaled:
        raise UserError(
            f"timm_model_name is {trunk!r}, but the weights are of a tower without LayerScale keys (ls1.gamma)."
        )
    _only({"patch_embed.proj.weight": kernel[2:]}, "patch_embed.proj.weight", (kernel[2], kernel[2]))
    return VitConfig(
        image_size=_image_size(vision, kernel[2], _shape(shapes, f"{prefix}pos_embed", 3)[1] - 1),
        patch_size=kernel[2],
        width=kernel[0],
        depth=_depth(shapes, f"{prefix}blocks."),
        heads=_heads(f"{prefix}patch_embed.proj.weight", kernel[0]),
        mlp_dim=_shape(shapes, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        layer_scale=scaled,
        **pixels,
    )


def _open_clip_bert(text: Json, shapes: Mapping[str, Shape]) -> BertConfig:
    name = text.get("hf_model_name")
    # RoBERTa has BERT's names, but counts positions from 2.
    if not name or "bert" not in name.lower() or re.search("roberta|distil|albert|deberta|camembert", name.lower()):
        raise _refused("text_cfg.hf_model_name", name, "a BERT")
    for keys, absent, supported in (
        (("hf_proj_type", "proj_type", "proj"), "mlp", "mlp"),
        (("hf_pooler_type", "pooler_type"), "mean_pooler", "cls_last_hidden_state_pooler"),
    ):
        found = next((text[key] for key in keys if key in text), absent)
        if found != supported:
            raise _refused(f"text_cfg.{keys[0]}", found, repr(supported))
    prefix = "text.transformer."
    embeddings = f"{prefix}embeddings."
    rows, width = _shape(shapes, f"{embeddings}word_embeddings.weight", 2)
    return BertConfig(
        vocab_size=rows,
        width=width,
        depth=_depth(shapes, f"{prefix}encoder.layer."),
        heads=_heads(f"{embeddings}word_embeddings.weight", width),
        mlp_dim=_shape(shapes, f"{prefix}encoder.layer.0.intermediate.dense.weight", 2)[0],
        max_positions=_shape(shapes, f"{embeddings}position_embeddings.weight", 2)[0],
        token_types=_shape(shapes, f"{embeddings}token_type_embeddings.weight", 2)[0],
    )


# Of open_clip's vision_cfg: what is read below, and what does not touch the tower's tokens.
_NATIVE = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs", "norm_kwargs"}
_NATIVE |= {"patch_dropout", "pool_type", "final_ln_after_pool", "output_tokens", "pos_embed_type"}


def _native_vit(vision: Json, shapes: Mapping[str, Shape], pixels: dict[str, Any], quick_gelu: bool) -> VitConfig:
    c = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16} | dict(vision)
    if not isinstance(c["layers"], int):
        raise _refused("vision_cfg.layers", c["layers"], "the number of a ViT's blocks, no ResNet")
    for key in c.keys() - _NATIVE:
        if c[key]:
            raise _refused(f"vision_cfg.{key}", c[key], "a plain ViT without it")
    activation, norm = dict(c.get("act_kwargs") or {}), dict(c.get("norm_kwargs") or {})
    eps = norm.pop("eps", 1e-5)
    tanh = activation.pop("approximate", "none") == "tanh"
    if activation or norm or (tanh and quick_gelu):
        raise _refused("vision_cfg.act_kwargs and norm_kwargs", {**activation, **norm}, "'approximate' and 'eps'")
    _divided(c, "width", "head_width")
    return VitConfig(
        image_size=_image_size(c, c["patch_size"], _shape(shapes, "visual.positional_embedding", 2)[0] - 1),
        patch_size=c["patch_size"],
        width=c["width"],
        depth=c["layers"],
        heads=c["width"] // c["head_width"],
        mlp_dim=int(c["width"] * c["mlp_ratio"]),
        eps=eps,
        activation="quick_gelu" if quick_gelu else "gelu_tanh" if tanh else "gelu",
        patch_bias=False,
        pre_norm=True,
        **pixels,
    )


def hf_text_config(config: LlamaConfig) -> dict[str, Any]:
    """The shape of the decoder as transformers' LlamaConfig, 4 and 5 alike: 5 moves `rope_theta` into the scaling's dict while reading."""
    c, scaling = config, config.rope_scaling
    found: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    if scaling is not None:
        found["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            found["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    return found


def hf_vision_config(config: VitConfig) -> dict[str, Any]:
    """The whole tower as transformers' Dinov2Config, CLIPVisionConfig or SiglipVisionConfig, as `hf_llava.table` chooses.

    Raises:
        UserError: a tower that none of them can describe.
    """
    c = config
    if c.activation not in ACTIVATION_NAMES:
        raise UserError(f"a tower with the activation {c.activation!r} cannot be exported.")
    shape = {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "hidden_act": ACTIVATION_NAMES[c.activation],
        "layer_norm_eps": c.eps,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "num_channels": 3,
    }
    if c.pre_norm or not c.class_token:
        kind = "clip_vision_model" if c.pre_norm else "siglip_vision_model"
        head = {} if c.pre_norm else {"vision_use_head": False}  # the pooling head has no weights here
        return {"model_type": kind, **shape, "intermediate_size": c.mlp_dim, "attention_dropout": 0.0, **head}
    if c.mlp_dim % c.width:
        raise UserError(f"an exported Dinov2Model needs an mlp_dim that is a multiple of its width, {c.width}.")
    return {
        "model_type": "dinov2",
        **shape,
        "mlp_ratio": c.mlp_dim // c.width,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "use_mask_token": True,
        "use_swiglu_ffn": False,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _vit(c: Json, preprocessor: Json | None, usual: Any, **kind: Any) -> VitConfig:
    """What the three families of transformers have in common."""
    _only(c, "num_channels", 3)
    _divided(c, "hidden_size", "num_attention_heads")
    _whole(c, "image_size", "patch_size")
    if c["hidden_act"] not in ACTIVATIONS:
        raise _refused("hidden_act", c["hidden_act"], ", ".join(ACTIVATIONS))
    return VitConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        eps=c["layer_norm_eps"],
        activation=ACTIVATIONS[c["hidden_act"]],
        **kind,
        **_pixels(preprocessor, usual),
    )


def _vision_part(config: Json, *kinds: str) -> dict[str, Any]:
    """The configuration of the image tower in that of two towers."""
    part = config.get("vision_config")
    if part is None:
        return dict(config)
    _kind(part, *kinds)
    return dict(part)


def _pixels(preprocessor: Json | None, usual: Any, mean: str = "image_mean", std: str = "image_std") -> dict[str, Any]:
    """Channel statistics, from the preprocessor's settings where they are there."""
    c = preprocessor or {}
    if c.get("do_rescale", True) is not True or abs((c.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-5:
        raise _refused("rescale_factor", c.get("rescale_factor"), "1/255")
    _only(c, "do_normalize", True)
    found = {"pixel_mean": tuple(c.get(mean) or usual[0]), "pixel_std": tuple(c.get(std) or usual[1])}
    for key, values in found.items():
        if len(values) != 3:
            raise _refused(key.replace("pixel", "image"), list(values), "three numbers")
    return found


def _rope(config: Json) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from transformers 4's keys or 5's."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    c = config.get(key) or {}
    theta = float(c.get("rope_theta") or config.get("rope_theta") or 10000.0)
    _only({**config, **c}, "partial_rotary_factor", None, 1.0)
    kind = c.get("rope_type", c.get("type")) or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise _refused(f"{key}.rope_type", kind, "default, linear, llama3")
    if kind == "linear":
        return theta, RopeScaling("linear", float(_given(c, key, "factor")))
    low, high = (float(_given(c, key, name)) for name in ("low_freq_factor", "high_freq_factor"))
    positions = int(_given(c, key, "original_max_position_embeddings"))
    return theta, RopeScaling("llama3", float(_given(c, key, "factor")), low, high, positions)


def _given(c: Json, where: str, key: str) -> Any:
    if c.get(key) is None:
        raise _refused(f"{where}.{key}", None, "a number")
    return c[key]


def _kind(config: Json, *kinds: str) -> str:
    """The family; a part of a larger configuration may leave it out."""
    kind = config.get("model_type", kinds[0])
    if kind not in kinds:
        raise _refused("model_type", kind, ", ".join(kinds))
    if config.get("quantization_config"):
        raise _refused("quantization_config", config["quantization_config"], "weights that are not quantised")
    return kind


def _only(config: Json, key: str, *supported: Any, absent: Any = None) -> None:
    """Refuses other values of a key; where it is absent, the value is `absent`, or the first that is supported."""
    value = config.get(key, supported[0] if absent is None else absent)
    if value not in supported:
        raise _refused(key, value, ", ".join(repr(one) for one in supported if one is not None))


def _whole(config: Json, *keys: str) -> None:
    for key in keys:
        if not isinstance(config[key], int) or config[key] <= 0:
            raise _refused(key, config[key], "a whole number")


def _divided(config: Json, key: str, by: str) -> None:
    _whole(config, key, by)
    if config[key] % config[by]:
        raise _refused(key, config[key], f"a multiple of {by}, {config[by]}")


def _refused(key: str, value: Any, supported: str) -> UserError:
    return UserError(f"the foreign configuration has {key} = {value!r}, but only {supported} is supported.")


def _shape(shapes: Mapping[str, Shape], name: str, axes: int) -> Shape:
    if len(shapes.get(name, ())) != axes:
        raise UserError(
            f"the weights have no {name} of {axes} axes, so they are not of the model that the configuration names."
        )
    return tuple(shapes[name])


def _depth(shapes: Mapping[str, Shape], prefix: str) -> int:
    """How many blocks there are."""
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1)


def _heads(name: str, width: int) -> int:
    if width % _HEAD_DIM:
        raise UserError(f"the weights' {name} has a width of {width}, but only multiples of {_HEAD_DIM} are supported.")
    return width // _HEAD_DIM


def _image_size(vision: Json, patch_size: int, patches: int) -> int:
    """The configuration's image size, where the position table is for it."""
    size = vision.get("image_size", 224)
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or (size // patch_size) ** 2 != patches:
        raise UserError(
            f"vision_cfg.image_size is {size!r}, but the position table of the weights has {patches} patches of {patch_size} pixels."
        )
    return size
