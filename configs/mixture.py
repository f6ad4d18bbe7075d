"""What stage 1 is trained on: the corpora that are packed in one folder, by their names there, with a selection and a weight each.

    python -m launch.pack --dataset=mixture --recipe=configs/mixture.py --source=out/packed --out=out/pairs
    python -m launch.train --config=configs/stage1.py:a100-8 --data=out/pairs --config.data.selection=all --workdir=out/stage1

LLaVA-Rad's image tower was trained on over 697,000 pairs of several public corpora; how many of each it took is not published. The members
and weights are ours: every corpus of this project with English texts, each text once. --recipe.members.brax.weight=0.5 changes one, and
`configs/mixture.py:mimic_cxr,openi` takes those alone. Never run: nobody here has the corpora.
"""

import ml_collections

# Frontal films, since the projections of some corpora are not published.
MEMBERS = {
    "mimic_cxr": {"selection": "mimic_train_findings", "weight": 1.0},
    "chexpert_plus": {"selection": "frontal", "weight": 1.0},
    "padchest": {"selection": "frontal", "weight": 1.0},
    "brax": {"selection": "frontal", "weight": 1.0},
    "candid_ptx": {"selection": "frontal", "weight": 1.0},
    "vindr_cxr": {"selection": "frontal", "weight": 1.0},
    "object_cxr": {"selection": "frontal", "weight": 1.0},
    "chestxray14": {"selection": "frontal", "weight": 1.0},
    "openi": {"selection": "frontal", "weight": 1.0},
}


def get_config(names: str = "") -> ml_collections.ConfigDict:
    """The members that `names` lists, with commas; all of them without it. One that is not known gets its frontal films, once each."""
    chosen = names.split(",") if names else list(MEMBERS)
    once = {"selection": "frontal", "weight": 1.0}
    # Copies: members that share a dict would share what the command line changes.
    return ml_collections.ConfigDict({"seed": 0, "members": {name: dict(MEMBERS.get(name, once)) for name in chosen}})
