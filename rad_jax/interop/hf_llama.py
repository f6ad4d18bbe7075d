"""transformers' LlamaForCausalLM, and so Vicuna. Its rotary layout (halves) is ours."""

from rad_jax.interop.tables import Entry, Table, linear, same, stacked
from rad_jax.models.llama import LlamaConfig


def table(config: LlamaConfig) -> Table:
    """The decoder with its own head (not tied to the embedding)."""
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
    entries: tuple[Entry, ...] = (
        same("embed/embedding", "model.embed_tokens.weight", (c.vocab_size, c.width)),
        *stacked(block, c.depth),
        same("norm/scale", "model.norm.weight", width),
        *linear("head", "lm_head", width, (c.vocab_size,), bias=False),
    )
    return Table("LlamaForCausalLM", entries, (r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",))
