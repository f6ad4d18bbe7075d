"""timm's VisionTransformer, which is also the trunk of open_clip's BiomedCLIP."""

from rad_jax.interop.tables import Entry, Table, fused, linear, norm, patches, same, stacked
from rad_jax.models.vit import VitConfig

CHANNELS = 3


def table(config: VitConfig) -> Table:
    """The blocks that `config` uses; later blocks and, with a chosen feature layer, the final norm may be there and are left out."""
    c, width = config, (config.width,)
    heads = (c.heads, c.width // c.heads)
    stem: list[Entry] = [
        *patches("patch_embed", "patch_embed.proj", c.patch_size, CHANNELS, c.width, c.patch_bias),
        *([same("cls_token", "cls_token", (1, 1, c.width))] if c.class_token else []),
        same("pos_embed", "pos_embed", (1, c.tokens, c.width)),
        *(norm("pre_norm", "norm_pre", c.width) if c.pre_norm else []),
    ]
    block = [
        *norm("blocks/norm1", "blocks.{}.norm1", c.width),
        *fused([f"blocks/attn/{part}" for part in "qkv"], "blocks.{}.attn.qkv", width, heads),
        *linear("blocks/attn/o", "blocks.{}.attn.proj", heads, width),
        *norm("blocks/norm2", "blocks.{}.norm2", c.width),
        *linear("blocks/mlp/fc1", "blocks.{}.mlp.fc1", width, (c.mlp_dim,)),
        *linear("blocks/mlp/fc2", "blocks.{}.mlp.fc2", (c.mlp_dim,), width),
    ]
    if c.layer_scale:
        block += [same(f"blocks/ls{i}", f"blocks.{{}}.ls{i}.gamma", width) for i in (1, 2)]
    last = norm("norm", "norm", c.width) if c.feature_layer is None else []
    return Table(
        "timm vision transformer", (*stem, *stacked(block, c.blocks_used), *last), unused(c, r"blocks\.", r"norm\.")
    )


def unused(config: VitConfig, blocks: str, last: str) -> tuple[str, ...]:
    """Patterns of foreign names that features of `config.feature_layer` do not need.

    Args:
        config: of the tower.
        blocks: pattern of what stands before a block's number.
        last: pattern of what the final norm's names start with.
    """
    if config.feature_layer is None:
        return ()
    later = "|".join(str(layer) for layer in range(config.blocks_used, config.depth))
    return (f"{last}.*", *([rf"{blocks}(?:{later})\..*"] if later else []))
