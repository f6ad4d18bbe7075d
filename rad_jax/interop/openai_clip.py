"""OpenAI's own layout of the CLIP image tower, as open_clip writes it."""

import dataclasses

from rad_jax.errors import UserError
from rad_jax.interop.tables import Entry, Table, fused, linear, norm, patches, same, stacked
from rad_jax.interop.timm_vit import CHANNELS, unused
from rad_jax.models.vit import VitConfig

# The image head, and the text tower as a CLIP or a CustomTextCLIP has it; "visual" is the tower's own.
IGNORED = (
    r"visual\.proj",
    r"(?:transformer|token_embedding|ln_final|text)\..*",
    "positional_embedding|text_projection|attn_mask|logit_scale|logit_bias",
    "input_resolution|context_length|vocab_size",  # in OpenAI's own files
)


def table(config: VitConfig) -> Table:
    """The blocks that `config` uses; later blocks, the text tower and, with a chosen feature layer, the last norm are left out.

    Args:
        config: with `pre_norm`, without `patch_bias`; OpenAI's weights want `activation` quick_gelu and `eps` 1e-5.

    Raises:
        UserError: a tower that this layout cannot hold.
    """
    c, width = config, (config.width,)
    if not c.pre_norm or c.patch_bias or c.layer_scale or not c.class_token:
        raise UserError(
            "only a tower with a class token and a norm before its blocks, without patch bias and LayerScale, has OpenAI's layout."
        )
    heads = (c.heads, c.width // c.heads)
    stem: list[Entry] = [
        same("cls_token", "class_embedding", (1, 1, c.width), width),
        same("pos_embed", "positional_embedding", (1, c.tokens, c.width), (c.tokens, c.width)),
        *patches("patch_embed", "conv1", c.patch_size, CHANNELS, c.width, False),
        *norm("pre_norm", "ln_pre", c.width),
    ]
    layer = "transformer.resblocks.{}."
    parts = [f"blocks/attn/{part}" for part in "qkv"]
    block = [
        *norm("blocks/norm1", f"{layer}ln_1", c.width),
        # torch's MultiheadAttention: in_proj_weight, in_proj_bias.
        *(
            dataclasses.replace(entry, name=entry.name.replace("in_proj.", "in_proj_"))
            for entry in fused(parts, f"{layer}attn.in_proj", width, heads)
        ),
        *linear("blocks/attn/o", f"{layer}attn.out_proj", heads, width),
        *norm("blocks/norm2", f"{layer}ln_2", c.width),
        *linear("blocks/mlp/fc1", f"{layer}mlp.c_fc", width, (c.mlp_dim,)),
        *linear("blocks/mlp/fc2", f"{layer}mlp.c_proj", (c.mlp_dim,), width),
    ]
    last = norm("norm", "ln_post", c.width) if c.feature_layer is None else []
    ignored = unused(c, r"transformer\.resblocks\.", r"ln_post\.")
    tower = Table("OpenAI CLIP vision", (*stem, *stacked(block, c.blocks_used), *last), ignored).under("", "visual.")
    return dataclasses.replace(tower, ignored=tower.ignored + IGNORED)
