"""A BERT with one classifier per finding, in JAX: what CheXbert is (Smit et al. 2020), for a checkpoint that the user brings.

The class token of the last layer, without pooler, goes through 14 linear heads: four classes each (blank, positive, negative, uncertain), and
two for No Finding. Nothing here is of CheXbert's code, and no weights come with it; any checkpoint of that shape will do. Its tensors are
found by form, not by name: one BERT under some prefix, and beside it matrices of the encoder's width, in the order of their numbers.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation.labels import CLASSES
from rad_jax.errors import UserError
from rad_jax.prompts import Tokenizer, load_tokenizer

HEADS = (4,) * 13 + (2,)
LENGTHS = (64, 128, 256, 512)  # texts are padded to the next of these, one compilation each
BATCH = 64
_WORDS = "embeddings.word_embeddings.weight"


@dataclasses.dataclass(frozen=True)
class Labels:
    """codes int8 [n, 14]; margin float32 [n, 14], by how much each winning logit beats the next; cls float32 [n, D], the class tokens."""

    codes: np.ndarray
    margin: np.ndarray
    cls: np.ndarray


class BertLabeler:
    """Weights, tokenizer and the compiled model. Batches are spread over all devices.

    Args:
        weights: a checkpoint (`rad_jax.interop.sources.open_source`); torch files are read without running code in them.
        vocabulary: vocab.txt of uncased BERT.

    Raises:
        UserError: no such files, or another shape than 14 heads of `HEADS` on one BERT.
    """

    def __init__(self, weights: Path, vocabulary: Path) -> None:
        import jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from rad_jax.interop import sources

        tensors = dict(sources.open_source(weights))
        self.config, self._params = _read(tensors, weights)
        self.tokenizer: Tokenizer = load_tokenizer(vocabulary)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{vocabulary} has more words than the model in {weights}: give the vocabulary it was trained with"
            )
        mesh = Mesh(np.array(jax.devices()), ("data",))
        self._devices = mesh.size
        self._by_row = NamedSharding(mesh, PartitionSpec("data"))
        self._params = jax.device_put(self._params, NamedSharding(mesh, PartitionSpec()))
        self._apply = jax.jit(self._logits)

    def _logits(self, params: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
        """Logits float32 [B, 54] of all heads side by side and class tokens [B, D], from tokens int32 [B, T]."""
        import jax.numpy as jnp

        from rad_jax.models.bert import Bert

        hidden = Bert(self.config).apply({"params": params["encoder"]}, tokens, lengths)
        cls = jnp.asarray(hidden)[:, 0].astype(jnp.float32)  # a near-tie between classes must not hang on bfloat16
        logits = jnp.matmul(cls, params["heads"]["kernel"], precision="highest") + params["heads"]["bias"]
        return logits, cls

    def encode(self, text: str) -> list[int]:
        """[CLS], the words of the text with its white space collapsed, [SEP]; at most as many as the model has positions."""
        most = min(self.config.max_positions, LENGTHS[-1]) - 2
        words = self.tokenizer.encode(" ".join(text.split()))[:most]
        return [self.tokenizer.bos_id, *words, self.tokenizer.eos_id]

    def logits(self, texts: Sequence[str], batch_size: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [n, 54] and class tokens [n, D] of n texts."""
        import jax

        encoded = [self.encode(text) for text in texts]
        size = -(-batch_size // self._devices) * self._devices
        logits = np.zeros((len(texts), sum(HEADS)), np.float32)
        cls = np.zeros((len(texts), self.config.width), np.float32)
        with tqdm(total=len(texts), desc="labelling", unit="report", disable=None) as bar:
            for index, tokens, lengths in _batches(encoded, self.config.max_positions, size, self.tokenizer.pad_id):
                found = self._apply(self._params, *jax.device_put((tokens, lengths), self._by_row))
                for into, values in zip((logits, cls), jax.device_get(found), strict=True):
                    into[index] = values[: len(index)]
                bar.update(len(index))
        return logits, cls

    def label(self, texts: Sequence[str], batch_size: int = BATCH) -> Labels:
        """Codes, margins and class tokens of n texts."""
        logits, cls = self.logits(texts, batch_size)
        parts = np.split(logits, np.cumsum(HEADS)[:-1], axis=1)
        codes = np.stack([part.argmax(axis=1) for part in parts], axis=1).astype(np.int8)
        best = [np.sort(part, axis=1) for part in parts]
        return Labels(codes, np.stack([part[:, -1] - part[:, -2] for part in best], axis=1), cls)


def _batches(
    encoded: Sequence[Sequence[int]], most: int, size: int, pad: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions, tokens int32 [B, T] and lengths [B]; texts of like length together, the last batch of a length filled up to `size`."""
    order = np.argsort([len(ids) for ids in encoded], kind="stable")
    lengths = sorted({min(length, most) for length in LENGTHS})
    for low, length in zip([0, *lengths], lengths, strict=False):
        own = [i for i in order if low < len(encoded[i]) <= length]
        for start in range(0, len(own), size):
            index = np.array(own[start : start + size])
            tokens, counts = np.full((size, length), pad, np.int32), np.ones(size, np.int32)
            for row, i in enumerate(index):
                tokens[row, : len(encoded[i])] = encoded[i]
                counts[row] = len(encoded[i])
            yield index, tokens, counts


def _read(tensors: dict[str, np.ndarray], path: Path) -> tuple[Any, Any]:
    """Configuration and parameters of the encoder and the heads, from tensors of any names."""
    from rad_jax.interop import hf_bert, tables
    from rad_jax.models.bert import BertConfig

    prefixes = [name.removesuffix(_WORDS) for name in tensors if name.endswith(_WORDS)]
    if len(prefixes) != 1:
        raise UserError(
            f"{path} holds {len(prefixes)} BERT encoders: give the checkpoint of one BERT with {len(HEADS)} heads"
        )
    prefix = prefixes[0]
    bert = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    config = BertConfig(
        vocab_size=bert[_WORDS].shape[0],
        width=bert[_WORDS].shape[1],
        depth=len({name.split(".")[2] for name in bert if name.startswith("encoder.layer.")}),
        heads=max(1, bert[_WORDS].shape[1] // 64),
        mlp_dim=bert["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_positions=bert["embeddings.position_embeddings.weight"].shape[0],
        token_types=bert["embeddings.token_type_embeddings.weight"].shape[0],
    )
    others = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    names = sorted((n for n, value in others.items() if value.ndim == 2), key=_natural)
    sizes = tuple(others[name].shape[0] for name in names)
    biases = [name.removesuffix("weight") + "bias" for name in names]
    if sizes != HEADS or any(b not in others for b in biases) or any(others[n].shape[1] != config.width for n in names):
        raise UserError(
            f"{path}: beside the encoder stand matrices of {list(sizes)} classes instead of {len(CLASSES)} heads of {list(HEADS)}"
        )
    kernel = np.concatenate([others[name].astype(np.float32) for name in names]).T
    heads = {"kernel": kernel, "bias": np.concatenate([others[name].astype(np.float32) for name in biases])}
    return config, {"encoder": tables.load(hf_bert.table(config), bert), "heads": heads}


def _natural(name: str) -> list[Any]:
    """Sorts "heads.10" after "heads.9"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
