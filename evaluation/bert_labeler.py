"""A BERT with one classifier per finding, in JAX: what CheXbert is (Smit et al. 2020), for a checkpoint that the user brings.

The class token of the last layer, without pooler, goes through 14 linear heads: four classes each (blank, positive, negative, uncertain), and
two for No Finding. Nothing here is of CheXbert's code, and no weights come with it; any checkpoint of that shape will do. Its tensors are
found by form, not by name: one BERT under some prefix, and beside it matrices of the encoder's width, in the order of their numbers.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation import encoder
from evaluation.labels import CLASSES
from rad_jax.errors import UserError
from rad_jax.prompts import Tokenizer, load_tokenizer

HEADS = (4,) * 13 + (2,)


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

        read = encoder.read(weights)
        self.config, self.sha256 = read.config, read.sha256
        self.tokenizer: Tokenizer = load_tokenizer(vocabulary)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{vocabulary} has more words than the model in {weights}: give the vocabulary it was trained with"
            )
        self._devices = encoder.Devices()
        self._params = self._devices.whole({"encoder": read.params, "heads": _heads(read, weights)})
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
        most = min(self.config.max_positions, encoder.LENGTHS[-1]) - 2
        words = self.tokenizer.encode(" ".join(text.split()))[:most]
        return [self.tokenizer.bos_id, *words, self.tokenizer.eos_id]

    def logits(self, texts: Sequence[str], batch_size: int = encoder.BATCH) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [n, 54] and class tokens [n, D] of n texts."""
        import jax

        encoded = [self.encode(text) for text in texts]
        size = self._devices.batch(batch_size)
        logits = np.zeros((len(texts), sum(HEADS)), np.float32)
        cls = np.zeros((len(texts), self.config.width), np.float32)
        lengths = [len(ids) for ids in encoded]
        with tqdm(total=len(texts), desc="labelling", unit="report", disable=None) as bar:
            for length, index in encoder.buckets(lengths, self.config.max_positions, size):
                rows = self._devices.fitting(len(index), size)
                batch = encoder.padded([encoded[i] for i in index], rows, length, self.tokenizer.pad_id)
                found = self._apply(self._params, *self._devices.rows(batch))
                for into, values in zip((logits, cls), jax.device_get(found), strict=True):
                    into[index] = values[: len(index)]
                bar.update(len(index))
        return logits, cls

    def label(self, texts: Sequence[str], batch_size: int = encoder.BATCH) -> Labels:
        """Codes, margins and class tokens of n texts."""
        logits, cls = self.logits(texts, batch_size)
        parts = np.split(logits, np.cumsum(HEADS)[:-1], axis=1)
        codes = np.stack([part.argmax(axis=1) for part in parts], axis=1).astype(np.int8)
        best = [np.sort(part, axis=1) for part in parts]
        return Labels(codes, np.stack([part[:, -1] - part[:, -2] for part in best], axis=1), cls)


def _heads(read: encoder.Encoder, path: Path) -> dict[str, np.ndarray]:
    """kernel float32 [D, 54] and bias [54] of all heads side by side, from tensors of any names."""
    others, config = read.others, read.config
    names = sorted((n for n, value in others.items() if value.ndim == 2), key=_natural)
    sizes = tuple(others[name].shape[0] for name in names)
    biases = [name.removesuffix("weight") + "bias" for name in names]
    if sizes != HEADS or any(b not in others for b in biases) or any(others[n].shape[1] != config.width for n in names):
        raise UserError(
            f"{path}: beside the encoder stand matrices of {list(sizes)} classes instead of {len(CLASSES)} heads of {list(HEADS)}"
        )
    kernel = np.concatenate([others[name].astype(np.float32) for name in names]).T
    return {"kernel": kernel, "bias": np.concatenate([others[name].astype(np.float32) for name in biases])}


def _natural(name: str) -> list[Any]:
    """Sorts "heads.10" after "heads.9"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
