"""rad_jax: LLaVA-Rad in JAX, from radiographs to trained weights, findings, scores and a PyTorch export."""

__version__ = "0.1.0"

FORMAT_VERSION = 1
"""Version of what is written to disk; every corpus, checkpoint and exported bundle carries it and is checked on load."""
