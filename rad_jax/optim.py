"""Learning-rate schedule, clipping and AdamW; built for the trainable tree only, so that frozen weights have no optimizer state."""

import math
from typing import Any

import jax
import optax


def schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear warmup from zero, then a cosine to zero, as Hugging Face's `get_cosine_schedule_with_warmup` in its Trainer."""
    warmup = math.ceil(steps * warmup_ratio)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), 0.0)


def optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) after an optional clip of the global gradient norm.

    Args:
        config: peak_lr, warmup_ratio, b1, b2, eps, weight_decay, clip (0 is off). Norms, biases and scalars do not decay.
        steps: length of the schedule in optimizer steps.
    """
    adamw = optax.adamw(
        schedule(config.peak_lr, steps, config.warmup_ratio),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decays,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def _decays(tree: Any) -> Any:
    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key in ("kernel", "embedding", "a", "b")

    return jax.tree_util.tree_map_with_path(decays, tree)
