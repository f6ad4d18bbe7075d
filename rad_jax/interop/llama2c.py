"""Meta's own Llama names and rotary layout, and the `.bin` file of llama2.c that holds them.

Meta rotates neighbouring pairs of a head's channels, we rotate its two halves: the rows of the query and key matrices move.
"""

import dataclasses
import math
import struct
from pathlib import Path

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop.tables import Entry, Table, linear, same, stacked
from rad_jax.models.llama import LlamaConfig


def table(config: LlamaConfig) -> Table:
    """The decoder; `output.weight` is the head, for a tied model the embedding again."""
    c, width, mlp = config, (config.width,), (config.mlp_dim,)
    heads, kv_heads = (c.heads, c.head_dim), (c.kv_heads, c.head_dim)
    layer = "layers.{}."
    block = [
        same("layers/attn_norm/scale", f"{layer}attention_norm.weight", width),
        _rotated("layers/attn/q", f"{layer}attention.wq", c.width, heads),
        _rotated("layers/attn/k", f"{layer}attention.wk", c.width, kv_heads),
        *linear("layers/attn/v", f"{layer}attention.wv", width, kv_heads, bias=False),
        *linear("layers/attn/o", f"{layer}attention.wo", heads, width, bias=False),
        same("layers/mlp_norm/scale", f"{layer}ffn_norm.weight", width),
        *linear("layers/mlp/gate", f"{layer}feed_forward.w1", width, mlp, bias=False),
        *linear("layers/mlp/down", f"{layer}feed_forward.w2", mlp, width, bias=False),
        *linear("layers/mlp/up", f"{layer}feed_forward.w3", width, mlp, bias=False),
    ]
    entries: tuple[Entry, ...] = (
        same("embed/embedding", "tok_embeddings.weight", (c.vocab_size, c.width)),
        *stacked(block, c.depth),
        same("norm/scale", "norm.weight", width),
        *linear("head", "output", width, (c.vocab_size,), bias=False),
    )
    return Table("Meta Llama", entries, (r"rope\.freqs",))


def read(path: str | Path) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """A llama2.c checkpoint of the first version: seven int32, then float32 tensors in a fixed order.

    Returns:
        The model's shape, and the tensors by Meta's names.

    Raises:
        UserError: the file is too short or too long for what its header says.
    """
    data = Path(path).read_bytes()
    if len(data) < 28:
        raise UserError(f"{path}: too short for a llama2.c checkpoint.")
    dim, mlp, depth, heads, kv_heads, vocab, positions = struct.unpack("<7i", data[:28])
    tied, vocab = vocab > 0, abs(vocab)  # a head of its own is announced by a negative vocabulary
    config = LlamaConfig(vocab, dim, depth, heads, kv_heads, mlp, max_positions=positions)
    shapes = {name: shape for name, shape in table(config).shapes().items() if name != "output.weight"}
    kinds = [
        "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
        "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    ]  # fmt: skip
    order = [
        "tok_embeddings.weight",
        *(f"layers.{n}.{kind}.weight" for kind in kinds for n in range(depth)),
        "norm.weight",
    ]
    values = np.frombuffer(data, "<f4", offset=28) if len(data) % 4 == 0 else np.empty(0, "<f4")
    used = sum(math.prod(shape) for shape in shapes.values())
    rotary = positions * config.head_dim  # tables of cosines and sines that nobody reads
    if values.size != used + rotary + (0 if tied else vocab * dim):
        raise UserError(
            f"{path}: its size does not fit its header, or it is no llama2.c checkpoint of the first version."
        )
    tensors, start = {}, 0
    for name in order:
        stop = start + math.prod(shapes[name])
        tensors[name] = values[start:stop].reshape(shapes[name])
        start = stop
    head = tensors["tok_embeddings.weight"] if tied else values[start + rotary :].reshape(vocab, dim)
    return config, tensors | {"output.weight": head}


def _rotated(path: str, name: str, width: int, heads: tuple[int, int]) -> Entry:
    """A query or key matrix: channel 2i of a head becomes channel i, and 2i + 1 becomes H/2 + i."""
    (kernel,) = linear(path, name, (width,), heads, bias=False)
    count, half = heads[0], heads[1] // 2
    read, write = kernel.read, kernel.write

    def halves(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return read(x.reshape(count, half, 2, width).swapaxes(1, 2).reshape(x.shape))

    def pairs(x: np.ndarray) -> np.ndarray:
        return write(x).reshape(count, 2, half, width).swapaxes(1, 2).reshape(count * 2 * half, width)

    return dataclasses.replace(kernel, read=halves, write=pairs)
