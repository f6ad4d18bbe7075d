"""What an exported bundle says of itself: its settings as the engine needs them, its files checked, its tensors one by one."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rad_jax.errors import UserError, check_format

RECEIPT = "receipt.json"
_CHUNK = 1 << 24  # bytes hashed at once


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A Llama. `scaling` is `rope_scaling` of its configuration, or None."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_dim: int
    eps: float
    theta: float
    scaling: Mapping[str, Any] | None
    max_positions: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class Tower:
    """An image tower up to the block whose output is used; later blocks are not loaded."""

    kind: Literal["dinov2", "clip_vision_model", "siglip_vision_model"]
    image_size: int
    patch_size: int
    width: int
    blocks: int
    heads: int
    mlp_dim: int
    eps: float
    activation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def side(self) -> int:
        """Patches of a row."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def class_token(self) -> bool:
        return self.kind != "siglip_vision_model"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A checked bundle. `sha256` is of its manifest, and so of all its files; `suppressed` are ids that are no text."""

    folder: Path
    sha256: str
    dtype: str
    decoder: Decoder
    tower: Tower
    eos_ids: frozenset[int]
    suppressed: tuple[int, ...]
    files: tuple[Path, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, from the files' headers alone."""
        from safetensors import safe_open

        found: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            with safe_open(path, framework="np") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return found

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Name and torch tensor of all tensors, each a view of the mapped file that holds it."""
        from safetensors import safe_open

        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)


def read(folder: Path, progress: Callable[[int], object] = lambda size: None) -> Bundle:
    """Reads the settings of a bundle after comparing every file with its hash.

    Args:
        folder: that `launch.export --format=hf` made.
        progress: called with the bytes that were compared.

    Raises:
        UserError: not a bundle, a file that is missing or changed, or a model that this engine does not run.
    """
    record = check_files(folder, progress)
    _refuse_others(folder, record)
    config, generation, images = (
        _json(folder / name) for name in ("config.json", "generation_config.json", "preprocessor_config.json")
    )
    files = tuple(
        sorted(folder / name for name in record["files"] if name.endswith(".safetensors") and "/" not in name)
    )
    if (folder / "adapter").is_dir():
        raise UserError(f"{folder}: the adapters lie beside the weights: export with --format=hf, which merges them.")
    try:
        text = config["text_config"]
        eos = generation["eos_token_id"]
        return Bundle(
            folder=folder,
            sha256=hashlib.sha256((folder / RECEIPT).read_bytes()).hexdigest(),
            dtype=config["dtype"],
            decoder=_decoder(text),
            tower=_tower(config, images),
            eos_ids=frozenset([eos] if isinstance(eos, int) else eos),
            suppressed=tuple(generation.get("suppress_tokens") or ()),
            files=files,
        )
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: its settings are not those of an exported bundle ({error!r}): export it again."
        ) from error


def check_files(folder: Path, progress: Callable[[int], object] = lambda size: None) -> dict[str, Any]:
    """The contents of `receipt.json`, after comparing every file that it names with its hash.

    Raises:
        UserError: there is no record, it is of another format version, or a file is missing or changed.
    """
    record = _json(folder / RECEIPT)
    check_format(record.get("format_version"), folder / RECEIPT)
    for name, expected in record["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: export the bundle again.")
        if _sha256(folder / name, progress) != expected:
            raise UserError(
                f"{folder / name} is not the file that was exported (its hash differs): export the bundle again."
            )
    return record


def _refuse_others(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuses another format, and files beside those that were compared: nothing is read that nobody vouches for."""
    if record.get("format", "hf") not in ("hf", "hf_adapter"):
        raise UserError(f"{folder} has the format {record['format']}, which is not served: export with --format=hf.")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != RECEIPT and name not in record["files"]:
            raise UserError(f"{path} is not part of the bundle: remove it, or export the bundle again.")


def _sha256(path: Path, progress: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.parent} is not an exported bundle: {path.name} is missing or damaged.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path.parent} is not an exported bundle: {path.name} is no JSON object.")
    return found


def _decoder(text: Mapping[str, Any]) -> Decoder:
    _only(text, "model_type", "llama")
    _only(text, "hidden_act", "silu")
    _only(text, "attention_bias", False)
    _only(text, "mlp_bias", False)
    scaling = text.get("rope_scaling")
    if scaling is not None:
        _only(scaling, "rope_type", "linear", "llama3")
    return Decoder(
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        depth=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        mlp_dim=text["intermediate_size"],
        eps=text["rms_norm_eps"],
        theta=text["rope_theta"],
        scaling=scaling,
        max_positions=text["max_position_embeddings"],
        tied=text["tie_word_embeddings"],
    )


def _tower(config: Mapping[str, Any], images: Mapping[str, Any]) -> Tower:
    _only(config, "model_type", "llava")
    _only(config, "projector_hidden_act", "gelu")
    vision = config["vision_config"]
    _only(vision, "model_type", "dinov2", "clip_vision_model", "siglip_vision_model")
    _only(vision, "hidden_act", "gelu", "gelu_pytorch_tanh", "quick_gelu")
    _only(vision, "use_swiglu_ffn", False)
    kind = vision["model_type"]
    _only(config, "vision_feature_select_strategy", "full" if kind == "siglip_vision_model" else "default")
    layer, width = config["vision_feature_layer"], vision["hidden_size"]
    return Tower(
        kind=kind,
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=width,
        blocks=layer if layer >= 0 else vision["num_hidden_layers"] + 1 + layer,
        heads=vision["num_attention_heads"],
        mlp_dim=vision["intermediate_size"] if "intermediate_size" in vision else width * vision["mlp_ratio"],
        eps=vision["layer_norm_eps"],
        activation=vision["hidden_act"],
        mean=tuple(images["image_mean"]),
        std=tuple(images["image_std"]),
    )


def _only(config: Mapping[str, Any], key: str, *supported: Any) -> None:
    value = config.get(key, supported[0])
    if value not in supported:
        raise UserError(f"the bundle has {key} = {value!r}, but only {', '.join(map(repr, supported))} is served.")
