"""transformers' SiglipVisionModel (Zhai et al. 2023), by the names it has on disk, alone or inside a SiglipModel."""

import dataclasses

from rad_jax.errors import UserError
from rad_jax.interop.hf_clip_vision import IGNORED, LEVEL
from rad_jax.interop.tables import Entry, Table, linear, norm, patches, same, stacked
from rad_jax.interop.timm_vit import CHANNELS, unused
from rad_jax.models.vit import VitConfig


def table(config: VitConfig, level: str = LEVEL) -> Table:
    """The blocks that `config` uses; later blocks, the pooling head and, with a chosen feature layer, the last norm are left out.

    Args:
        config: without `class_token`; Google's weights want `activation` gelu_tanh and `eps` 1e-6.
        level: as `hf_clip_vision.level` finds it.

    Raises:
        UserError: a tower that SiglipVisionModel cannot hold.
    """
    c, width = config, (config.width,)
    if c.class_token or c.pre_norm or c.layer_scale or not c.patch_bias:
        raise UserError(
            "only a tower with patch bias, without class token, LayerScale and a norm before its blocks, can be a SiglipVisionModel."
        )
    heads = (c.heads, c.width // c.heads)
    stem: list[Entry] = [
        *patches("patch_embed", "embeddings.patch_embedding", c.patch_size, CHANNELS, c.width, True),
        same("pos_embed", "embeddings.position_embedding.weight", (1, c.patches, c.width), (c.patches, c.width)),
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
    ignored = (*unused(c, r"encoder\.layers\.", r"post_layernorm\."), r"embeddings\.position_ids", r"head\..*")
    tower = Table("SiglipVisionModel", (*stem, *stacked(block, c.blocks_used), *last), ignored).under("", level)
    return dataclasses.replace(tower, ignored=tower.ignored + IGNORED)
