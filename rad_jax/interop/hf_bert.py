"""transformers' BertModel."""

from rad_jax.interop.tables import Entry, Table, linear, norm, same, stacked
from rad_jax.models.bert import BertConfig


def table(config: BertConfig) -> Table:
    """The encoder; the pooler and the position numbers may be there and are left out."""
    c, width = config, (config.width,)
    heads = (c.heads, c.width // c.heads)
    rows = {"word": c.vocab_size, "position": c.max_positions, "token_type": c.token_types}
    stem: list[Entry] = [
        same(f"embeddings/{kind}/embedding", f"embeddings.{kind}_embeddings.weight", (count, c.width))
        for kind, count in rows.items()
    ]
    stem += norm("embeddings/norm", "embeddings.LayerNorm", c.width)
    layer = "encoder.layer.{}."
    block = [
        *linear("layers/attn/q", f"{layer}attention.self.query", width, heads),
        *linear("layers/attn/k", f"{layer}attention.self.key", width, heads),
        *linear("layers/attn/v", f"{layer}attention.self.value", width, heads),
        *linear("layers/attn/o", f"{layer}attention.output.dense", heads, width),
        *norm("layers/attn_norm", f"{layer}attention.output.LayerNorm", c.width),
        *linear("layers/mlp/fc1", f"{layer}intermediate.dense", width, (c.mlp_dim,)),
        *linear("layers/mlp/fc2", f"{layer}output.dense", (c.mlp_dim,), width),
        *norm("layers/mlp_norm", f"{layer}output.LayerNorm", c.width),
    ]
    return Table("BertModel", (*stem, *stacked(block, c.depth)), (r"pooler\..*", r"embeddings\.position_ids"))
