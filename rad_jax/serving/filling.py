"""A bundle's tensors, as they come, into the places where the engine computes with them: nothing is held twice."""

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from rad_jax.errors import UserError
from rad_jax.serving.bundle import Bundle, Decoder, Tower
from rad_jax.serving.model import Layer, Weights
from rad_jax.serving.weights import BLOCK, Dense, Int8, Matrix, Nf4, Scratch

Tensor: TypeAlias = torch.Tensor
_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.(.+)\.weight")
_TOWER_BLOCK = re.compile(r"vision_tower\.(?:vision_model\.)?encoder\.layers?\.(\d+)\.(.+)")
_TOWER_STEM = {
    "embeddings.cls_token": "class_token",
    "embeddings.class_embedding": "class_token",
    "embeddings.position_embeddings": "positions",
    "embeddings.position_embedding.weight": "positions",
    "embeddings.patch_embeddings.projection.weight": "patches.weight",
    "embeddings.patch_embeddings.projection.bias": "patches.bias",
    "embeddings.patch_embedding.weight": "patches.weight",
    "embeddings.patch_embedding.bias": "patches.bias",
    "pre_layrnorm.weight": "pre_norm.weight",
    "pre_layrnorm.bias": "pre_norm.bias",
}
# Of a block: their names, Dinov2's first, and ours; a number is the third of the joint matrix of queries, keys and values.
_TOWER_PARTS = (
    (r"attention\.attention\.query|self_attn\.q_proj", "qkv", 0),
    (r"attention\.attention\.key|self_attn\.k_proj", "qkv", 1),
    (r"attention\.attention\.value|self_attn\.v_proj", "qkv", 2),
    (r"attention\.output\.dense|self_attn\.out_proj", "out", None),
    (r"norm1|layer_norm1", "norm1", None),
    (r"norm2|layer_norm2", "norm2", None),
    (r"mlp\.fc1", "fc1", None),
    (r"mlp\.fc2", "fc2", None),
)
_UNUSED = re.compile(
    r"vision_tower\.(?:vision_model\.)?(?:embeddings\.(?:mask_token|position_ids)|(?:post_)?layernorm\..*|head\..*)"
)


def fill(
    bundle: Bundle, dtype: torch.dtype, device: Any, kind: str | None, progress: Callable[[int], object]
) -> Weights:
    """Loads all weights.

    Args:
        bundle: checked.
        dtype: that is computed in, and stored where `kind` is None.
        device: of the weights.
        kind: of the decoder's matrices, one of `weights.KINDS` or None.
        progress: called with the bytes of each tensor.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or a width that NF4 has no blocks for.
    """
    filler = _Filler(bundle, dtype, device, kind)
    try:
        for name, tensor in bundle.tensors():
            filler.put(name, tensor)
            progress(tensor.numel() * tensor.element_size())
    except (RuntimeError, LookupError) as error:  # torch's word for shapes that do not fit
        raise UserError(
            f"{bundle.folder}: its weights are not of the model that config.json names ({error})."
        ) from error
    return filler.finished()


class _Filler:
    def __init__(self, bundle: Bundle, dtype: torch.dtype, device: Any, kind: str | None):
        self._bundle, self._like = bundle, {"dtype": dtype, "device": device}
        self._scratch = Scratch(dtype, device)
        self._kind = kind
        c = bundle.decoder
        new = self._matrix
        self._layers = [
            Layer(
                attn_norm=torch.empty(c.width, **self._like),
                qkv=new((c.heads + 2 * c.kv_heads) * c.head_dim, c.width),
                out=new(c.width, c.heads * c.head_dim),
                mlp_norm=torch.empty(c.width, **self._like),
                gate_up=new(2 * c.mlp_dim, c.width),
                down=new(c.width, c.mlp_dim),
            )
            for _ in range(c.depth)
        ]
        self._whole: dict[str, Tensor] = {}
        self._vision: dict[str, Tensor] = {}
        self._missing = set(expected(c, bundle.tower))

    def put(self, name: str, tensor: Tensor) -> None:
        if found := _LAYER.fullmatch(name):
            self._put_layer(self._layers[int(found[1])], found[2], tensor)
        elif name == "language_model.lm_head.weight":
            head = Dense((len(tensor), tensor.shape[1]), **self._like)
            head.put(0, tensor)
            self._whole[name] = head.turned
        elif name.startswith("language_model."):
            self._whole[name] = self._placed(tensor)
        elif name.startswith("multi_modal_projector."):
            self._vision[name.replace("multi_modal_projector", "projector")] = self._placed(tensor)
        elif found := _TOWER_BLOCK.fullmatch(name):
            if int(found[1]) >= self._bundle.tower.blocks:
                return
            self._put_block(int(found[1]), found[2], tensor)
        elif _UNUSED.fullmatch(name):
            return
        else:
            key = _TOWER_STEM[re.sub(r"vision_tower\.(vision_model\.)?", "", name)]
            self._vision[key] = self._placed(tensor.flatten(1) if key == "patches.weight" else tensor)
        self._missing.discard(re.sub(r"\.vision_model\.", ".", name))

    def finished(self) -> Weights:
        if self._missing:
            few = ", ".join(sorted(self._missing)[:3])
            raise UserError(
                f"{self._bundle.folder}: {len(self._missing)} tensors are missing ({few} ...): export it again."
            )
        embedding = self._whole["language_model.model.embed_tokens.weight"]
        head = embedding.t() if self._bundle.decoder.tied else self._whole["language_model.lm_head.weight"]
        return Weights(embedding, self._layers, self._whole["language_model.model.norm.weight"], head, self._vision)

    def _put_layer(self, layer: Layer, part: str, tensor: Tensor) -> None:
        c = self._bundle.decoder
        q, k = c.heads * c.head_dim, c.kv_heads * c.head_dim
        matrices: dict[str, tuple[Matrix, int]] = {
            "self_attn.q_proj": (layer.qkv, 0),
            "self_attn.k_proj": (layer.qkv, q),
            "self_attn.v_proj": (layer.qkv, q + k),
            "self_attn.o_proj": (layer.out, 0),
            "mlp.gate_proj": (layer.gate_up, 0),
            "mlp.up_proj": (layer.gate_up, c.mlp_dim),
            "mlp.down_proj": (layer.down, 0),
        }
        if part in matrices:
            matrix, row = matrices[part]
            matrix.put(row, tensor)
        else:
            gains = {"input_layernorm": layer.attn_norm, "post_attention_layernorm": layer.mlp_norm}
            gains[part].copy_(tensor)

    def _put_block(self, block: int, name: str, tensor: Tensor) -> None:
        b = f"blocks.{block}."
        if found := re.fullmatch(r"layer_scale(\d)\.lambda1", name):
            if not bool((tensor == 1).all()):  # a tower without LayerScale has ones
                self._vision[f"{b}scale{found[1]}"] = self._placed(tensor)
            return
        part, _, what = name.rpartition(".")
        ours, third = next((ours, third) for theirs, ours, third in _TOWER_PARTS if re.fullmatch(theirs, part))
        if third is None:
            self._vision[f"{b}{ours}.{what}"] = self._placed(tensor)
            return
        rows = len(tensor)
        joint = self._vision.setdefault(f"{b}qkv.{what}", torch.empty((3 * rows, *tensor.shape[1:]), **self._like))
        joint[third * rows : (third + 1) * rows].copy_(tensor)

    def _placed(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, **self._like).copy_(tensor)

    def _matrix(self, rows: int, columns: int) -> Matrix:
        if self._kind is None:
            return Dense((rows, columns), **self._like)
        if self._kind == "int8":
            return Int8((rows, columns), self._scratch, self._like["device"])
        if columns % BLOCK:
            raise UserError(
                f"NF4 has blocks of {BLOCK} entries, but a matrix of this model has {columns} columns: use int8."
            )
        return Nf4((rows, columns), self._scratch, self._like["device"])


def expected(decoder: Decoder, tower: Tower) -> list[str]:
    """Names of all tensors that the engine needs, without `vision_model.`."""
    names = ["language_model.model.embed_tokens.weight", "language_model.model.norm.weight"]
    names += [] if decoder.tied else ["language_model.lm_head.weight"]
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names += [f"language_model.model.layers.{i}.{part}.weight" for i in range(decoder.depth) for part in parts]
    names += [f"multi_modal_projector.linear_{i}.{what}" for i in (1, 2) for what in ("weight", "bias")]
    if tower.kind == "dinov2":
        stem = [
            "cls_token",
            "position_embeddings",
            "patch_embeddings.projection.weight",
            "patch_embeddings.projection.bias",
        ]
        attention = [f"attention.attention.{p}" for p in ("query", "key", "value")] + ["attention.output.dense"]
        block, layer = [*attention, "norm1", "norm2", "mlp.fc1", "mlp.fc2"], "encoder.layer"
        rest = ["layer_scale1.lambda1", "layer_scale2.lambda1"]
    else:
        stem = ["patch_embedding.weight", "position_embedding.weight"]
        stem += ["class_embedding"] if tower.class_token else ["patch_embedding.bias"]
        block, layer = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")], "encoder.layers"
        block, rest = [*block, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"], []
    names += [f"vision_tower.embeddings.{name}" for name in stem]
    names += [f"vision_tower.pre_layrnorm.{what}" for what in ("weight", "bias") if tower.kind == "clip_vision_model"]
    rest += [f"{part}.{what}" for part in block for what in ("weight", "bias")]
    return names + [f"vision_tower.{layer}.{i}.{name}" for i in range(tower.blocks) for name in rest]
