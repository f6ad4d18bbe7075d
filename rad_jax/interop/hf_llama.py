"""transformers' LlamaForCausalLM, and so Vicuna and Mistral. Its rotary layout (halves) is ours."""

import numpy as np

from rad_jax.errors import UserError
from rad_jax.interop.tables import Entry, Table, linear, same, stacked
from rad_jax.models.llama import LlamaConfig


def table(config: LlamaConfig, tied: bool = False) -> Table:
    """The decoder.

    Args:
        config: of the decoder.
        tied: the head is the embedding again and is not in the file. Ours is a leaf of its own all the same; storing refuses one that is
            no longer the embedding.
    """
    c, width = config, (config.width,)
    heads, kv_heads = (c.heads, c.head_dim), (c.kv_heads, c.head_dim)
    layer = "model.layers.{}."
    block = [
        same("layers/attn_norm/scale", f"{layer}input_layernorm.weight", width),
        *linear("layers/attn/q", f"{layer}self_attn.q_proj", width, heads, bias=False),
        *linear("layers/attn/k", f"{layer}self_attn.k_proj", width, kv_heads, bias=False),
        *linear("layers/attn/v", f"{layer}self_attn.v_proj", width, kv_heads, bias=False),
        *linear("layers/attn/o", f"{layer}self_attn.o_proj", heads, width, bias=False),
        same("layers/mlp_norm/scale", f"{layer}post_attention_layernorm.weight", width),
        *linear("layers/mlp/gate", f"{layer}mlp.gate_proj", width, (c.mlp_dim,), bias=False),
        *linear("layers/mlp/up", f"{layer}mlp.up_proj", width, (c.mlp_dim,), bias=False),
        *linear("layers/mlp/down", f"{layer}mlp.down_proj", (c.mlp_dim,), width, bias=False),
    ]
    embedding, shape = "model.embed_tokens.weight", (c.vocab_size, c.width)
    entries: tuple[Entry, ...] = (
        shared(embedding, shape) if tied else same("embed/embedding", embedding, shape),
        *stacked(block, c.depth),
        same("norm/scale", "model.norm.weight", width),
        *([] if tied else linear("head", "lm_head", width, (c.vocab_size,), bias=False)),
    )
    # Some writers store a tied head too; transformers does not read it.
    ignored = (r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", *([r"lm_head\.weight"] if tied else []))
    return Table("LlamaForCausalLM", entries, ignored)


def shared(name: str, shape: tuple[int, int]) -> Entry:
    """One matrix [V, D] that is embedding and, transposed, head; storing refuses a head that is the embedding no longer."""

    def write(embedding: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        if not np.array_equal(embedding, kernel.T):
            raise UserError("the head is no longer the embedding, so it cannot be stored tied to it.")
        return embedding

    leaves = (("embed/embedding", shape), ("head/kernel", shape[::-1]))
    return Entry(name, shape, leaves, lambda x: (x, x.T), write)
