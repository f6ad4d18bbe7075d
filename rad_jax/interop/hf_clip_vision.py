"""transformers' CLIPVisionModel (OpenAI CLIP's image tower), by the names it has on disk."""

from rad_jax.interop.tables import Entry, Table, linear, norm, patches, same, stacked
from rad_jax.interop.timm_vit import CHANNELS, unused
from rad_jax.models.vit import VitConfig


def table(config: VitConfig) -> Table:
    """The blocks that `config` uses; later blocks and, with a chosen feature layer, the last norm may be there and are left out.

    Args:
        config: with `pre_norm`, without `patch_bias`; OpenAI's weights want `activation` quick_gelu and `eps` 1e-5.
    """
    c, width = config, (config.width,)
    heads = (c.heads, c.width // c.heads)
    tokens = 1 + c.patches
    stem: list[Entry] = [
        same("cls_token", "embeddings.class_embedding", (1, 1, c.width), width),
        *patches("patch_embed", "embeddings.patch_embedding", c.patch_size, CHANNELS, c.width, c.patch_bias),
        same("pos_embed", "embeddings.position_embedding.weight", (1, tokens, c.width), (tokens, c.width)),
        *norm("pre_norm", "pre_layrnorm", c.width),  # their spelling
    ]
    layer = "encoder.layers.{}."
    block = [
        *norm("blocks/norm1", f"{layer}layer_norm1", c.width),
        *linear("blocks/attn/q", f"{layer}self_attn.q_proj", width, heads),
        *linear("blocks/attn/k", f"{layer}self_attn.k_proj", width, heads),
        *linear("blocks/attn/v", f"{layer}self_attn.v_proj", width, heads),
        *linear("blocks/attn/o", f"{layer}self_attn.out_proj", heads, width),
        *norm("blocks/norm2", f"{layer}layer_norm2", c.width),
        *linear("blocks/mlp/fc1", f"{layer}mlp.fc1", width, (c.mlp_dim,)),
        *linear("blocks/mlp/fc2", f"{layer}mlp.fc2", (c.mlp_dim,), width),
    ]
    last = norm("norm", "post_layernorm", c.width) if c.feature_layer is None else []
    ignored = (*unused(c, r"encoder\.layers\.", r"post_layernorm\."), r"embeddings\.position_ids")
    whole = Table("CLIPVisionModel", (*stem, *stacked(block, c.blocks_used), *last), ignored)
    return whole.under("", "vision_model.")
