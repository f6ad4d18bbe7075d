"""The whole recipe small, on the phantom: a language model from its reports, then the three stages of the paper. Minutes on two CPU cores.

    python -m launch.train --config=configs/phantom.py:lm     --data=out/demo/data --workdir=out/demo/lm
    python -m launch.train --config=configs/phantom.py:stage1 --data=out/demo/data --workdir=out/demo/stage1
    python -m launch.train --config=configs/phantom.py:stage2 --data=out/demo/data --workdir=out/demo/stage2 \\
        --base=out/demo/lm,out/demo/stage1
    python -m launch.train --config=configs/phantom.py:stage3 --data=out/demo/data --workdir=out/demo/stage3 --base=out/demo/stage2

`make demo` runs these. `:stage1,full` and so on train longer. `:tuning` and `:projector` are stage 3 without adapters, for comparison: every
weight of the language model learns, or none.
"""

from typing import Any

import ml_collections

from configs import common

IMAGE_SIZE = 112
VISION = {"image_size": IMAGE_SIZE, "patch_size": 16, "width": 192, "depth": 3, "heads": 6, "mlp_dim": 576, "unroll": 3}
FEATURES = {**VISION, "feature_layer": -2}
TEXT = {"vocab_size": 1024, "width": 128, "depth": 2, "heads": 4, "mlp_dim": 512, "max_positions": 512, "unroll": 2}
LLM = {
    "vocab_size": 1024,
    "width": 128,
    "depth": 4,
    "heads": 4,
    "kv_heads": 4,
    "mlp_dim": 384,
    "max_positions": 512,
    "unroll": 4,
}
LORA = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": ("q", "k", "v", "o", "gate", "up", "down")}


def get_config(arg: str = "stage3") -> ml_collections.ConfigDict:
    """The experiment that `arg` names: lm, stage1, stage2, stage3, tuning or projector, and ",full" for the long one."""
    name, _, variant = arg.partition(",")
    stages = {
        "lm": lm,
        "stage1": stage1,
        "stage2": stage2,
        "stage3": stage3,
        "tuning": tuning,
        "projector": projector,
    }
    if name not in stages or variant not in ("", "full"):
        raise ValueError(
            f"configs/phantom.py:{arg} is unknown; choose {', '.join(stages)}, with ',full' for the long run"
        )
    config = stages[name](full=variant == "full")
    config.checkpoint_every = 100
    return config


def lm(full: bool) -> ml_collections.ConfigDict:
    """Text pretraining of the small language model: findings from impressions, no image."""
    data = {"template": "text", "text_length": 128, "target_length": 56}
    steps = 600 if full else 300
    config = common.experiment("generative", {"llm": LLM}, ("params/llm/.*",), data, steps=steps, batch_size=32)
    config.optimizer.update(peak_lr=2e-3, weight_decay=0.1, clip=1.0, b2=0.95)
    return config


def stage1(full: bool) -> ml_collections.ConfigDict:
    """Contrastive image and text towers."""
    model = {"vision": VISION, "text": TEXT, "embed_dim": 128, "loss": "softmax"}
    data = {"template": "clip", "text_length": 56}
    steps = 800 if full else 260
    config = common.experiment("contrastive", model, (".*",), data, steps=steps, batch_size=64)
    config.optimizer.update(peak_lr=1e-3, weight_decay=0.05, clip=1.0, b2=0.98, warmup_ratio=0.2)
    return config


def stage2(full: bool) -> ml_collections.ConfigDict:
    """The projector alone."""
    data = {"template": "plain", "text_length": 56, "target_length": 56}
    model = {"vision": FEATURES, "llm": LLM, "projector": "mlp2x_gelu"}
    steps = 300 if full else 100
    config = common.experiment("generative", model, ("params/projector/.*",), data, steps=steps, batch_size=16)
    config.optimizer.update(peak_lr=5e-3, clip=1.0)
    return config


def stage3(full: bool) -> ml_collections.ConfigDict:
    """Projector and LoRA."""
    return _third(full, {"lora": LORA}, "lora/.*")


def tuning(full: bool) -> ml_collections.ConfigDict:
    """Stage 3 without adapters: projector and every weight of the language model."""
    config = _third(full, {}, "params/llm/.*")
    config.optimizer.peak_lr = 1e-3
    return config


def projector(full: bool) -> ml_collections.ConfigDict:
    """Stage 3 without adapters: the projector alone."""
    return _third(full, {})


def _third(full: bool, parts: dict[str, Any], *trainable: str) -> ml_collections.ConfigDict:
    """Stage 3 with more `parts` of the model, and what learns beside the projector."""
    data = {"template": "v1", "text_length": 112, "target_length": 56}
    model = {"vision": FEATURES, "llm": LLM, **parts, "projector": "mlp2x_gelu"}
    steps = 3500 if full else 1250
    learns = ("params/projector/.*", *trainable)
    config = common.experiment("generative", model, learns, data, steps=steps, batch_size=16)
    config.optimizer.update(peak_lr=5e-3, clip=1.0)
    return config
