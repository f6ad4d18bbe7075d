"""Every format that is read: which files it has, which of our models they describe, and the tables that read them."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax.checkpoint import Run
from rad_jax.errors import UserError
from rad_jax.interop import (
    foreign_configs,
    hf_bert,
    hf_clip_vision,
    hf_dinov2,
    hf_llama,
    hf_llava,
    hf_siglip_vision,
    llama2c,
    llava,
    open_clip,
    openai_clip,
    peft_lora,
    timm_vit,
)
from rad_jax.interop.sources import Source, open_source, read_json
from rad_jax.interop.tables import Table
from rad_jax.lora import TARGETS, LoraSpec
from rad_jax.models.llama import LlamaConfig
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import VitConfig

Tensors = Mapping[str, np.ndarray]
_DERIVED = re.compile(
    r".*rotary_emb\.inv_freq"
)  # follows from the config; written by old versions, refused by new ones


@dataclasses.dataclass(frozen=True)
class Opened:
    """A foreign checkpoint before anything of it is read.

    Attributes:
        model: what goes to `config.model`.
        parts: tables whose paths are those of our variables ("params/llm/..."), each with its tensors.
        files: all that is read, for the record of hashes.
        configs: configuration files by name, kept for the way out.
    """

    model: dict[str, Any]
    parts: tuple[tuple[Table, Tensors], ...]
    files: tuple[Path, ...]
    configs: dict[str, Any]

    @property
    def dropped(self) -> tuple[str, ...]:
        """Tensors that are neither used nor carried, because they follow from the config."""
        return tuple(name for _, tensors in self.parts for name in tensors if _DERIVED.fullmatch(name))


def _hf_llama(path: Path, _: Sequence[Run]) -> Opened:
    config, source = read_json(path / "config.json"), open_source(path)
    llm = foreign_configs.llama(config)
    table = hf_llama.table(llm, tied=foreign_configs.tied(config)).under("params/llm/", "")
    return Opened({"llm": _fields(llm)}, ((table, source),), source.files, {"config.json": config})


def _meta(path: Path, _: Sequence[Run]) -> Opened:
    config, tensors = llama2c.read(path)
    return Opened({"llm": _fields(config)}, ((llama2c.table(config).under("params/llm/", ""), tensors),), (path,), {})


def _hf_llava(path: Path, _: Sequence[Run]) -> Opened:
    config = read_json(path / "config.json")
    _expect(path, config, "vision_feature_select_strategy", "default", "full")
    _expect(path, config, "projector_hidden_act", "gelu")
    _expect(path, config, "multimodal_projector_bias", True)
    if not isinstance(config.get("vision_feature_layer"), int):
        raise UserError(
            f"{path}: vision_feature_layer is {config.get('vision_feature_layer')!r}; features of one block are read."
        )
    source = open_source(path).renamed(_old_llava_names)
    tied = foreign_configs.tied(config)
    llm, vision = foreign_configs.llama(config["text_config"]), _hf_tower(path, config["vision_config"])
    level = hf_clip_vision.level(n.removeprefix("vision_tower.") for n in source if n.startswith("vision_tower."))
    table = hf_llava.table(LlavaConfig(llm, vision), level, tied).under("params/", "")
    model = {"vision": {**_fields(vision), "feature_layer": config["vision_feature_layer"]}, "llm": _fields(llm)}
    return Opened(model, ((table, source),), source.files, {"config.json": config})


def _hf_tower(path: Path, config: Mapping[str, Any]) -> VitConfig:
    kinds = {
        "dinov2": foreign_configs.dinov2,
        "clip_vision_model": foreign_configs.clip_vision,
        "siglip_vision_model": foreign_configs.siglip_vision,
    }
    kind = config.get("model_type", "clip_vision_model")  # LLaVA-1.5's tower when nothing is said
    if kind not in kinds:
        raise UserError(f"{path}: an image tower of model_type {kind!r}; {', '.join(kinds)} are read.")
    return kinds[kind](config, _preprocessor(path))


def _old_llava_names(name: str) -> str:
    """transformers 5's names with the level `model.` to those it writes."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def _dinov2(path: Path, _: Sequence[Run]) -> Opened:
    config, source = read_json(path / "config.json"), open_source(path)
    vision = foreign_configs.dinov2(config, _preprocessor(path))
    return _tower(vision, hf_dinov2.table(vision), source, {"config.json": config})


def _siglip(path: Path, _: Sequence[Run]) -> Opened:
    config, source = read_json(path / "config.json"), open_source(path)
    vision = foreign_configs.siglip_vision(config, _preprocessor(path))
    return _tower(vision, hf_siglip_vision.table(vision, hf_clip_vision.level(source)), source, {"config.json": config})


def _clip(path: Path, bases: Sequence[Run]) -> Opened:
    if not path.is_dir() or not (path / "config.json").is_file():
        return _open_clip(path, bases)  # OpenAI's layout
    config, source = read_json(path / "config.json"), open_source(path)
    vision = foreign_configs.clip_vision(config, _preprocessor(path))
    table = hf_clip_vision.table(vision, hf_clip_vision.level(source))
    return _tower(vision, table, source, {"config.json": config})


def _open_clip(path: Path, _: Sequence[Run]) -> Opened:
    source = open_source(path).renamed(lambda name: name.removeprefix("module."))
    if not any(name.startswith("visual.") for name in source):
        vision = _timm_config(source)
        return _tower(vision, timm_vit.table(vision), source, {})
    return _clip_towers(source, *_open_clip_config(path if path.is_dir() else path.parent))


def _clip_towers(source: Source, name: str, config: dict[str, Any]) -> Opened:
    clip = foreign_configs.open_clip(config, {key: tensor.shape for key, tensor in source.items()}, Path(name).stem)
    if isinstance(clip, VitConfig):
        return _tower(clip, openai_clip.table(clip), source, {name: config})
    model = {"vision": _fields(clip.vision), "text": _fields(clip.text), "embed_dim": clip.embed_dim, "loss": clip.loss}
    return Opened(model, ((open_clip.table(clip).under("params/", ""), source),), source.files, {name: config})


def _open_clip_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The model's configuration beside the weights, under whatever name it has there."""
    for file in sorted(folder.glob("*.json"), key=lambda file: (file.name != "open_clip_config.json", file.name)):
        if file.name.endswith(".index.json"):
            continue
        config = read_json(file)
        if "vision_cfg" in config.get("model_cfg", config):
            return file.name, config
    raise UserError(f"{folder} has no open_clip configuration (open_clip_config.json, with vision_cfg): put it there.")


def _timm_config(source: Source) -> VitConfig:
    """A bare timm trunk described by its tensors; heads are 64 wide, as in all of timm's ViTs of these layouts."""
    try:
        (width, channels, patch, _), (_, tokens, _) = source.shape("patch_embed.proj.weight"), source.shape("pos_embed")
        mlp = source.shape("blocks.0.mlp.fc1.weight")[0]
    except (KeyError, ValueError):
        raise UserError(
            f"{source.path}: neither an open_clip model (visual.*) nor a timm vision transformer."
        ) from None
    depth = 1 + max(int(name.split(".")[1]) for name in source if name.startswith("blocks."))
    grid = round((tokens - 1) ** 0.5)
    if channels != 3 or width % 64 or grid * grid != tokens - 1:
        raise UserError(f"{source.path}: not a vision transformer with heads of 64, a class token and a square image.")
    scaled = "blocks.0.ls1.gamma" in source
    return VitConfig(grid * patch, patch, width, depth, width // 64, mlp, layer_scale=scaled)


def _bert(path: Path, _: Sequence[Run]) -> Opened:
    config = read_json(path / "config.json")
    source = open_source(path).renamed(_bert_name)
    text = foreign_configs.bert(config)
    table = hf_bert.table(text).under("params/text/", "")
    # A masked language model's or a classifier's head stands beside the encoder.
    table = dataclasses.replace(table, ignored=(*table.ignored, r"cls\..*", r"classifier\..*"))
    return Opened({"text": _fields(text)}, ((table, source),), source.files, {"config.json": config})


def _bert_name(name: str) -> str:
    """BERT's names, the old ones of its norms included."""
    return re.sub(
        r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    ).removeprefix("bert.")


def _peft(path: Path, bases: Sequence[Run]) -> Opened:
    return _adapter(path, _base_llm(path, bases))


def _adapter(path: Path, llm: LlamaConfig) -> Opened:
    config, source = read_json(path / "adapter_config.json"), open_source(path, peft_lora.FILES)
    spec = lora_spec(path, config)
    source = source.renamed(peft_lora.plain_name)
    table = peft_lora.table(llm, spec).under("lora/llm/", "")
    shapes = table.shapes()
    first = f"{peft_lora.PREFIX}model.layers.0.{'self_attn.q' if 'q' in spec.targets else 'mlp.up'}_proj.lora_A.weight"
    if first in source and first in shapes and source.shape(first) != shapes[first]:
        (rank, width), (expected_rank, expected) = source.shape(first), shapes[first]
        if rank != expected_rank:
            raise UserError(
                f"{path}: the tensors have rank {rank}, adapter_config.json says r={expected_rank}: files of two adapters."
            )
        raise UserError(
            f"{path}: an adapter for a model of width {width}, but the base has width {expected}: give its own --base."
        )
    depth = 1 + max((int(m[1]) for name in source if (m := re.search(r"\.layers\.(\d+)\.", name))), default=0)
    if depth != llm.depth:
        raise UserError(f"{path}: an adapter for {depth} layers, but the base has {llm.depth}: give its own --base.")
    configs = {"adapter_config.json": config}
    return Opened({"llm": _fields(llm), "lora": _fields(spec)}, ((table, source),), source.files, configs)


def lora_spec(path: Path, config: Mapping[str, Any]) -> LoraSpec:
    """peft's `adapter_config.json`.

    Raises:
        UserError: a kind of adapter that is not plain LoRA on the decoder's projections.
    """
    _expect(path, config, "peft_type", "LORA")
    _expect(path, config, "bias", "none")
    for key in (
        "use_dora",
        "use_rslora",
        "fan_in_fan_out",
        "modules_to_save",
        "layers_to_transform",
        "rank_pattern",
        "alpha_pattern",
    ):
        if config.get(key):
            raise UserError(
                f"{path / 'adapter_config.json'}: {key} = {config[key]!r}; plain LoRA on whole layers is read."
            )
    names = config.get("target_modules")
    if isinstance(names, str):  # "all-linear", or a regular expression over full names
        layers = ("model.layers.0", "model.language_model.layers.0")  # of a language model alone, of one in a LLaVA
        paths = {t: [f"{layer}.{peft_lora.block(t)}.{t}_proj" for layer in layers] for t in TARGETS}
        every = names == "all-linear"
        targets = tuple(t for t in TARGETS if every or any(re.fullmatch(names, path) for path in paths[t]))
    else:
        targets = tuple(t for t in TARGETS if f"{t}_proj" in (names or []))
        unknown = set(names or []) - {f"{t}_proj" for t in TARGETS}
        if unknown:
            raise UserError(
                f"{path / 'adapter_config.json'}: adapters on {', '.join(sorted(unknown))} have no place here."
            )
    if not targets:
        raise UserError(
            f"{path / 'adapter_config.json'}: target_modules names none of {', '.join(f'{t}_proj' for t in TARGETS)}."
        )
    return LoraSpec(config["r"], float(config["lora_alpha"]), float(config.get("lora_dropout") or 0.0), targets)


def _llava_rad(path: Path, bases: Sequence[Run]) -> Opened:
    """The original's several files: adapter, projector and tower; a projector alone (`mm_projector.bin`); or a merged model."""
    if path.is_file() or not (path / "config.json").is_file():
        file = path if path.is_file() else path / "mm_projector.bin"
        return _projector(file, _base_llm(path, bases))
    config = read_json(path / "config.json")
    for key, value in (
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_vision_select_feature", "patch"),
        ("mm_use_im_start_end", False),
        ("mm_use_im_patch_token", False),
    ):
        _expect(path, config, key, value)
    if (path / "adapter_config.json").is_file():
        llm = _base_llm(path, bases)
        language = _adapter(path, llm)
        projector = _projector(path / "non_lora_trainables.bin", llm)
    else:
        llm = foreign_configs.llama({**config, "model_type": "llama"})
        source = open_source(path)
        own = source.renamed(lambda n: None if n.startswith(llava.PREFIX) else n)
        table = hf_llama.table(llm, tied=foreign_configs.tied(config)).under("params/llm/", "")
        # A tower saved with the rest is not the one that is loaded: the original builds it from its own files.
        table = dataclasses.replace(table, ignored=(*table.ignored, r"model\.vision_tower\..*"))
        language = Opened({"llm": _fields(llm)}, ((table, own),), source.files, {})
        projector = _projector_of(source.renamed(lambda n: n if n.startswith(llava.PREFIX) else None), llm)
    opened = [language, projector]
    if config.get("mm_vision_tower_checkpoint"):
        tower = path / Path(str(config["mm_vision_tower_checkpoint"])).name
        if not tower.is_file():
            raise UserError(f"{path} lacks {tower.name}, the image tower that its config.json names; half-downloaded?")
        name = Path(str(config["mm_vision_tower_config"])).name
        source = open_source(tower).renamed(lambda n: n.removeprefix("module."))
        opened.append(_clip_towers(source, name, read_json(path / name)))
    model: dict[str, Any] = {}
    for part in opened:
        model |= part.model
    if "vision" in model:
        model["vision"]["feature_layer"] = int(config["mm_vision_select_layer"])
    configs = {"config.json": config} | {name: c for part in opened for name, c in part.configs.items()}
    return Opened(
        model,
        tuple(pair for part in opened for pair in part.parts),
        tuple(dict.fromkeys(file for part in opened for file in part.files)),
        configs,
    )


def _projector(file: Path, llm: LlamaConfig) -> Opened:
    return _projector_of(open_source(file), llm)


def _projector_of(source: Source, llm: LlamaConfig) -> Opened:
    prefix = next((p for p in llava.PREFIXES if f"{p}0.weight" in source), "")
    named = source.renamed(lambda name: name.removeprefix(prefix))
    if "0.weight" not in named or named["0.weight"].ndim != 2:
        raise UserError(f"{source.path}: no projector (mm_projector.0.weight, mm_projector.2.weight) is in it.")
    out, width = named.shape("0.weight")
    if out != llm.width:
        raise UserError(
            f"{source.path}: a projector to width {out}, but the base has width {llm.width}: give its own --base."
        )
    return Opened({}, ((llava.projector(width, out).under("params/projector/", ""), named),), source.files, {})


def _base_llm(path: Path, bases: Sequence[Run]) -> LlamaConfig:
    """The language model that an adapter or a projector was made for, from the bases given."""
    for run in reversed(bases):
        if "llm" in run.config["model"]:
            return LlamaConfig(**run.config["model"]["llm"])
    raise UserError(
        f"{path} holds no language model of its own: give the base it was trained on (Vicuna, converted) in --base."
    )


def _tower(vision: VitConfig, table: Table, source: Source, configs: dict[str, Any]) -> Opened:
    return Opened({"vision": _fields(vision)}, ((table.under("params/vision/", ""), source),), source.files, configs)


def _preprocessor(path: Path) -> dict[str, Any] | None:
    """Settings of the image processor, from its own file or, as transformers 5 writes them, within the processor's."""
    file, whole = path / "preprocessor_config.json", path / "processor_config.json"
    if file.is_file():
        return read_json(file)
    return read_json(whole).get("image_processor") if whole.is_file() else None


def _expect(path: Path, config: Mapping[str, Any], key: str, *values: Any) -> None:
    if key in config and config[key] not in values:
        allowed = " or ".join(map(repr, values))
        raise UserError(f"{path}: {key} is {config[key]!r}; only {allowed} is read.")


def _fields(config: Any) -> dict[str, Any]:
    """A model's config as JSON, without what only says how it is computed."""
    operational = ("dtype", "remat", "unroll", "attention", "rope", "flat_adapters", "int8", "stacked")
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in operational}


FORMATS: dict[str, Callable[[Path, Sequence[Run]], Opened]] = {
    "hf_llama": _hf_llama,
    "hf_llava": _hf_llava,
    "open_clip": _open_clip,
    "clip": _clip,
    "siglip": _siglip,
    "dinov2": _dinov2,
    "llava_rad": _llava_rad,
    "peft": _peft,
    "bert": _bert,
    "meta": _meta,
}
