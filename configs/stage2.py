"""Stage 2 of LLaVA-Rad at full size: only the projector learns, from the image features of stage 1 to the word space of Vicuna-7B v1.5.

    python -m launch.pack --dataset=folder --source=MIMIC --image_size=518 --tokenizer=tokenizer.model --out=CORPUS
    python -m launch.train --config=configs/stage2.py:a100-8 --data=CORPUS --workdir=RUN --base=VICUNA,STAGE_1

MIMIC has one CSV with images, indications and findings (the original: 400,042 frontal films). tokenizer.model is Vicuna's. --base names
the run that holds the language model and the one that holds the image tower; the machine after the colon is one of configs/hardware.py.

"script" in a comment: the original repository's training script for this stage; "HF": a default of Hugging Face's Trainer it leaves alone.
"""

import ml_collections

from configs import common, hardware, stage1

# The output of block 11 of 12, class token dropped: mm_vision_select_layer -2, mm_vision_select_feature "patch" (released config.json).
FEATURES = {**stage1.VISION, "feature_layer": -2}
# Vicuna-7B v1.5, that is Llama 2 7B.
LLM = {
    "vocab_size": 32000,
    "width": 4096,
    "depth": 32,
    "heads": 32,
    "kv_heads": 32,
    "mlp_dim": 11008,
    "eps": 1e-5,
    "rope_theta": 10000.0,
    "max_positions": 4096,
    "dtype": "bfloat16",  # script
    "remat": "full",  # script: gradient checkpointing
    "unroll": 1,  # ours
}
# What stages 2 and 3 train with alike.
TRAINER = {
    "warmup_ratio": 0.03,  # script
    "b1": 0.9,  # HF
    "b2": 0.999,  # HF
    "eps": 1e-8,  # HF
    "weight_decay": 0.0,  # script
    "clip": 0.0,  # ours: off
}
FILMS = 400_042  # training rows that the original's loader keeps
BATCH = 256  # script


def get_config(machine: str = "a100-8") -> ml_collections.ConfigDict:
    """The experiment on a machine of configs/hardware.py."""
    data = {
        "template": "plain",  # script
        # Ours; the original cuts the words at 2,048. 168 words and 1,369 patches in place of one are a row of 1,536, two blocks of 768 of a
        # TPU's attention. Of the 3,425 reports with findings of Open-i, half have up to 56 tokens, 99 of 100 up to 138.
        "text_length": 168,
        "target_length": 166,
        "mean_text_length": 62,  # of those reports; only the estimates of launch.compile ask for it
        "selection": "frontal",  # the original's films are AP and PA
    }
    model = {"vision": FEATURES, "llm": LLM, "projector": "mlp2x_gelu"}  # script
    steps = -(-FILMS // BATCH)  # script: one epoch; 1,563
    config = common.experiment("generative", model, ("params/projector/.*",), data, steps=steps, batch_size=BATCH)
    config.frozen_dtype = "bfloat16"  # script
    config.optimizer.update(TRAINER, peak_lr=1e-3)  # script
    config.seed = 42  # HF
    return hardware.on(machine, config)
