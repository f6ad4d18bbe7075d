"""BERT and RoBERTa encoders from checkpoints that the user brings, and batches of texts by length: what the BERT labeler, BERTScore and RadGraph share.

Nothing is known of a checkpoint but its tensors: one encoder under some prefix, whose shape they tell. A config.json beside it may say how many
heads and which epsilon it has; else heads are 64 wide and epsilon is that of the family. RoBERTa has one segment where BERT has two, and its
positions count from 2.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop import hf_bert, sources, tables
from rad_jax.models.bert import BertConfig

LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512)  # texts are padded to the next of these, one compilation each
BATCH = 64
_WORDS = "embeddings.word_embeddings.weight"
_ROBERTA_FIRST = 2  # position of RoBERTa's first token; the rows before are padding's


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder and what else its checkpoint holds.

    params: of `rad_jax.models.bert.Bert`; others: the tensors beside the encoder, by name; sha256: of the weights file.
    """

    config: BertConfig
    params: Any
    others: dict[str, np.ndarray]
    family: str  # "bert" or "roberta"
    sha256: str


def read(weights: Path, layer: int | None = None) -> Encoder:
    """The encoder of a checkpoint (`rad_jax.interop.sources.open_source`), up to its `layer`-th layer or all of it.

    Raises UserError when the file cannot be read, or holds none or several encoders.
    """
    source = sources.open_source(weights)
    prefixes = [name.removesuffix(_WORDS) for name in source if name.endswith(_WORDS)]
    if len(prefixes) != 1:
        raise UserError(f"{weights} holds {len(prefixes)} BERT encoders: give the checkpoint of one BERT")
    prefix = prefixes[0]
    bert = {name.removeprefix(prefix): source[name] for name in source if name.startswith(prefix)}
    others = {name: source[name] for name in source if not name.startswith(prefix)}
    config_file = (weights if weights.is_dir() else weights.parent) / "config.json"
    said = sources.read_json(config_file) if config_file.is_file() else {}
    segments = bert["embeddings.token_type_embeddings.weight"].shape[0]
    family = "roberta" if segments == 1 else "bert"
    if family == "roberta":
        name = "embeddings.position_embeddings.weight"
        bert[name] = bert[name][_ROBERTA_FIRST:]
    depth = len({name.split(".")[2] for name in bert if name.startswith("encoder.layer.")})
    if layer is not None and not 1 <= layer <= depth:
        raise UserError(f"{weights} has {depth} layers: layer {layer} is none of them")
    used = {n: x for n, x in bert.items() if not n.startswith("encoder.layer.") or int(n.split(".")[2]) < (layer or depth)}  # fmt: skip
    width = bert[_WORDS].shape[1]
    config = BertConfig(
        vocab_size=bert[_WORDS].shape[0],
        width=width,
        depth=layer or depth,
        heads=int(said.get("num_attention_heads", max(1, width // 64))),
        mlp_dim=bert["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_positions=bert["embeddings.position_embeddings.weight"].shape[0],
        token_types=segments,
        eps=float(said.get("layer_norm_eps", 1e-5 if family == "roberta" else 1e-12)),
    )
    digest = sources.sha256(source.files[0])
    return Encoder(config, tables.load(hf_bert.table(config), used), others, family, digest)


class Devices:
    """All devices: weights whole on each, rows of a batch spread over them."""

    def __init__(self) -> None:
        import jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.array(jax.devices()), ("data",))
        self.count = mesh.size
        self._rows, self._whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def whole(self, tree: Any) -> Any:
        import jax

        return jax.device_put(tree, self._whole)

    def rows(self, tree: Any) -> Any:
        import jax

        return jax.device_put(tree, self._rows)

    def batch(self, size: int) -> int:
        """`size`, rounded up to a multiple of the devices."""
        return -(-size // self.count) * self.count

    def fitting(self, rows: int, size: int) -> int:
        """What a batch of so many rows is filled up to: `size`, or half of it, or a quarter, down to one row a device; one compilation each."""
        while size % 2 == 0 and size // 2 >= rows and (size // 2) % self.count == 0:
            size //= 2
        return size


def buckets(lengths: Sequence[int], most: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(length to pad to, positions) of batches of at most `size` items of like length; each padded length is one of `LENGTHS`, at most `most`."""
    order = np.argsort(lengths, kind="stable")
    ends = sorted({min(length, most) for length in LENGTHS})
    for low, end in zip([0, *ends], ends, strict=False):
        own = [i for i in order if low < lengths[i] <= end]
        for start in range(0, len(own), size):
            yield end, np.array(own[start : start + size])


def padded(rows: Sequence[Sequence[int]], size: int, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [size, length] and lengths int32 [size] of at most `size` rows; rows that fill up have length 1."""
    tokens, counts = np.full((size, length), pad, np.int32), np.ones(size, np.int32)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = ids
        counts[i] = len(ids)
    return tokens, counts


def matrix(others: Mapping[str, np.ndarray], name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [in, out] and bias [out], float32, of a torch linear layer. Raises UserError where it is missing."""
    for part in (f"{name}.weight", f"{name}.bias"):
        if part not in others:
            raise UserError(f"{path}: no tensor {part}")
    return others[f"{name}.weight"].astype(np.float32).T, others[f"{name}.bias"].astype(np.float32)
