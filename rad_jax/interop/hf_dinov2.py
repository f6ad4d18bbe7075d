"""transformers' Dinov2Model, by the names it has on disk."""

from rad_jax.errors import UserError
from rad_jax.interop.tables import Entry, Table, constant, filler, linear, norm, patches, same, stacked
from rad_jax.interop.timm_vit import CHANNELS, unused
from rad_jax.models.vit import VitConfig


def table(config: VitConfig) -> Table:
    """The blocks that `config` uses; later blocks and, with a chosen feature layer, the final norm may be there and are left out.

    A tower without LayerScale is one whose gains are all one.

    Raises:
        UserError: a tower that Dinov2Model cannot hold (OpenAI CLIP's, SigLIP's).
    """
    c, width = config, (config.width,)
    if c.pre_norm or not c.patch_bias:
        raise UserError(
            "a tower with a norm before its blocks or without patch bias (OpenAI CLIP's) cannot be a Dinov2Model."
        )
    if not c.class_token:
        raise UserError("a tower without class token (SigLIP's) cannot be a Dinov2Model.")
    heads = (c.heads, c.width // c.heads)
    stem: list[Entry] = [
        same("cls_token", "embeddings.cls_token", (1, 1, c.width)),
        same("pos_embed", "embeddings.position_embeddings", (1, c.tokens, c.width)),
        filler("embeddings.mask_token", (1, c.width)),
        *patches("patch_embed", "embeddings.patch_embeddings.projection", c.patch_size, CHANNELS, c.width, True),
    ]
    layer = "encoder.layer.{}."
    block = [
        *norm("blocks/norm1", f"{layer}norm1", c.width),
        *linear("blocks/attn/q", f"{layer}attention.attention.query", width, heads),
        *linear("blocks/attn/k", f"{layer}attention.attention.key", width, heads),
        *linear("blocks/attn/v", f"{layer}attention.attention.value", width, heads),
        *linear("blocks/attn/o", f"{layer}attention.output.dense", heads, width),
        *norm("blocks/norm2", f"{layer}norm2", c.width),
        *linear("blocks/mlp/fc1", f"{layer}mlp.fc1", width, (c.mlp_dim,)),
        *linear("blocks/mlp/fc2", f"{layer}mlp.fc2", (c.mlp_dim,), width),
    ]
    for i in (1, 2):
        name = f"{layer}layer_scale{i}.lambda1"
        block.append(same(f"blocks/ls{i}", name, width) if c.layer_scale else constant(name, width, 1.0))
    last = norm("norm", "layernorm", c.width) if c.feature_layer is None else []
    ignored = unused(c, r"encoder\.layer\.", r"layernorm\.")
    return Table("Dinov2Model", (*stem, *stacked(block, c.blocks_used), *last), ignored)
