"""A trained model as a folder that transformers loads without code of ours: LlavaForConditionalGeneration with a Dinov2, CLIP or SigLIP tower.

config.json, generation_config.json             the model
model-*.safetensors, model.safetensors.index.json
preprocessor_config.json, processor_config.json the way of an image
tokenizer.json, tokenizer_config.json           the way of the words
chat_template.jinja, chat_template.json         LLaVA's `v1` conversation
README.md                                       model card
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop import foreign_configs, hf_llama, hf_llava, hf_tokenizer, layouts, shards, tables
from rad_jax.interop.exported import Exported
from rad_jax.interop.hf_tokenizer import BundleTokenizer
from rad_jax.lazy import LazyArray
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import VitConfig
from rad_jax.prompts import SYSTEM

MAX_NEW_TOKENS = 256  # of LLaVA-Rad's evaluation
ROW_MULTIPLE = 64
ADAPTER = "adapter"  # folder within a bundle whose adapters are not merged
CARD = """---
license: other
library_name: transformers
pipeline_tag: image-text-to-text
---
Findings of a chest radiograph, exported by rad_jax. For research; not a medical device, not for diagnosis.

Licence: that of the weights and data it was made from. Vicuna: Llama 2 Community License. LLaVA-Rad and BiomedCLIP-CXR: research only.

Load the processor with `AutoProcessor.from_pretrained(folder, backend="pil")`: the model was trained with Pillow's resampling. What the
weights came from and how they compare with the model they were exported from is in `receipt.json`.
"""

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


def write(folder: Path, model: Exported, dtype: str, progress: Callable[[int], object]) -> dict[str, str]:
    """Writes the bundle, tensor by tensor. `interop.verify.verify` says whether PyTorch makes the same of it.

    Args:
        folder: empty, exists.
        model: what is exported; adapters are merged. Without an image tower it becomes a LlamaForCausalLM.
        dtype: a key of `shards.TARGETS`.
        progress: called with the bytes of each tensor once it is written.

    Returns:
        sha256 of each file, by its name.

    Raises:
        UserError: a model that the format cannot hold, weights that do not fit `model.config`, or no whole tower.
    """
    return _write(folder, model, model.merged(), dtype, progress)


def write_with_adapter(folder: Path, model: Exported, dtype: str, progress: Callable[[int], object]) -> dict[str, str]:
    """The bundle of the weights under the adapters, and `adapter/` with these for peft. Arguments, result and errors as of `write`."""
    hashes = _write(folder, model, model.variables["params"], dtype, progress)
    (folder / ADAPTER).mkdir()
    within = "model.language_model.layers." if model.config and model.config.vision else "model.layers."
    adapter = layouts.write_peft(folder / ADAPTER, model, dtype, progress, within)
    return hashes | {f"{ADAPTER}/{name}": digest for name, digest in adapter.items()}


def _write(
    folder: Path, model: Exported, params: Mapping[str, Any], dtype: str, progress: Callable[[int], object]
) -> dict[str, str]:
    config = model.config
    if dtype == "keep" and params is not model.variables["params"] and config is not None and config.lora is not None:
        raise UserError("merged adapters have no dtype of their own to keep: export with --dtype=float16 or float32.")
    if config is None:
        raise UserError("towers alone are no language model: export a run of stage 2 or 3, or --format=open_clip.")
    if config.vision is None:
        table, tree, carried = hf_llama.table(config.llm, model.tied), params["llm"], model.carried.get("hf_llama", {})
        texts = language_files(model)
    else:
        tokens = special_tokens(model)
        wide = dataclasses.replace(config.llm, vocab_size=tokens.rows)
        vision = dataclasses.replace(config.vision, feature_layer=None)
        table = hf_llava.table(dataclasses.replace(config, llm=wide, vision=vision), tied=model.tied)
        tree = {
            "vision": whole_tower(params["vision"], config.vision),
            "projector": params["projector"],
            "llm": with_rows(params["llm"], tokens.rows),
        }
        carried = model.carried.get("hf_llava", {})
        texts = text_files(config, tokens, model.tied)
    plan = shards.in_dtype(tables.outline(table, tree, carried), dtype)
    stored = plan[table.entries[0].name][1].name
    if stored == "bfloat16":
        raise UserError("a bundle in bfloat16 does not run on a V100: export with --dtype=float16 or float32.")
    for key in ("dtype", "torch_dtype"):  # transformers 5, and 4
        texts["config.json"][key] = stored
    hashes = shards.write(folder, plan, tables.store(table, tree, carried), progress=progress)
    texts["README.md"] = CARD
    for name, contents in texts.items():
        data = (
            contents
            if isinstance(contents, bytes)
            else (contents if isinstance(contents, str) else _dumps(contents)).encode()
        )
        (folder / name).write_bytes(data)
        hashes[name] = hashlib.sha256(data).hexdigest()
    return hashes


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Rows of the embedding, the ids a bundle's settings name, and its tokenizer if there is one."""

    rows: int
    image_id: int
    pad_id: int
    bos_id: int
    eos_id: int
    used: int
    tokenizer: BundleTokenizer | None


def special_tokens(model: Exported) -> SpecialTokens:
    """`<image>` and `<pad>` where the vocabulary has them, else behind it, with zero rows up to a multiple of 64."""
    assert model.config is not None
    rows, source = model.config.llm.vocab_size, model.configs.get("config.json", {})
    own = source.get("image_token_index", source.get("image_token_id"))  # of a Hugging Face LLaVA
    if model.tokenizer is None:
        image = rows if own is None else own
        text = source.get("text_config", source)
        ids = image, text.get("pad_token_id") or image, text.get("bos_token_id") or 1, text.get("eos_token_id") or 2
        used, tokenizer = max(rows, image + 1), None
    else:
        tokenizer = hf_tokenizer.build(model.tokenizer, rows, own)
        ids, used = (tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id), tokenizer.size
    return SpecialTokens(rows if used <= rows else -(-used // ROW_MULTIPLE) * ROW_MULTIPLE, *ids, used, tokenizer)


def whole_tower(tower: Mapping[str, Any], config: VitConfig) -> dict[str, Any]:
    """The image tower with all its blocks and its final norm.

    Raises:
        UserError: it ends at the block that features are taken from.
    """
    depth = tower["blocks"]["norm1"]["scale"].shape[0]
    if depth != config.depth or "norm" not in tower:
        raise UserError(
            f"the image tower ends at block {depth} of {config.depth}, but the bundle holds all blocks and the final norm: "
            "train on a --base that has them (a run of stage 1, or a converted tower)."
        )
    return dict(tower)


def with_rows(llm: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The decoder with embedding and head filled up with zeros to `rows` rows."""
    embedding, kernel = llm["embed"]["embedding"], llm["head"]["kernel"]
    more = rows - embedding.shape[0]
    if not more:
        return dict(llm)

    def padded(array: Any, widths: tuple[tuple[int, int], ...], shape: tuple[int, int]) -> LazyArray:
        return LazyArray(shape, np.dtype(array.dtype), lambda _: np.pad(np.asarray(array), widths), stacked=False)

    return {
        **llm,
        "embed": {"embedding": padded(embedding, ((0, more), (0, 0)), (rows, embedding.shape[1]))},
        "head": {"kernel": padded(kernel, ((0, 0), (0, more)), (kernel.shape[0], rows))},
    }


def language_files(model: Exported) -> dict[str, Any]:
    """All files but the weights of a language model alone; its own `config.json` where it came with one."""
    assert model.config is not None
    files: dict[str, Any] = {"config.json": dict(model.configs.get("config.json") or {})}
    if not files["config.json"]:
        files["config.json"] = foreign_configs.hf_text_config(model.config.llm)
    if model.tokenizer is not None:
        files |= hf_tokenizer.alone(model.tokenizer, model.config.llm.max_positions)
    return files


def text_files(config: LlavaConfig, tokens: SpecialTokens, tied: bool) -> dict[str, Any]:
    """All files of the bundle but the weights, by name: text, or what becomes JSON. Without a tokenizer there is no processor either."""
    vision = config.vision
    assert vision is not None
    size = {"height": vision.image_size, "width": vision.image_size}
    # A zero row of the head gives the logit 0, not minus infinity, so ids that are no text are named.
    generation = {
        "bos_token_id": tokens.bos_id,
        "eos_token_id": tokens.eos_id,
        "pad_token_id": tokens.pad_id,
        "do_sample": False,
        "max_new_tokens": MAX_NEW_TOKENS,
        "suppress_tokens": sorted({tokens.image_id, tokens.pad_id, *range(tokens.used, tokens.rows)} - {tokens.eos_id}),
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
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),  # which "default" takes away again
        "vision_feature_select_strategy": _strategy(vision),
        "image_token": hf_tokenizer.IMAGE,
    }
    files: dict[str, Any] = {
        "config.json": model_config(config, tokens, tied),
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
    }
    if tokens.tokenizer is not None:
        files |= {
            "processor_config.json": processor,
            "tokenizer.json": tokens.tokenizer.text,
            "tokenizer_config.json": tokens.tokenizer.settings(config.llm.max_positions),
            "chat_template.jinja": CHAT_TEMPLATE,
            "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        }
    return files


def model_config(config: LlavaConfig, tokens: SpecialTokens, tied: bool) -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
        UserError: a tower that transformers cannot describe.
    """
    vision, llm = config.vision, config.llm
    assert vision is not None
    if vision.feature_layer is None:
        raise UserError("the exported tower needs a feature_layer.")
    text_config = foreign_configs.hf_text_config(dataclasses.replace(llm, vocab_size=tokens.rows)) | {
        "bos_token_id": tokens.bos_id,
        "eos_token_id": tokens.eos_id,
        "pad_token_id": tokens.pad_id,
        "tie_word_embeddings": tied,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokens.image_id,
        "image_seq_length": vision.patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": _strategy(vision),
        "tie_word_embeddings": tied,
        "vision_config": foreign_configs.hf_vision_config(vision),
        "text_config": text_config,
    }


def _strategy(vision: VitConfig) -> str:
    """transformers' word for dropping the first token, or not."""
    return "default" if vision.class_token else "full"


def _dumps(contents: Mapping[str, Any]) -> str:
    return json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
