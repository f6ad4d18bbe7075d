"""transformers' LlavaForConditionalGeneration with a Dinov2 tower, by the names it has on disk.

transformers 5 reads and writes these older names and renames while loading; 4.57 knows only them.
"""

from rad_jax.interop import hf_dinov2, hf_llama
from rad_jax.interop.tables import Table, linear
from rad_jax.models.llava import LlavaConfig


def table(config: LlavaConfig) -> Table:
    """Tower, projector and decoder. The tower is whole only where `config.vision.feature_layer` is None."""
    assert config.vision is not None, "a language model alone is no LLaVA"
    llm, vision = config.llm, config.vision
    tower = hf_dinov2.table(vision).under("vision/", "vision_tower.")
    decoder = hf_llama.table(llm).under("llm/", "language_model.")
    projector = [
        *linear("projector/fc1", "multi_modal_projector.linear_1", (vision.width,), (llm.width,)),
        *linear("projector/fc2", "multi_modal_projector.linear_2", (llm.width,), (llm.width,)),
    ]
    entries = (*decoder.entries, *projector, *tower.entries)
    return Table("LlavaForConditionalGeneration", entries, tower.ignored + decoder.ignored)
