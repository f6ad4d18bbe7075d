"""transformers' CLIPVisionModel (OpenAI CLIP's image tower), by the names it has on disk, alone or inside a CLIPModel."""

import dataclasses
from collections.abc import Iterable

from rad_jax.errors import UserError
from rad_jax.interop.tables import Entry, Table, linear, norm, patches, same, stacked
from rad_jax.interop.timm_vit import CHANNELS, unused
from rad_jax.models.vit import VitConfig

# Before the tower's names in files of transformers 4, and in a CLIPModel; version 5 leaves it out.
LEVEL = "vision_model."
# The rest of a CLIPModel or SiglipModel.
IGNORED = (r"text_model\..*", r"(?:visual|text)_projection\.weight", "logit_scale", "logit_bias")


def level(names: Iterable[str]) -> str:
    """What stands before the tower's names in a file that holds these: `LEVEL` or nothing."""
    return LEVEL if any(name.startswith(LEVEL) for name in names) else ""


def table(config: VitConfig, level: str = LEVEL) -> Table:
    """The blocks that `config` uses; later blocks and, with a chosen feature layer, the last norm may be there and are left out.

    Args:
        config: with `pre_norm`, without `patch_bias`; OpenAI's weights want `activation` quick_gelu and `eps` 1e-5.
        level: as the function `level` finds it.

    Raises:
        UserError: a tower that CLIPVisionModel cannot hold.
    """
    c, width = config, (config.width,)
    if not c.pre_norm or c.patch_bias or c.layer_scale or not c.class_token:
        raise UserError(
            "only a tower with a class token and a norm before its blocks, without patch bias and LayerScale, can be a CLIPVisionModel."
        )
    heads = (c.heads, c.width // c.heads)
    stem: list[Entry] = [
        same("cls_token", "embeddings.class_embedding", (1, 1, c.width), width),
        *patches("patch_embed", "embeddings.patch_embedding", c.patch_size, CHANNELS, c.width, False),
        same("pos_embed", "embeddings.position_embedding.weight", (1, c.tokens, c.width), (c.tokens, c.width)),
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
    tower = Table("CLIPVisionModel", (*stem, *stacked(block, c.blocks_used), *last), ignored).under("", level)
    return dataclasses.replace(tower, ignored=tower.ignored + IGNORED)
