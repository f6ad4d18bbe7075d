"""open_clip's CustomTextCLIP in the BiomedCLIP form: timm trunk, BERT, a linear image head and an `mlp` text head; with SigLIP's loss a bias."""

from rad_jax.interop import hf_bert, timm_vit
from rad_jax.interop.tables import Table, linear, same
from rad_jax.models.clip import ClipConfig


def table(config: ClipConfig) -> Table:
    """Both towers whole, both heads, the temperature, and the bias where there is one."""
    c = config
    vision = timm_vit.table(c.vision).under("vision/", "visual.trunk.")
    text = hf_bert.table(c.text).under("text/", "text.transformer.")
    hidden = (c.text.width + c.embed_dim) // 2
    heads = [
        *linear("vision_head", "visual.head.proj", (c.vision.width,), (c.embed_dim,), bias=False),
        *linear("text_head/fc1", "text.proj.0", (c.text.width,), (hidden,), bias=False),
        *linear("text_head/fc2", "text.proj.2", (hidden,), (c.embed_dim,), bias=False),
        same("logit_scale", "logit_scale", ()),
        *([same("logit_bias", "logit_bias", ())] if c.loss == "sigmoid" else []),
    ]
    return Table("open_clip CustomTextCLIP", (*vision.entries, *text.entries, *heads), vision.ignored + text.ignored)
