"""The paper's ablations as far as the phantom can show them: the demo's recipe with one thing changed in each arm.

    python -m launch.sweep --sweep=configs/sweeps/phantom.py --out=out/ablations
    python -m launch.sweep --sweep=configs/sweeps/phantom.py:tiny --out=out/tiny

A stage that two arms share is trained once per seed. ":tiny" is two arms of a few steps, to see that everything works; it says nothing.
"""

import ml_collections

TRAINED = "--config.trainable="
ARMS = {
    "recipe": {},
    "adapters of rank 4": {"stage3": ("--config.model.lora.rank=4", "--config.model.lora.alpha=8.0")},
    "adapters of rank 64": {"stage3": ("--config.model.lora.rank=64", "--config.model.lora.alpha=128.0")},
    # Stage 2 again, in the words and for the steps of stage 3.
    "projector alone": {
        "configs": {"stage3": "configs/phantom.py:stage2"},
        "stage3": ("--config.data.template=v1", "--config.data.text_length=112", "--config.steps=1250"),
    },
    "projector of one matrix": dict.fromkeys(("stage2", "stage3"), ("--config.model.projector=linear",)),
    "every weight of the language model": {
        "stage3": (TRAINED + "('params/projector/.*','params/llm/.*','lora/.*')", "--config.optimizer.peak_lr=1e-3")
    },
    "image tower by SigLIP's loss": {"stage1": ("--config.model.loss=sigmoid",)},
    "image tower hardly trained": {"stage1": ("--config.steps=20",)},
    "images of half the size": {
        "data": "half",
        "stage1": ("--config.model.vision.image_size=56", "--config.model.vision.patch_size=8"),
        "stage2": ("--config.model.vision.image_size=56", "--config.model.vision.patch_size=8"),
        "stage3": ("--config.model.vision.image_size=56", "--config.model.vision.patch_size=8"),
    },
}


def get_config(arg: str = "demo") -> ml_collections.ConfigDict:
    """The sweep at demo size, or with "tiny" one that ends in minutes.

    Raises:
        ValueError: `arg` is something else.
    """
    if arg not in ("demo", "tiny"):
        raise ValueError(f"configs/sweeps/phantom.py:{arg} is unknown; choose demo or tiny")
    tiny = arg == "tiny"
    studies = 160 if tiny else 4600
    steps = {"lm": 6, "stage1": 6, "stage2": 4, "stage3": 8} if tiny else {}
    names = ("recipe", "adapters of rank 4") if tiny else tuple(ARMS)
    return ml_collections.ConfigDict(
        {
            # Names with flags of launch.pack; an arm without "data" uses the first.
            "corpora": tuple(
                (name, ("--dataset=phantom", f"--studies={studies}", f"--image_size={size}"))
                for name, size in (("whole", 112), ("half", 56))
                if not (tiny and name == "half")
            ),
            # In order: the config, the stages it starts from, and flags for all arms.
            "stages": tuple(
                (name, f"configs/phantom.py:{name}", bases, (f"--config.steps={steps[name]}",) if tiny else ())
                for name, bases in (("lm", ()), ("stage1", ()), ("stage2", ("lm", "stage1")), ("stage3", ("stage2",)))
            ),
            # Names with flags by stage; the first arm is what the others are compared with.
            "arms": tuple((name, ARMS[name]) for name in names),
            "seeds": (0, 1) if tiny else (0, 1, 2),
            "generate": ("--split=test", "--max_new_tokens=64"),
            "metrics": ("finding_macro_f1", "laterality", "rules_micro_14", "rouge_l", "bleu_4"),
        }
    )
