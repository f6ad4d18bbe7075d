"""Stage 3 of LLaVA-Rad at full size: projector and low-rank adapters on every projection of Vicuna-7B v1.5 learn to write findings.

    python -m launch.train --config=configs/stage3.py:a100-8 --data=CORPUS --workdir=RUN --base=STAGE_2

    python -m launch.train --config=configs/stage3.py:full,v5p-64 ...
    python -m launch.train --config=configs/stage3.py:projector,v5e-64 ...

CORPUS is that of stage 2, and --base the run of stage 2, which knows its own bases; the machine after the colon is one of
configs/hardware.py. For comparison there are two without adapters: with "full" every weight of the language model learns, with "projector"
none does.

"script" in a comment: the original repository's training script for this stage; "HF": a default of Hugging Face's Trainer it leaves alone.
"""

import ml_collections

from configs import common, hardware, stage2

LORA = {
    "rank": 64,  # the original code's default; released adapter_config.json
    "alpha": 128.0,  # script; released adapter_config.json
    "dropout": 0.05,  # script; in effect 13/256, and one mask for adapters of one input (models/layers.py)
    "targets": ("q", "k", "v", "o", "gate", "up", "down"),  # the original code: every linear layer but the head
}
EPOCHS = 3  # script
BATCH = 64  # script: 4 GPUs of 16 rows


FULL_RATE = 2e-5  # LLaVA 1.5's script for fine-tuning without adapters


# What learns beside the projector.
VARIANTS = {"lora": ("lora/.*",), "full": ("params/llm/.*",), "projector": ()}


def get_config(arg: str = "a100-8") -> ml_collections.ConfigDict:
    """The experiment on a machine of configs/hardware.py, with "full," or "projector," before it one without adapters."""
    variant, _, machine = arg.partition(",") if arg.split(",")[0] in VARIANTS else ("lora", "", arg)
    data = {
        "template": "v1",  # script
        # Ours; the original cuts the words at 2,048 and pads to the longest of a batch. 296 words and 1,369 patches in place of one are a
        # row of 1,664, thirteen times the 128 that a TPU works in. The prompt's own words take 64, which leaves 232 for indication and
        # findings. Of the 3,425 reports with findings of Open-i, half have up to 130 words in all, 99 of 100 up to 220, and three are
        # longer than 296. Such a row loses the end of its findings, and metrics.jsonl counts it (truncated_rows): where reports are longer,
        # --config.data.text_length=424 --config.data.target_length=360 make rows of 1,792. launch.inspect says what a corpus needs.
        "text_length": 296,
        "target_length": 232,
        "mean_text_length": 134,  # of those reports; only the estimates of launch.compile ask for it
        "selection": "frontal",  # the original's films are AP and PA
    }
    model = {
        "vision": stage2.FEATURES,
        "llm": stage2.LLM,
        "projector": "mlp2x_gelu",  # script
        **({"lora": LORA} if variant == "lora" else {}),
    }
    steps = -(-EPOCHS * stage2.FILMS // BATCH)  # 18,752
    trainable = ("params/projector/.*", *VARIANTS[variant])
    config = common.experiment("generative", model, trainable, data, steps=steps, batch_size=BATCH)
    config.frozen_dtype = "bfloat16"  # script
    config.optimizer.update(
        stage2.TRAINER, peak_lr=FULL_RATE if variant == "full" else 1e-4
    )  # 1e-4: script, projector and adapters alike
    config.seed = 42  # HF
    return hardware.on(machine or "a100-8", config)
