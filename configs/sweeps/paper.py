"""The paper's ablations at full size, each arm the recipe of configs/stage1.py to stage3.py with one thing changed.

    python -m launch.sweep --sweep=configs/sweeps/paper.py:v5e-64 --corpora=all=CORPUS,rules=OTHER,... --given=RUNS --out=RUNS/ablations

Corpora and converted weights have to be there: --given names the folder with the bases that `given/` stands for below (launch.convert makes
them), --corpora a packed corpus for each name that an arm's "data" uses.
"""

from typing import Any

import ml_collections

from configs import stage1

SIZES = {"224": ("--config.model.vision.image_size=224",), "336": ("--config.model.vision.image_size=336",)}
# The public BiomedCLIP, converted with --image_size=512: the tower of configs/stage1.py:biomedclip in all stages.
_TOWER = tuple(
    f"--config.model.vision.{key}={stage1.BIOMEDCLIP[key]}" for key in ("image_size", "patch_size", "layer_scale")
)
BIOMEDCLIP: dict[str, Any] = {
    "data": "images_512",
    "configs": {"stage1": "configs/stage1.py:biomedclip,{machine}"},
    "stage2": _TOWER,
    "stage3": _TOWER,
}
ARMS: dict[str, dict[str, Any]] = {
    "recipe": {},
    # Image tower: another base for stages 2 and 3, instead of what stage 1 trains.
    **{
        f"tower: {name}": {"bases": {"stage2": ("given/vicuna", f"given/{name}")}}
        for name in ("openai_clip", "siglip", "dinov2", "rad_dino")
    },
    "tower: biomedclip": {
        **BIOMEDCLIP,
        "bases": {"stage1": ("given/biomedclip",), "stage2": ("given/vicuna", "given/biomedclip")},
    },
    # BiomedCLIP's own weights trained on with the same pairs.
    "tower: biomedclip continued": {**BIOMEDCLIP, "bases": {"stage1": ("given/biomedclip",)}},
    # Reports: sections by rules, by a language model, or both.
    "reports: by rules": {"data": "rules"},
    "reports: by a language model": {"data": "structured"},
    "reports: both": {"data": "both"},
    "without indication": {"data": "no_indication"},
    # What learns in stage 3.
    **{
        f"adapters of rank {rank}": {
            "stage3": (f"--config.model.lora.rank={rank}", f"--config.model.lora.alpha={2 * rank}.0")
        }
        for rank in (8, 16, 128)
    },
    "projector of one matrix": dict.fromkeys(("stage2", "stage3"), ("--config.model.projector=linear",)),
    "every weight of the language model": {"configs": {"stage3": "configs/stage3.py:full,{machine}"}},
    **{
        f"images of {size}": {"data": f"images_{size}", "stage1": flags, "stage2": flags, "stage3": flags}
        for size, flags in SIZES.items()
    },
    # Language model: another converted base.
    **{
        f"language model: {name}": {"bases": {"stage2": (f"given/{name}", "stage1")}}
        for name in ("llama2", "mistral", "llama3")
    },
    **{f"{share} % of the data": {"data": f"share_{share}"} for share in (10, 30)},
}


def get_config(machine: str = "v5e-64") -> ml_collections.ConfigDict:
    """The sweep on a machine of configs/hardware.py."""
    corpora = ("all", *sorted({arm["data"] for arm in ARMS.values() if "data" in arm}))
    return ml_collections.ConfigDict(
        {
            "corpora": tuple((name, ()) for name in corpora),
            "stages": (
                ("stage1", f"configs/stage1.py:{machine}", (), ()),
                ("stage2", f"configs/stage2.py:{machine}", ("given/vicuna", "stage1"), ()),
                ("stage3", f"configs/stage3.py:{machine}", ("stage2",), ()),
            ),
            "arms": tuple((name, _on(machine, arm)) for name, arm in ARMS.items()),
            "seeds": (0, 1, 2),
            "generate": ("--split=test", "--selection=frontal", "--dtype=bfloat16"),
            "metrics": ("rules_micro_14", "rules_macro_14", "rouge_l", "bleu_4"),
        }
    )


def _on(machine: str, arm: dict[str, Any]) -> dict[str, Any]:
    if "configs" not in arm:
        return arm
    return {**arm, "configs": {stage: name.format(machine=machine) for stage, name in arm["configs"].items()}}
