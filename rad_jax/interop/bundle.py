"""A trained model as a folder that transformers loads without code of ours: LlavaForConditionalGeneration with a Dinov2 tower.

config.json, generation_config.json             the model
model-*.safetensors, model.safetensors.index.json
preprocessor_config.json, processor_config.json the way of an image
tokenizer.json, tokenizer_config.json           the way of the words
chat_template.jinja, chat_template.json         LLaVA's `v1` conversation
rad_jax.json                                    format version, provenance, hashes
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax import FORMAT_VERSION, __version__, images, lora
from rad_jax.errors import UserError
from rad_jax.interop import hf_llava, hf_tokenizer, shards, tables
from rad_jax.interop.hf_tokenizer import BundleTokenizer
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import VitConfig
from rad_jax.prompts import SYSTEM

RECORD = "rad_jax.json"
MAX_NEW_TOKENS = 256  # of LLaVA-Rad's evaluation
ROW_MULTIPLE = 64

# Contents are a text or a list of parts, as in the chat interface; the image comes first, whatever its place among the parts.
CHAT_TEMPLATE = (
    "{%- set system = '" + SYSTEM.replace("'", "\\'") + "' -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] -%}"
    "{%- set system = first if first is string else first[0]['text'] -%}"
    "{%- set messages = messages[1:] -%}"
    "{%- endif -%}"
    "{{- system + ' ' -}}"
    "{%- for message in messages -%}"
    "{{- 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- ' ' if message['role'] == 'user' else eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def write(
    folder: Path,
    variables: Mapping[str, Any],
    config: LlavaConfig,
    tokenizer_path: Path,
    dtype: str,
    provenance: Mapping[str, Any],
    tower: Mapping[str, Any] | None = None,
) -> None:
    """Writes the bundle. `interop.verify.verify` says whether PyTorch makes the same of it.

    Args:
        folder: empty, exists.
        variables: `params` with `vision`, `projector` and `llm`, and `lora` where `config` has adapters, which are merged. Other parts
            (text tower, heads) are left out.
        config: of the model.
        tokenizer_path: of the language model.
        dtype: "float16" or "float32", of all weights.
        provenance: what the weights came from; goes into `rad_jax.json`.
        tower: parameters of the whole image tower, final norm included, where those in `variables` end at the chosen block.

    Raises:
        UserError: a model that the format cannot hold, parameters that do not fit `config`, or no whole tower.
    """
    if config.vision is None:
        raise UserError("a language model alone cannot be exported as LLaVA: export a run of stage 2 or 3.")
    if dtype not in shards.DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(shards.DTYPES)}.")
    tokenizer = hf_tokenizer.build(tokenizer_path, config.llm.vocab_size)
    rows = -(-max(config.llm.vocab_size, tokenizer.size) // ROW_MULTIPLE) * ROW_MULTIPLE
    params = merged(variables, config)
    tree = {
        "vision": whole_tower(params["vision"], tower, config.vision),
        "projector": params["projector"],
        "llm": with_rows(params["llm"], rows),
    }
    whole = dataclasses.replace(
        config,
        llm=dataclasses.replace(config.llm, vocab_size=rows),
        vision=dataclasses.replace(config.vision, feature_layer=None),
    )
    table = hf_llava.table(whole)
    hashes = shards.write(folder, table.shapes(), tables.store(table, tree), dtype)
    for name, text in text_files(config, tokenizer, rows, dtype).items():
        (folder / name).write_text(text, encoding="utf-8")
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    record = {
        "format_version": FORMAT_VERSION,
        "rad_jax": __version__,
        "dtype": dtype,
        "vocab_size": config.llm.vocab_size,
        "lora": None if config.lora is None else {**dataclasses.asdict(config.lora), "merged": True},
        "provenance": dict(provenance),
        "files": hashes,
    }
    (folder / RECORD).write_text(_dumps(record), encoding="utf-8")


def merged(variables: Mapping[str, Any], config: LlavaConfig) -> dict[str, Any]:
    """The parameters with adapters folded in.

    Raises:
        UserError: the config has adapters and the variables have none.
    """
    params = dict(variables["params"])
    if config.lora is None:
        return params
    if "lora" not in variables:
        raise UserError("the config has LoRA adapters but the checkpoint has none: export the run that trained them.")
    return lora.merge(params, variables["lora"], config.lora)


def whole_tower(used: Mapping[str, Any], tower: Mapping[str, Any] | None, config: VitConfig) -> dict[str, Any]:
    """The image tower with all its blocks and its final norm; the blocks that features are taken from are those in `used`.

    Raises:
        UserError: blocks or norm are in neither.
    """
    depth = tables.flatten(used)["blocks/norm1/scale"].shape[0]
    if depth == config.depth and "norm" in used:
        return dict(used)
    rest = dict(tower or {})
    if "norm" not in rest or tables.flatten(rest)["blocks/norm1/scale"].shape[0] != config.depth:
        raise UserError(
            f"the image tower ends at block {depth} of {config.depth}, but the bundle holds all blocks and the final norm: "
            "give the run of stage 1 (or the imported tower) that has them."
        )
    leaves = tables.flatten(rest)
    for path, leaf in tables.flatten(used).items():
        later = np.asarray(leaves[path])[depth:] if path.startswith("blocks/") else None
        leaves[path] = leaf if later is None else np.concatenate([np.asarray(leaf), later.astype(leaf.dtype)])
    return tables.unflatten(leaves)


def with_rows(llm: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The decoder with embedding and head filled up with zeros to `rows` rows."""
    embedding, kernel = np.asarray(llm["embed"]["embedding"]), np.asarray(llm["head"]["kernel"])
    more = rows - embedding.shape[0]
    return {
        **llm,
        "embed": {"embedding": np.pad(embedding, ((0, more), (0, 0)))},
        "head": {"kernel": np.pad(kernel, ((0, 0), (0, more)))},
    }


def text_files(config: LlavaConfig, tokenizer: BundleTokenizer, rows: int, dtype: str) -> dict[str, str]:
    """All files of the bundle but the weights and the record, by name."""
    vision = config.vision
    assert vision is not None
    size = {"height": vision.image_size, "width": vision.image_size}
    # A zero row of the head gives the logit 0, not minus infinity, so ids that are no text are named.
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
        "max_new_tokens": MAX_NEW_TOKENS,
        "suppress_tokens": sorted({tokenizer.image_id, tokenizer.pad_id, *range(config.llm.vocab_size, rows)}),
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(float(x), 8) for x in images.MEAN],
        "image_std": [round(float(x), 8) for x in images.STD],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": 1,  # the class token, which "default" takes away again
        "vision_feature_select_strategy": "default",
        "image_token": hf_tokenizer.IMAGE,
    }
    return {
        "config.json": _dumps(model_config(config, tokenizer, rows, dtype)),
        "generation_config.json": _dumps(generation),
        "preprocessor_config.json": _dumps(preprocessor),
        "processor_config.json": _dumps(processor),
        "tokenizer.json": tokenizer.text,
        "tokenizer_config.json": _dumps(tokenizer.settings(config.llm.max_positions)),
        "chat_template.jinja": CHAT_TEMPLATE,
        "chat_template.json": _dumps({"chat_template": CHAT_TEMPLATE}),
    }


def model_config(config: LlavaConfig, tokenizer: BundleTokenizer, rows: int, dtype: str) -> dict[str, Any]:
    """The contents of `config.json`, for transformers 4 (`torch_dtype`) and 5 (`dtype`).

    Raises:
        UserError: a tower that Dinov2Config cannot describe.
    """
    vision, llm = config.vision, config.llm
    assert vision is not None
    if vision.mlp_dim % vision.width or vision.feature_layer is None:
        raise UserError("the exported tower needs an mlp_dim that is a multiple of its width, and a feature_layer.")
    vision_config = {
        "model_type": "dinov2",
        "hidden_size": vision.width,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "mlp_ratio": vision.mlp_dim // vision.width,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.eps,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "use_mask_token": True,
        "use_swiglu_ffn": False,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    text_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": rows,
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_dim,
        "num_hidden_layers": llm.depth,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "max_position_embeddings": llm.max_positions,
        "rms_norm_eps": llm.eps,
        "rope_theta": llm.rope_theta,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "tie_word_embeddings": False,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.image_id,
        "image_seq_length": vision.patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "dtype": dtype,
        "vision_config": vision_config,
        "text_config": text_config,
    }


def _dumps(contents: Mapping[str, Any]) -> str:
    return json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
