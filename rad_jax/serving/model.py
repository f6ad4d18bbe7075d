"""The model of an exported bundle in plain PyTorch: image tower, projector, and a Llama over a fixed cache of keys and values.

What is left out beside transformers' model changes no number: the tower ends at the block whose output is used, and the head sees only
positions that choose a token. Letters as in the rest of the library; K heads of keys and values, G = N / K query heads to each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from rad_jax.images import normalise
from rad_jax.prompts import IMAGE_ID
from rad_jax.serving.bundle import Decoder, Tower
from rad_jax.serving.graphs import Graphs
from rad_jax.serving.weights import Matrix

Tensor: TypeAlias = torch.Tensor


class Prompt(NamedTuple):
    """Ids with at most one IMAGE_ID, the film's square uint8 [Y, X] or None, and whether to say where the next token looked."""

    ids: Sequence[int]
    film: np.ndarray | None
    attention: bool


class Row(NamedTuple):
    """What a step needs of a slot: its last token, how many it holds already, and the first patch's place if its attention is wanted."""

    token: int
    length: int
    look_from: int | None


class Layer(NamedTuple):
    """A block of the decoder: gains [D], and matrices [(N + 2K) H, D], [D, N H], [2F, D], [D, F]."""

    attn_norm: Tensor
    qkv: Matrix
    out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


class Weights(NamedTuple):
    """All tensors of a model: the tower's and projector's by their names in the bundle; `head` [D, V] may be the embedding, turned."""

    embedding: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Tensor
    vision: Mapping[str, Tensor]


class Model:
    """A bundle's weights and a cache of `slots` rows of `max_tokens`. Rows in use are always the first ones."""

    def __init__(
        self,
        decoder: Decoder,
        tower: Tower,
        weights: Weights,
        suppressed: Sequence[int],
        slots: int,
        max_tokens: int,
        say: Callable[[str], object],
    ):
        self.decoder, self.tower, self.weights = decoder, tower, weights
        self.slots, self.max_tokens = slots, max_tokens
        c, like = decoder, weights.embedding
        self._new = {"dtype": like.dtype, "device": like.device}
        # Keys and values of a head lie together: a step reads all of them, and reads memory for most of its time.
        self.keys, self.values = torch.zeros((2, c.depth, slots, c.kv_heads, max_tokens, c.head_dim), **self._new)
        cos, sin = rotary(c, max_tokens)
        self._cos, self._sin = cos.to(**self._new), sin.to(**self._new)
        # Ids that are no text are never the largest.
        self._bias = torch.zeros(c.vocab_size, **self._new)
        self._bias[list(suppressed)] = -math.inf
        self._places = torch.arange(max_tokens, device=like.device)
        self._starts = torch.arange(slots * c.kv_heads, device=like.device).view(slots, -1) * max_tokens
        # Of the layers that attention maps are made of: a step leaves its queries here, where a graph can, and maps come after it.
        self._first = c.depth // 2
        self._queries = torch.zeros((c.depth - self._first, slots, c.heads, c.head_dim), **self._new)
        self._graphs: Graphs | None = None
        if like.device.type == "cuda":
            self._graphs = Graphs(
                lambda t, n, most: self._step(t, n, most, True, True), slots, max_tokens, like.device, say
            )

    @torch.inference_mode()
    def encode(self, films: Sequence[np.ndarray]) -> Tensor:
        """Squares uint8 [Y, X] to [B, P, D]: patch features of the chosen block, projected to the width of the words."""
        t, w = self.tower, self.weights.vision
        pixels = normalise(np.stack(films), np, t.mean, t.std)
        x = tower_features(t, w, torch.from_numpy(pixels).to(**self._new))
        x = F.gelu(F.linear(x, w["projector.linear_1.weight"], w["projector.linear_1.bias"]))
        return F.linear(x, w["projector.linear_2.weight"], w["projector.linear_2.bias"])

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt], slot: int) -> tuple[Tensor, list[np.ndarray | None]]:
        """Fills the slots from `slot` on with prompts, all words and patches of all of them in one row without padding.

        Returns:
            Logits float32 [B, V] of the next token, and for each prompt that asks for it an attention map float32 [p, p].
        """
        c, patches = self.decoder, self.tower.patches
        films = [prompt.film for prompt in prompts if prompt.film is not None]
        features = iter(self.encode(films)) if films else iter(())
        parts, lengths, places = [], [], []
        for prompt in prompts:
            ids = list(prompt.ids)
            if prompt.film is None:
                found = [self._embed(ids)]
            else:
                place = ids.index(IMAGE_ID)
                found = [self._embed(ids[:place]), next(features), self._embed(ids[place + 1 :])]
            places.append(len(found[0]) if prompt.film is not None and prompt.attention else None)
            parts += found
            lengths.append(sum(map(len, found)))
        x = torch.cat(parts)
        ends = np.cumsum(lengths).tolist()
        positions = torch.cat([self._places[:length] for length in lengths])
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        maps = Maps(places, patches)
        last = torch.tensor(ends, device=x.device) - 1
        for number, layer in enumerate(self.weights.layers):
            heads = self._heads(layer, x, cos, sin)
            final = number == c.depth - 1  # of its outputs only the last of each prompt is used
            mixed = []
            for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
                q, k, v = heads[end - length : end].transpose(0, 1).split((c.heads, c.kv_heads, c.kv_heads))
                self.keys[number, slot + row, :, :length], self.values[number, slot + row, :, :length] = k, v
                q = q[:, -1:] if final else q
                y = F.scaled_dot_product_attention(
                    q[None], k[None], v[None], is_causal=not final, enable_gqa=c.heads != c.kv_heads
                )
                mixed.append(y[0].transpose(0, 1).reshape(q.shape[1], -1))
                if number >= self._first:
                    maps.add(row, q[:, -1], k)
            x = torch.addmm(x[last] if final else x, torch.cat(mixed), layer.out.turned)
            x = self._feed(layer, x)
        return self._logits(x), maps.finished(self.tower.side)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> tuple[Tensor, list[np.ndarray | None]]:
        """One more token in each of the first slots: logits float32 [B, V] of the token after it, and attention maps as `prefill`."""
        tokens, lengths, places = zip(*rows, strict=True)
        logits = None
        if self._graphs is not None and not self._graphs.broken:
            logits = self._graphs.run(tokens, lengths)
        maps, device, longest = Maps(places, self.tower.patches), self._bias.device, max(lengths) + 1
        if logits is None:
            given = torch.tensor(tokens, device=device), torch.tensor(lengths, device=device)
            logits = self._step(*given, longest, min(lengths) + 1 < longest, any(p is not None for p in places))
        for row in (row for row, place in enumerate(places) if place is not None):
            for number in range(self._first, self.decoder.depth):
                keys = self.keys[number, row, :, : lengths[row] + 1]
                maps.add(row, self._queries[number - self._first, row], keys)
        return logits, maps.finished(self.tower.side)

    @torch.inference_mode()
    def prepare(self, longest: Sequence[int]) -> None:
        """Captures the steps of all numbers of rows with so many tokens, before any row is in use: the first requests need not wait."""
        if self._graphs is not None:
            self._graphs.prepare(longest)

    def move(self, source: int, target: int, length: int) -> None:
        """Takes what the slot `source` holds over to `target`."""
        for kept in (self.keys, self.values):
            kept[:, target, :, :length] = kept[:, source, :, :length]

    def _step(self, tokens: Tensor, lengths: Tensor, longest: int, uneven: bool, keep: bool) -> Tensor:
        """A step over the first `longest` tokens of the slots. `lengths` int [B] are without the new token; `keep` is for queries."""
        c, rows = self.decoder, len(tokens)
        group = c.heads // c.kv_heads
        x = F.embedding(tokens, self.weights.embedding)
        cos, sin = (F.embedding(lengths, table)[:, None] for table in (self._cos, self._sin))
        index = (self._starts[:rows] + lengths[:, None]).flatten()
        mask = None
        if uneven:
            hidden = self._places[:longest] > lengths[:, None]
            mask = torch.zeros(hidden.shape, **self._new).masked_fill_(hidden, -math.inf)[:, None, None]
        for number, layer in enumerate(self.weights.layers):
            heads = self._heads(layer, x, cos, sin)
            q, k, v = heads.split((c.heads, c.kv_heads, c.kv_heads), 1)
            self.keys[number].view(-1, c.head_dim).index_copy_(0, index, k.reshape(-1, c.head_dim))
            self.values[number].view(-1, c.head_dim).index_copy_(0, index, v.reshape(-1, c.head_dim))
            keys, values = self.keys[number, :rows, :, :longest], self.values[number, :rows, :, :longest]
            y = F.scaled_dot_product_attention(q.view(rows, c.kv_heads, group, -1), keys, values, attn_mask=mask)
            if keep and number >= self._first:
                self._queries[number - self._first, :rows] = q
            x = self._feed(layer, torch.addmm(x, y.reshape(rows, -1), layer.out.turned))
        return self._logits(x)

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return F.embedding(torch.tensor(ids, dtype=torch.long, device=self._bias.device), self.weights.embedding)

    def _heads(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries, keys and values [S, N + 2K, H] of x [S, D], the first two turned by their positions."""
        c = self.decoder
        heads = (self._norm(x, layer.attn_norm) @ layer.qkv.turned).view(len(x), -1, c.head_dim)
        turning = heads[:, : c.heads + c.kv_heads]
        rolled = turning.roll(c.head_dim // 2, -1)
        turning.mul_(cos).addcmul_(rolled, sin)
        return heads

    def _feed(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = (self._norm(x, layer.mlp_norm) @ layer.gate_up.turned).chunk(2, -1)
        return torch.addmm(x, F.silu(gate).mul_(up), layer.down.turned)

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        # Its variance is float32 whatever x is.
        return F.rms_norm(x, gain.shape, gain, self.decoder.eps)

    def _logits(self, x: Tensor) -> Tensor:
        return torch.addmm(self._bias, self._norm(x, self.weights.norm), self.weights.head).float()


class Maps:
    """Attention on the patches of the rows that ask for it: the mean over all heads of the layers that are added, the last half."""

    def __init__(self, places: Sequence[int | None], patches: int):
        self.places, self._patches = places, patches
        self._sums: dict[int, Any] = {}

    def add(self, row: int, q: Tensor, k: Tensor) -> None:
        """Queries [N, H] of a row's last token and keys [K, T, H] of all its tokens, of one layer."""
        place = self.places[row]
        if place is None:
            return
        keys, (heads, width) = k.float(), q.shape
        grouped = q.float().view(len(keys), -1, width)
        weights = torch.softmax(torch.einsum("kgh,kth->kgt", grouped, keys) / math.sqrt(width), -1)
        seen = weights[..., place : place + self._patches].sum((0, 1)) / heads
        self._sums[row] = seen if row not in self._sums else self._sums[row] + seen

    def finished(self, side: int) -> list[np.ndarray | None]:
        """For each row None, or float32 [side, side] that sums to 1."""
        found = {row: total / total.sum() for row, total in self._sums.items()}
        return [found[row].view(side, side).cpu().numpy() if row in found else None for row in range(len(self.places))]


def tower_features(tower: Tower, w: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Normalised images [B, Y, X, C] to patch features [B, P, D] of the tower's last loaded block, without the class token."""
    batch, side, p = len(images), tower.side, tower.patch_size
    used = images[:, : side * p, : side * p]  # as a convolution leaves what fills no patch
    x = used.view(batch, side, p, side, p, -1) if used.is_contiguous() else used.reshape(batch, side, p, side, p, -1)
    x = x.permute(0, 1, 3, 5, 2, 4).reshape(batch, side * side, -1)
    x = F.linear(x, w["patches.weight"], w.get("patches.bias"))
    if tower.class_token:
        x = torch.cat([w["class_token"].expand(batch, 1, -1), x], 1)
    x = x + w["positions"]
    shape = (tower.width,)
    if "pre_norm.weight" in w:
        x = F.layer_norm(x, shape, w["pre_norm.weight"], w["pre_norm.bias"], tower.eps)
    for i in range(tower.blocks):
        b = f"blocks.{i}."
        y = F.layer_norm(x, shape, w[b + "norm1.weight"], w[b + "norm1.bias"], tower.eps)
        q, k, v = (
            F.linear(y, w[b + "qkv.weight"], w[b + "qkv.bias"])
            .view(batch, -1, 3, tower.heads, shape[0] // tower.heads)
            .permute(2, 0, 3, 1, 4)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = _added(x, F.linear(y, w[b + "out.weight"], w[b + "out.bias"]), w.get(b + "scale1"))
        y = F.layer_norm(x, shape, w[b + "norm2.weight"], w[b + "norm2.bias"], tower.eps)
        y = activation(tower.activation, F.linear(y, w[b + "fc1.weight"], w[b + "fc1.bias"]))
        x = _added(x, F.linear(y, w[b + "fc2.weight"], w[b + "fc2.bias"]), w.get(b + "scale2"))
    return x[:, -tower.patches :]


def activation(name: str, x: Tensor) -> Tensor:
    """transformers' `gelu`, `gelu_pytorch_tanh` and `quick_gelu`."""
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


def _added(x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
    return x + y if scale is None else torch.addcmul(x, y, scale)


def rotary(decoder: Decoder, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, float32 [length, H]; the first half of the sines is negative.

    A head (a, b) turned by an angle is (a, b) cos + (b, a) (-sin, sin). Frequencies are lowered as transformers' `linear` and `llama3` do.
    """
    half, scaling = decoder.head_dim // 2, decoder.scaling
    frequencies = 1.0 / decoder.theta ** (torch.arange(half, dtype=torch.float32) / half)
    if scaling is not None:
        lowered = frequencies / scaling["factor"]
        kept: Any = 0.0
        if scaling["rope_type"] == "llama3":
            turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - kept) * lowered + kept * frequencies
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos()] * 2, 1), torch.cat([-angles.sin(), angles.sin()], 1)
