"""The other ways out: a peft adapter, LLaVA-Rad's own folder, and open_clip's towers."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop import llava, open_clip, peft_lora, shards, sources, tables, torch_zip
from rad_jax.interop.exported import Exported
from rad_jax.interop.foreign_configs import hf_text_config
from rad_jax.lora import LoraSpec
from rad_jax.models.clip import ClipConfig

Progress = Callable[[int], object]
# File, table, our tree, carried tensors, what goes before the names, and the key under which the tensors are put.
Item = tuple[str, tables.Table, Mapping[str, Any], Mapping[str, np.ndarray], str, str | None]

BASE_MODEL = "lmsys/vicuna-7b-v1.5"  # what LLaVA-Rad's adapters belong to
TOWER = "biomedclipcxr_518"
# timm's names for what a trunk's shape says: (patch size, width, depth, LayerScale).
TRUNKS = {
    (14, 384, 12, True): "vit_small_patch14_dinov2",
    (14, 768, 12, True): "vit_base_patch14_dinov2",
    (14, 1024, 24, True): "vit_large_patch14_dinov2",
    (16, 384, 12, False): "vit_small_patch16_224",
    (16, 768, 12, False): "vit_base_patch16_224",
    (16, 1024, 24, False): "vit_large_patch16_224",
}
BIOMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"


def write_peft(
    folder: Path, model: Exported, dtype: str, progress: Progress, within: str = "model.layers."
) -> dict[str, str]:
    """`adapter_model.safetensors` and `adapter_config.json`.

    Args:
        folder, model, dtype, progress: as in `bundle.write`.
        within: where the layers are in the model that is adapted: a language model alone, or one inside a LLaVA.

    Raises:
        UserError: there are no adapters.
    """
    spec, table, adapters = _adapters(model)
    renamed = (dataclasses.replace(e, name=e.name.replace("model.layers.", within, 1)) for e in table.entries)
    table = dataclasses.replace(table, entries=tuple(renamed))
    plan = shards.in_dtype(tables.outline(table, adapters), dtype)
    hashes = shards.write(folder, plan, tables.store(table, adapters), "adapter_model", progress=progress)
    config = _adapter_config(model, spec)
    if (
        "language_model" in within
    ):  # plain names would put adapters on an image tower that has projections of the same names
        config["target_modules"] = rf".*language_model.*\.({'|'.join(spec.targets)})_proj"
    return hashes | _texts(folder, {"adapter_config.json": config})


def write_llava(folder: Path, model: Exported, dtype: str, progress: Progress) -> dict[str, str]:
    """The files of microsoft/llava-rad: adapter, projector, and the tower as an open_clip checkpoint; of a stage 2 the `mm_projector.bin`.

    Raises:
        UserError: there is no projector, or no text tower beside the image tower.
    """
    weights = model.variables["params"].get("projector")
    if weights is None or model.config is None:
        raise UserError("there is no projector in this checkpoint: export a run of stage 2 or 3.")
    projector = llava.projector(*weights["fc1"]["kernel"].shape)
    if model.config.lora is None:
        parts: list[Item] = [("mm_projector.bin", projector, weights, {}, llava.PREFIX, None)]
        return _write_torch(folder, parts, dtype, progress)
    (spec, table, adapters), clip = _adapters(model), _clip(model)
    parts = [
        ("adapter_model.bin", table, adapters, {}, "", None),
        ("non_lora_trainables.bin", projector, weights, {}, llava.PREFIXES[0], None),
    ]
    towers, carried = tower_variables(model), model.carried.get("llava_rad", model.carried.get("open_clip", {}))
    checkpoint = f"{TOWER}_checkpoint.pt"
    parts.append((checkpoint, open_clip.table(clip), towers, carried, "module.", "state_dict"))
    hashes = _write_torch(folder, parts, dtype, progress)
    texts = {
        "config.json": _llava_config(model, checkpoint),
        "adapter_config.json": _adapter_config(model, spec),
        f"{TOWER}.json": _clip_config(model, clip),
    }
    return hashes | _texts(folder, texts)


def write_open_clip(folder: Path, model: Exported, dtype: str, progress: Progress) -> dict[str, str]:
    """`open_clip_model.safetensors` and `open_clip_config.json`: both towers of stage 1.

    Raises:
        UserError: the towers are not both there, or the image tower is none that timm has a name for.
    """
    clip, towers = _clip(model), tower_variables(model)
    table, carried = open_clip.table(clip), model.carried.get("open_clip", model.carried.get("llava_rad", {}))
    plan = shards.in_dtype(tables.outline(table, towers, carried), dtype)
    hashes = shards.write(folder, plan, tables.store(table, towers, carried), "open_clip_model", progress=progress)
    config = _clip_config(model, clip)
    whole = config if "model_cfg" in config else {"model_cfg": config, "preprocess_cfg": _preprocess(clip)}
    return hashes | _texts(folder, {"open_clip_config.json": whole})


def _write_torch(folder: Path, parts: Sequence[Item], dtype: str, progress: Progress) -> dict[str, str]:
    """torch files, each of one table."""
    hashes = {}
    for file, table, tree, extra, prefix, under in parts:
        plan = shards.in_dtype(tables.outline(table, tree, extra), dtype)
        hashes[file] = torch_zip.write(
            folder / file,
            {prefix + name: shape for name, (shape, _) in plan.items()},
            _cast(tables.store(table, tree, extra), plan, prefix, progress),
            {prefix + name: kind.name for name, (_, kind) in plan.items()},
            under,
        )
    return hashes


def _adapters(model: Exported) -> tuple[LoraSpec, tables.Table, Mapping[str, Any]]:
    if model.config is None or model.config.lora is None or "lora" not in model.variables:
        raise UserError(
            "there are no LoRA adapters in this checkpoint: export a run of stage 3, or a base that has them."
        )
    spec = model.config.lora
    return spec, peft_lora.table(model.config.llm, spec), model.variables["lora"]["llm"]


def _clip(model: Exported) -> ClipConfig:
    if model.clip is None:
        raise UserError(
            "there is no text tower beside the image tower: export a run that was made on stage 1, or on a converted "
            "open_clip checkpoint."
        )
    return model.clip


def tower_variables(model: Exported) -> dict[str, Any]:
    """The variables of stage 1."""
    params = model.variables["params"]
    bias = ("logit_bias",) if _clip(model).loss == "sigmoid" else ()
    return {key: params[key] for key in ("vision", "text", "vision_head", "text_head", "logit_scale", *bias)}


def _cast(
    tensors: Iterator[tuple[str, np.ndarray]], plan: shards.Plan, prefix: str, progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors:
        tensor = shards.cast(name, tensor, plan[name][1])
        progress(tensor.nbytes)
        yield prefix + name, tensor


def _adapter_config(model: Exported, spec: LoraSpec) -> dict[str, Any]:
    """The fields that peft 0.4, which LLaVA-Rad pins, knows; newer versions read them too."""
    found = model.configs.get("adapter_config.json", {})
    return {
        "auto_mapping": None,
        "base_model_name_or_path": found.get("base_model_name_or_path", BASE_MODEL),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "revision": None,
        "target_modules": [f"{target}_proj" for target in spec.targets],
        "task_type": "CAUSAL_LM",
    }


def _llava_config(model: Exported, checkpoint: str) -> dict[str, Any]:
    """LLaVA-Rad's `config.json`: the language model's fields and those of the image."""
    config = model.config
    assert config is not None and config.vision is not None
    return {
        **hf_text_config(config.llm),
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_vision_tower": "biomedclip_cxr_518",
        "mm_vision_tower_config": f"{TOWER}.json",
        "mm_vision_tower_checkpoint": checkpoint,
        "mm_hidden_size": config.vision.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_vision_select_feature": "patch",
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": None,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
    }


def _clip_config(model: Exported, clip: ClipConfig) -> dict[str, Any]:
    """open_clip's model configuration: the one that came with the weights, or one that describes them; of a model with a bias, with a bias."""
    config = _described(model, clip)
    if clip.loss == "sigmoid":
        inner = {"init_logit_bias": -10.0, **config.get("model_cfg", config)}
        return {**config, "model_cfg": inner} if "model_cfg" in config else inner
    return config


def _described(model: Exported, clip: ClipConfig) -> dict[str, Any]:
    for config in model.configs.values():
        if isinstance(config, dict) and "vision_cfg" in config.get("model_cfg", config):
            vision = config.get("model_cfg", config)["vision_cfg"]
            if vision.get("image_size") == clip.vision.image_size:
                return config
    v = clip.vision
    name = TRUNKS.get((v.patch_size, v.width, v.depth, v.layer_scale))
    if name is None:
        raise UserError(
            f"timm has no name for an image tower of patch size {v.patch_size}, width {v.width} and depth {v.depth}: "
            "open_clip could not build it."
        )
    return {
        "embed_dim": clip.embed_dim,
        "vision_cfg": {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": v.image_size},
        "text_cfg": {
            "hf_model_name": BIOMEDBERT,
            "hf_tokenizer_name": BIOMEDBERT,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "hf_model_pretrained": False,
            "context_length": 256,
        },
    }


def _preprocess(clip: ClipConfig) -> dict[str, Any]:
    return {"mean": list(clip.vision.pixel_mean), "std": list(clip.vision.pixel_std), "interpolation": "bicubic"}


def _texts(folder: Path, texts: Mapping[str, Any]) -> dict[str, str]:
    for name, contents in texts.items():
        (folder / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return {name: sources.sha256(folder / name) for name in texts}
