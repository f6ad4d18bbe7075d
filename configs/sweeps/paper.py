"""The paper's ablations at full size, each arm the recipe of configs/stage1.py to stage3.py with one thing changed.

    python -m launch.sweep --sweep=configs/sweeps/paper.py:v5e-64 --corpora=pairs=PAIRS,films=FILMS,... --given=BASES --out=RUNS/ablations

A command without --corpora says which it lacks: `pairs` are for stage 1, with BiomedBERT's vocab.txt as --tokenizer (a mixture
of corpora, configs/mixture.py, or one), `films` are packed with --dataset=mimic_cxr for stages 2 and 3 and for scoring, with the language
model's own tokenizer. launch.train reads films of the size that they were packed in, and goes on from a language model only with its own
tokenizer: hence a corpus for each size and each tokenizer. Shares of the films are packed here.

BASES has what launch.convert made of published weights, at the size they were published for:

    vicuna          --format=hf_llama   lmsys/vicuna-7b-v1.5
    llama2          --format=hf_llama   meta-llama/Llama-2-7b-hf; its tokenizer.model is Vicuna's
    mistral         --format=hf_llama   mistralai/Mistral-7B-v0.1
    llama3          --format=hf_llama   meta-llama/Meta-Llama-3-8B
    openai_clip     --format=clip       openai/clip-vit-large-patch14-336, LLaVA-1.5's tower
    biomedclip      --format=open_clip  microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224
    biomedclip_cxr  --format=open_clip  biomedclipcxr_518 of microsoft/llava-rad
    siglip          --format=siglip     google/siglip-base-patch16-384
    dinov2          --format=dinov2     facebook/dinov2-base
    rad_dino        --format=dinov2     microsoft/rad-dino

Stage 1 is trained once, stages 2 and 3 with every seed. The recipe trains on both kinds of reports. Arms of another image size train the tower
at that size: only launch.convert resamples positions.
"""

from typing import Any

import ml_collections

# What a config must say of another model than the recipe's; what it leaves open (activation, channel statistics) is the base's own.
# Of each model's published configuration: config.json on huggingface.co, open_clip_config.json for BiomedCLIP, whose sizes are those of
# timm's vit_base_patch16_224.
TOWERS: dict[str, dict[str, Any]] = {
    "openai_clip": {
        "image_size": 336,
        "width": 1024,
        "depth": 24,
        "heads": 16,
        "mlp_dim": 4096,
        "layer_scale": False,
        "eps": 1e-5,
    },
    "biomedclip": {"image_size": 224, "patch_size": 16, "layer_scale": False},
    "biomedclip_cxr": {},
    "siglip": {"image_size": 384, "patch_size": 16, "layer_scale": False},
    "dinov2": {},
    "rad_dino": {},
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama2": {},
    "mistral": {"kv_heads": 8, "mlp_dim": 14336},
    "llama3": {"vocab_size": 128256, "kv_heads": 8, "mlp_dim": 14336, "rope_theta": 500000.0},
}
LLM_STAGES = ("stage2", "stage3")
SCORED = (*LLM_STAGES, "generate")

# Pixels and tokenizer of every corpus that has to be given.
CORPORA = {
    "films": (518, "vicuna"),
    "films_224": (224, "vicuna"),
    "films_336": (336, "vicuna"),
    "films_384": (384, "vicuna"),
    "films_mistral": (518, "mistral"),
    "films_llama3": (518, "llama3"),
    "pairs": (518, "biomedbert"),
    "pairs_224": (224, "biomedbert"),
    "pairs_336": (336, "biomedbert"),
}
REPORTS = "mimic_train_findings"
SHARES = (10, 30)


def _settings(part: str, changes: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"--config.model.{part}.{name}={value}" for name, value in changes.items())


def _tower(name: str) -> dict[str, Any]:
    """Stages 2 and 3 on a published tower, instead of what stage 1 trains."""
    shape = TOWERS[name]
    films = f"films_{shape['image_size']}" if "image_size" in shape else "films"
    return {
        "bases": {"stage2": ("given/vicuna", f"given/{name}")},
        "data": dict.fromkeys(SCORED, films),
        **dict.fromkeys(LLM_STAGES, _settings("vision", shape)),
    }


def _sized(changes: dict[str, Any]) -> dict[str, Any]:
    """All three stages with another shape of the tower, on films of its size."""
    size = changes["image_size"]
    return {
        "data": {"stage1": f"pairs_{size}", **dict.fromkeys(SCORED, f"films_{size}")},
        **dict.fromkeys(("stage1", *LLM_STAGES), _settings("vision", changes)),
    }


def _language_model(name: str) -> dict[str, Any]:
    """Stages 2 and 3 of another language model, on films with its tokenizer."""
    films = f"films_{name}" if f"films_{name}" in CORPORA else "films"
    return {
        "bases": {"stage2": (f"given/{name}", "stage1")},
        "data": dict.fromkeys(SCORED, films),
        **dict.fromkeys(LLM_STAGES, _settings("llm", LANGUAGE_MODELS[name])),
    }


def _reports(selection: str) -> dict[str, Any]:
    return dict.fromkeys(LLM_STAGES, (f"--config.data.selection={selection}",))


ARMS: dict[str, dict[str, Any]] = {
    "recipe": {},
    **{f"tower: {name}": _tower(name) for name in TOWERS},
    # BiomedCLIP's own weights trained on with the same pairs.
    "tower: biomedclip continued": {**_sized(TOWERS["biomedclip"]), "bases": {"stage1": ("given/biomedclip",)}},
    # Sections of reports by rules, or by a language model.
    "reports: by rules": _reports(f"{REPORTS}.rule-based"),
    "reports: by a language model": _reports(f"{REPORTS}.gpt4"),
    "without indication": {
        "stage3": (f"--config.data.selection={REPORTS}.without_indication",),
        "generate": ("--selection=mimic_test_findings.without_indication",),
    },
    # What learns in stage 3.
    **{
        f"adapters of rank {rank}": {
            "stage3": (f"--config.model.lora.rank={rank}", f"--config.model.lora.alpha={2 * rank}.0")
        }
        for rank in (8, 16, 128)
    },
    "projector alone": {"configs": {"stage3": "configs/stage3.py:projector,{machine}"}},
    "every weight of the language model": {"configs": {"stage3": "configs/stage3.py:full,{machine}"}},
    "projector of one matrix": dict.fromkeys(LLM_STAGES, ("--config.model.projector=linear",)),
    **{f"images of {size}": _sized({"image_size": size}) for size in (224, 336)},
    **{f"language model: {name}": _language_model(name) for name in LANGUAGE_MODELS},
    # Of the films, for as many steps; stage 1 keeps all its pairs.
    **{
        f"{share} % of the data": {"data": dict.fromkeys(LLM_STAGES, f"films_share_{share}"), **_reports("all")}
        for share in SHARES
    },
}


def get_config(machine: str = "v5e-64") -> ml_collections.ConfigDict:
    """The sweep on a machine of configs/hardware.py."""
    member = "--recipe.members.{films.name}"
    mixtures = {
        f"films_share_{share}": (
            *("--dataset=mixture", "--source={films.parent}", "--recipe=configs/mixture.py:{films.name}"),
            *(f"{member}.selection={REPORTS}", f"{member}.weight={share / 100}"),
        )
        for share in SHARES
    }
    told = {
        name: f"packed with --image_size={size} and the tokenizer of {words}" for name, (size, words) in CORPORA.items()
    }
    stage, reports = "configs/{}.py:" + machine, (f"--config.data.selection={REPORTS}",)
    return ml_collections.ConfigDict(
        {
            "corpora": tuple((told | mixtures).items()),
            "stages": (
                # All of the pairs: frontal films are chosen when they are packed or mixed, and a mixture has no other selection.
                ("stage1", stage.format("stage1"), (), ("--config.data.selection=all",), "pairs"),
                ("stage2", stage.format("stage2"), ("given/vicuna", "stage1"), reports, "films"),
                ("stage3", stage.format("stage3"), ("stage2",), reports, "films"),
            ),
            "arms": tuple((name, _on(machine, arm)) for name, arm in ARMS.items()),
            "seeds": (0, 1, 2),
            "seeded": LLM_STAGES,
            "generate": ("--split=test", "--selection=mimic_test_findings", "--dtype=bfloat16"),
            "metrics": ("rules_micro_14", "rules_macro_14", "rouge_l", "bleu_4"),
        }
    )


def _on(machine: str, arm: dict[str, Any]) -> dict[str, Any]:
    if "configs" not in arm:
        return arm
    return {**arm, "configs": {stage: name.format(machine=machine) for stage, name in arm["configs"].items()}}
