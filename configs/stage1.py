"""Stage 1 of LLaVA-Rad at full size: BiomedCLIP-CXR, a contrastive image tower and text tower for chest radiographs.

    python -m launch.pack --dataset=folder --source=FILMS --image_size=518 --tokenizer=vocab.txt --out=CORPUS
    python -m launch.train --config=configs/stage1.py:a100-8 --data=CORPUS --workdir=RUN --base=TOWERS

FILMS has one CSV of images and English reports (the paper: over 697 thousand pairs). vocab.txt is BiomedBERT's. Without --base both
towers start from random weights. The machine after the colon is one of configs/hardware.py.

From the public BiomedCLIP, whose tower has patches of 16 pixels, and from DINOv2 (518 pixels already) with BiomedBERT:

    python -m launch.convert --format=open_clip --source=BIOMEDCLIP --image_size=512 --out=TOWERS
    python -m launch.train --config=configs/stage1.py:biomedclip,a100-8 --data=CORPUS_512 --workdir=RUN --base=TOWERS

    python -m launch.convert --format=dinov2 --source=DINOV2 --out=DINO
    python -m launch.convert --format=bert --source=BIOMEDBERT --out=BERT
    python -m launch.train --config=configs/stage1.py:a100-8 --data=CORPUS --workdir=RUN --base=DINO,BERT

CORPUS_512 is packed with --image_size=512. Stages 2 and 3 on such a run want --config.model.vision.image_size=512,
--config.model.vision.patch_size=16 and --config.model.vision.layer_scale=False.

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
# timm's vit_base_patch16_224, the tower of the public BiomedCLIP: plain blocks, patches of 16. Ours: 512 pixels, the multiple of 16 nearest to
# the paper's 518, 32 x 32 patches in place of its 37 x 37; at BiomedCLIP's own 224 a nodule of 10 mm is 5 pixels wide.
BIOMEDCLIP = {**VISION, "image_size": 512, "patch_size": 16, "layer_scale": False}
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


def get_config(arg: str = "a100-8") -> ml_collections.ConfigDict:
    """The experiment on a machine of configs/hardware.py, with "biomedclip" or "biomedclip," before it that of the public BiomedCLIP's tower."""
    variant, _, machine = arg.partition(",") if arg.split(",")[0] == "biomedclip" else ("", "", arg)
    vision = BIOMEDCLIP if variant else VISION
    # 512: head.proj.weight of the released tower.
    # open_clip's default loss; --config.model.loss=sigmoid is SigLIP's.
    model = {"vision": vision, "text": TEXT, "embed_dim": 512, "loss": "softmax"}
    # Ours: 256 tokens. The frontal films are ours too: the paper's filter of views is not published. "random" is open_clip's training crop,
    # "centre" shows the tower what stages 2 and 3 will.
    data = {"template": "clip", "text_length": 256, "selection": "frontal", "crop": "random"}
    steps = PAIRS * EPOCHS // BATCH
    config = common.experiment("contrastive", model, (".*",), data, steps=steps, batch_size=BATCH)
    # Ours: open_clip's AdamW for vision transformers; the warmup is shorter than its 10,000 steps.
    config.optimizer.update(peak_lr=5e-4, warmup_ratio=0.05, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2, clip=1.0)
    return hardware.on(machine or "a100-8", config)
