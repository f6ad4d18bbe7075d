"""The paper's ablations as far as the phantom can show them: the demo's recipe with one thing changed in each arm.

    python -m launch.sweep --sweep=configs/sweeps/phantom.py --out=out/ablations
    python -m launch.sweep --sweep=configs/sweeps/phantom.py:all --out=out/ablations
    python -m launch.sweep --sweep=configs/sweeps/phantom.py:tiny --out=out/tiny

Nine arms, about three quarters of an hour on two CPU cores; ":all" is all twelve, which takes a third longer and goes on from the nine.
":tiny" is two arms of a few steps, to see that everything works; it says nothing.

Seeds change stage 3 alone. What comes before is trained once, with the first seed, and shared by all arms that do not change it: intervals
hold the spread over seeds of the last stage (its order of rows, adapters and projector), not of towers and language model. Stage 3 is shorter
than the demo's, so that scores are lower.
"""

from typing import Any

import ml_collections

SMALL = ("--config.model.vision.image_size=56", "--config.model.vision.patch_size=8")
# A corpus in which a share of the whole one's training rows is left, as a mixture of it alone; its tokenizer and held-out films are the same.
MIX = ("--dataset=mixture", "--source={whole.parent}", "--recipe=configs/mixture.py:{whole.name}")
ALL = ("--config.data.selection=all",)  # a mixture has no other
PACK = ("--dataset=phantom", "--studies=4600")
CORPORA = {
    "whole": (*PACK, "--image_size=112"),
    "small": (*PACK, "--image_size=56", "--tokenizer={whole}/tokenizer.json"),
    "half": (*MIX, "--recipe.members.{whole.name}.weight=0.5"),
    "quarter": (*MIX, "--recipe.members.{whole.name}.weight=0.25"),
}
ARMS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "adapters of rank 4": {"stage3": ("--config.model.lora.rank=4", "--config.model.lora.alpha=8.0")},
    "projector alone": {"configs": {"stage3": "configs/phantom.py:projector"}},
    "every weight of the language model": {"configs": {"stage3": "configs/phantom.py:tuning"}},
    "projector of one matrix": dict.fromkeys(("stage2", "stage3"), ("--config.model.projector=linear",)),
    "image tower hardly trained": {"stage1": ("--config.steps=20",)},
    "images of half the size": {
        "data": dict.fromkeys(("stage1", "stage2", "stage3", "generate"), "small"),
        **dict.fromkeys(("stage1", "stage2", "stage3"), SMALL),
    },
    "without indication": {
        "stage3": ("--config.data.selection=frontal.without_indication",),
        "generate": ("--selection=all.without_indication",),
    },
    "a quarter of the reports": {
        "data": dict.fromkeys(("stage2", "stage3"), "quarter"),
        **dict.fromkeys(("stage2", "stage3"), ALL),
    },
}
MORE: dict[str, dict[str, Any]] = {
    "adapters of rank 64": {"stage3": ("--config.model.lora.rank=64", "--config.model.lora.alpha=128.0")},
    "image tower by SigLIP's loss": {"stage1": ("--config.model.loss=sigmoid",)},
    "half of the reports": {
        "data": dict.fromkeys(("stage2", "stage3"), "half"),
        **dict.fromkeys(("stage2", "stage3"), ALL),
    },
}
SETS = {"demo": ARMS, "all": ARMS | MORE, "tiny": {name: ARMS[name] for name in ("recipe", "a quarter of the reports")}}
STEPS = {"stage3": 280}
TINY_STEPS = {"lm": 6, "stage1": 6, "stage2": 4, "stage3": 8}
# Two cores with nothing else to do: packing, mixing and writing findings once; a training's start, and each step of a stage.
SECONDS = {
    "pack": 90.0,
    "mix": 10.0,
    "generate": 15.0,
    "start": 10.0,
    "lm": 0.3,
    "stage1": 0.35,
    "stage2": 0.12,
    "stage3": 0.19,
}


def get_config(arg: str = "demo") -> ml_collections.ConfigDict:
    """The sweep at demo size, "all" of it, or with "tiny" one that ends in minutes.

    Raises:
        ValueError: `arg` is something else.
    """
    if arg not in SETS:
        raise ValueError(f"configs/sweeps/phantom.py:{arg} is unknown; choose {', '.join(SETS)}")
    tiny = arg == "tiny"
    steps = TINY_STEPS if tiny else STEPS
    whole = tuple(word.replace("4600", "160") if tiny else word for word in CORPORA["whole"])
    under: dict[str, tuple[str, ...]] = {"lm": (), "stage1": (), "stage2": ("lm", "stage1"), "stage3": ("stage2",)}
    return ml_collections.ConfigDict(
        {
            # Names with flags of launch.pack, or with words for what has to be given; scores are of the first one's studies.
            "corpora": tuple((CORPORA | {"whole": whole}).items()),
            # In order: the config, the stages (or "given/NAME") it starts from, flags for all arms, and the corpus.
            "stages": tuple(
                (
                    name,
                    f"configs/phantom.py:{name}",
                    bases,
                    (f"--config.steps={steps[name]}",) if name in steps else (),
                    "whole",
                )
                for name, bases in under.items()
            ),
            # Names with what they change: flags by stage (and of "generate"), and "bases", "configs" and "data" by stage. The first arm is
            # what the others are compared with.
            "arms": tuple(SETS[arg].items()),
            "seeds": (0, 1) if tiny else (0, 1, 2),
            # Stages that seeds change; the others are trained with the first seed.
            "seeded": ("stage3",),
            "generate": ("--split=test", "--max_new_tokens=64"),
            "metrics": ("finding_macro_f1", "laterality", "rules_micro_14", "rouge_l", "bleu_4"),
            "seconds": SECONDS,
        }
    )
