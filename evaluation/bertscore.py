"""BERTScore (Zhang et al., ICLR 2020) and SembScore: likeness of two texts in the vectors of an encoder.

BERTScore: every word piece of one text is matched with the most similar piece of the other by the cosine of their states in one layer;
precision is the mean over the candidate's pieces, recall over the reference's. The class and end tokens can be matched with but do not count
themselves, as in the package bert-score 0.3.13. Pieces may be weighted by how rare they are in a corpus that is fixed beforehand
(`Frequencies`): a table made of the call's own references is refused by design, for with one reference it weighs every piece 0. Rescaling
maps the score of unrelated texts to 0; the constants belong to one model and layer. An empty text scores as an unrelated one.

SembScore (Yu et al. 2023): the cosine of CheXbert's class tokens.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation import encoder
from rad_jax.errors import UserError
from rad_jax.prompts import Tokenizer, load_tokenizer

LAYER = 5
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What unrelated English texts score: precision, recall and F1 of bert-score's tables."""

    name: str
    scores: tuple[float, float, float]


# By family, width and depth of the whole model, at layer `LAYER`.
BASELINES = {("roberta", 768, 6): Baseline("distilroberta-base", (0.84732, 0.847595, 0.8473319))}


@dataclasses.dataclass(frozen=True)
class Frequencies:
    """How many texts of a fixed corpus hold each piece: counts by id, of `texts` texts; `digest` names the corpus in signatures."""

    texts: int
    counts: Counter[int]
    digest: str

    def weight(self, piece: int) -> float:
        """Logarithm of (texts + 1) / (texts with the piece + 1)."""
        return float(np.log((self.texts + 1) / (self.counts[piece] + 1)))


class BertScore:
    """An encoder ready to compare texts. Batches are spread over all devices.

    Args:
        folder: with the weights and tokenizer.json (RoBERTa) or vocab.txt (BERT), and config.json where heads are not 64 wide.
        layer: whose states are compared; the rest of the model is not run.

    Raises:
        UserError: a file is missing, or weights and tokenizer do not belong together.
    """

    def __init__(self, folder: Path, layer: int = LAYER) -> None:
        import jax

        read = encoder.read(folder, layer)
        names = [name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()]
        if not names:
            raise UserError(f"{folder} has no tokenizer.json and no vocab.txt: add what came with the weights")
        self.tokenizer: Tokenizer = load_tokenizer(folder / names[0])
        if self.tokenizer.vocab_size > read.config.vocab_size:
            raise UserError(f"{folder}: {names[0]} has more words than the weights: they do not belong together")
        self.config, self.family, self.sha256, self.layer = read.config, read.family, read.sha256, layer
        self._devices = encoder.Devices()
        self._params = self._devices.whole(read.params)
        self._apply = jax.jit(self._match)
        whole = len({name.split("encoder.layer.")[1].split(".")[0] for name in _names(folder)})
        self.baseline = BASELINES.get((self.family, self.config.width, whole)) if layer == LAYER else None

    def signature(self, frequencies: Frequencies | None) -> str:
        """What decides the number, without the texts."""
        idf = "none" if frequencies is None else f"{frequencies.texts}-texts-{frequencies.digest[:8]}"
        rescaled = "no" if self.baseline is None else self.baseline.name
        return f"bertscore|model:{self.sha256[:8]}|layer:{self.layer}|idf:{idf}|rescaled:{rescaled}|empty:unrelated|agg:mean"

    def encode(self, text: str) -> list[int]:
        """Ids with the class and the end token; at most as many as the model has positions. RoBERTa's first word starts with a blank, too."""
        most = min(self.config.max_positions, encoder.LENGTHS[-1]) - 2
        plain = text.strip()
        words = self.tokenizer.encode(f" {plain}" if self.family == "roberta" and plain else plain)[:most]
        return [self.tokenizer.bos_id, *words, self.tokenizer.eos_id]

    def frequencies(self, texts: Sequence[str], digest: str) -> Frequencies:
        """Piece counts of a corpus. Raises UserError for fewer than two texts: then every piece of a text weighs nothing."""
        if len(texts) < 2:
            raise UserError("frequencies of words need a corpus: give a file of many reports")
        counts: Counter[int] = Counter()
        for text in texts:
            counts.update(set(self.encode(text)))
        return Frequencies(len(texts), counts, digest)

    def score(
        self, candidates: Sequence[str], references: Sequence[str], frequencies: Frequencies | None = None
    ) -> np.ndarray:
        """Precision, recall and F1, float64 [n, 3], of n pairs; rescaled where the model's `baseline` is known."""
        import jax

        pairs = [(self.encode(c), self.encode(r)) for c, r in zip(candidates, references, strict=True)]
        lengths = [max(map(len, pair)) for pair in pairs]
        size = self._devices.batch(_BATCH)
        raw = np.zeros((len(pairs), 2))
        with tqdm(total=len(pairs), desc="BERTScore", unit="pair", disable=None) as bar:
            for length, index in encoder.buckets(lengths, self.config.max_positions, size):
                sides, filled = [], self._devices.fitting(len(index), size)
                for side in (0, 1):
                    rows = [pairs[i][side] for i in index]
                    tokens, counts = encoder.padded(rows, filled, length, self.tokenizer.pad_id)
                    sides.append((tokens, counts, self._weights(rows, filled, length, frequencies)))
                found = jax.device_get(self._apply(self._params, *self._devices.rows(sides)))
                raw[index] = np.stack(found, axis=1)[: len(index)]
                bar.update(len(index))
        total = raw.sum(axis=1)
        f1 = np.divide(2 * raw[:, 0] * raw[:, 1], total, out=np.zeros(len(raw)), where=total != 0)
        scores = np.concatenate([raw, f1[:, None]], axis=1)
        empty = [len(c) == 2 or len(r) == 2 for c, r in pairs]
        if self.baseline is None:
            scores[empty] = 0.0
            return scores
        unrelated = np.array(self.baseline.scores)
        scores[empty] = unrelated
        return (scores - unrelated) / (1 - unrelated)

    def _weights(
        self, rows: Sequence[Sequence[int]], size: int, length: int, frequencies: Frequencies | None
    ) -> np.ndarray:
        """Shares float32 [size, length] of the pieces of each row; nothing for the first, the last and padding."""
        out = np.zeros((size, length), np.float32)
        for row, ids in zip(out, rows, strict=False):
            inner = ids[1:-1]
            own = [1.0] * len(inner) if frequencies is None else [frequencies.weight(i) for i in inner]
            if inner and not sum(own) > 0:
                own = [1.0] * len(inner)  # all of its words stand in every text of the corpus
            row[1 : len(ids) - 1] = np.array(own) / max(sum(own), 1e-12)
        return out

    def _match(self, params: Any, candidate: Any, reference: Any) -> tuple[Any, Any]:
        """Precision and recall float32 [B], from (tokens int32 [B, T], lengths [B], weights [B, T]) of both sides."""
        import jax.numpy as jnp

        from rad_jax.models.bert import Bert

        def unit(tokens: Any, lengths: Any) -> Any:
            states = jnp.asarray(Bert(self.config).apply({"params": params}, tokens, lengths)).astype(jnp.float32)
            return states / jnp.linalg.norm(states, axis=-1, keepdims=True)

        (tokens, lengths, weights), (other_tokens, other_lengths, other_weights) = candidate, reference
        own, other = unit(tokens, lengths), unit(other_tokens, other_lengths)
        cosines = jnp.einsum("btd,bsd->bts", own, other, precision="highest")
        at = jnp.arange(tokens.shape[1])
        forth = jnp.where(at[None, None] < other_lengths[:, None, None], cosines, -1.0).max(axis=2)
        back = jnp.where(at[None, :, None] < lengths[:, None, None], cosines, -1.0).max(axis=1)
        return (forth * weights).sum(axis=1), (back * other_weights).sum(axis=1)


def semb_scores(candidates: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Cosines float64 [n] of class tokens [n, D]."""
    a, b = candidates.astype(np.float64), references.astype(np.float64)
    return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _names(folder: Path) -> list[str]:
    from rad_jax.interop import sources

    return [name for name in sources.open_source(folder) if "encoder.layer." in name]
