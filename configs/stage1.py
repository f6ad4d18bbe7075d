"""Stage 1 of LLaVA-Rad at full size: BiomedCLIP-CXR, a contrastive image tower and text tower for chest radiographs.

    python -m launch.pack --dataset=folder --source=FILMS --image_size=518 --tokenizer=vocab.txt --out=CORPUS
    python -m launch.train --config=configs/stage1.py:a100-8 --data=CORPUS --workdir=RUN --base=TOWERS

FILMS has one CSV of images and English reports (the paper: over 697 thousand pairs). vocab.txt is BiomedBERT's. Without --base both
towers start from random weights. The machine after the colon is one of configs/hardware.py.

Shapes are those of the released weights. How the paper trained them was not published with the code: the schedule is ours.
"""

import ml_collections

from configs import common, hardware

# timm's vit_base_patch14_dinov2 at 518 pixels: the released biomedclipcxr_518.json names it; 37 x 37 patches.
VISION = {
    "image_size": 518,
    "patch_size": 14,
    "width": 768,
    "depth": 12,
    "heads": 12,
    "mlp_dim": 3072,
    "layer_scale": True,
    "eps": 1e-6,  # timm's default
    "dtype": "bfloat16",  # ours
    "remat": "full",  # ours
    "unroll": 1,  # ours
}
# BiomedBERT (PubMedBERT) base, uncased.
TEXT = {
    "vocab_size": 30522,
    "width": 768,
    "depth": 12,
    "heads": 12,
    "mlp_dim": 3072,
    "max_positions": 512,
    "dtype": "bfloat16",  # ours
    "remat": "full",  # ours
    "unroll": 1,  # ours
}
PAIRS = 697_000  # "over 697 thousand", the article
EPOCHS = 32  # ours
BATCH = 1024  # ours


def get_config(machine: str = "a100-8") -> ml_collections.ConfigDict:
    """The experiment on a machine of configs/hardware.py."""
    # 512: head.proj.weight of the released tower.
    # open_clip's default loss; --config.model.loss=sigmoid is SigLIP's.
    model = {"vision": VISION, "text": TEXT, "embed_dim": 512, "loss": "softmax"}
    # Ours: 256 tokens. The frontal films are ours too: the paper's filter of views is not published. "random" is open_clip's training crop,
    # "centre" shows the tower what stages 2 and 3 will.
    data = {"template": "clip", "text_length": 256, "selection": "frontal", "crop": "random"}
    steps = PAIRS * EPOCHS // BATCH
    config = common.experiment("contrastive", model, (".*",), data, steps=steps, batch_size=BATCH)
    # Ours: open_clip's AdamW for vision transformers; the warmup is shorter than its 10,000 steps.
    config.optimizer.update(peak_lr=5e-4, warmup_ratio=0.05, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2, clip=1.0)
    return hardware.on(machine, config)
