"""The original LLaVA's own names: the projector, and what stands before it in its several files."""

from rad_jax.interop.tables import Table, linear

PREFIX = "model.mm_projector."
# Longest first: non_lora_trainables.bin, mm_projector.bin and merged models, and a projector saved alone.
PREFIXES = ("base_model.model.model.mm_projector.", PREFIX, "mm_projector.", "")


def projector(width: int, llm_width: int) -> Table:
    """`mlp2x_gelu`: two linear layers, a GELU without weights between them."""
    entries = [*linear("fc1", "0", (width,), (llm_width,)), *linear("fc2", "2", (llm_width,), (llm_width,))]
    return Table("LLaVA projector", tuple(entries))
