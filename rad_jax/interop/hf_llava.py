"""transformers' LlavaForConditionalGeneration with a Dinov2, CLIP or SigLIP tower, by the names it has on disk.

transformers 5 reads and writes these older names and renames while loading; 4.57 knows only them.
"""

from rad_jax.interop import hf_clip_vision, hf_dinov2, hf_llama, hf_siglip_vision
from rad_jax.interop.tables import Table, linear
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import VitConfig


def table(config: LlavaConfig, level: str = hf_clip_vision.LEVEL, tied: bool = False) -> Table:
    """Tower, projector and decoder. The tower is whole only where `config.vision.feature_layer` is None.

    Args:
        config: of the model.
        level: before the names of a CLIP or SigLIP tower, as `hf_clip_vision.level` finds it behind "vision_tower.".
        tied: as in `hf_llama.table`.
    """
    assert config.vision is not None, "a language model alone is no LLaVA"
    llm, vision = config.llm, config.vision
    tower = _tower(vision, level).under("vision/", "vision_tower.")
    decoder = hf_llama.table(llm, tied).under("llm/", "language_model.")
    projector = [
        *linear("projector/fc1", "multi_modal_projector.linear_1", (vision.width,), (llm.width,)),
        *linear("projector/fc2", "multi_modal_projector.linear_2", (llm.width,), (llm.width,)),
    ]
    entries = (*decoder.entries, *projector, *tower.entries)
    return Table("LlavaForConditionalGeneration", entries, tower.ignored + decoder.ignored)


def _tower(vision: VitConfig, level: str) -> Table:
    """The tower's own table, by its kind."""
    if vision.pre_norm:
        return hf_clip_vision.table(vision, level)
    return hf_dinov2.table(vision) if vision.class_token else hf_siglip_vision.table(vision, level)
