"""A corpus made of packed corpora: so many passes over a selection of each, exactly, and no image of one in another's held-out films.

The folder holds `corpus.json`, which names the members, an index of (member, row of its selection) for each split, and the tokenizer. The
films stay where they are. What a training set is mixed of is therefore written down row by row before training begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import rad_jax
from data.packing import MANIFEST, existing, staging
from data.records import SPLITS
from data.selections import read_images, write_index
from rad_jax.chat.access import strictest
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError

SELECTION = "all"
LEAKED = "whose image is held out in a member"


def pack(
    members: Mapping[str, Mapping[str, Any]], source: Path, out: Path, seed: int = 0
) -> tuple[dict[str, Any], bool]:
    """Packs a mixture into the folder `out`.

    Args:
        members: name of a corpus in `source` -> its `selection`, and `weight`, the passes over that selection's training rows in one pass over
            the mixture: 1 is every row once, 0.5 half of them, 2.25 every row twice and a quarter of them once more. Validation and test rows
            come once each.
        source: the folder of the packed corpora.
        out: must not exist, be empty, or hold the mixture of the same members.
        seed: of the choice of rows where a weight is no whole number.

    Returns:
        The manifest, and whether it was packed now.

    Raises:
        UserError: a member is missing or does not fit the others, or `out` holds something else.
    """
    source, out = source.expanduser().absolute(), out.expanduser().absolute()
    corpora = {name: Corpus.open(source / name) for name in members}
    _check(corpora, members)
    arguments = {
        "dataset": "mixture",
        "seed": seed,
        "members": {
            name: {
                "selection": member["selection"],
                "weight": float(member["weight"]),
                "fingerprint": corpora[name].fingerprint(member["selection"]),
            }
            for name, member in members.items()
        },
    }
    if out.exists() and (found := existing(out, arguments)):
        return found, False
    with staging(out) as (folder, _):
        first = next(iter(corpora.values()))
        shutil.copyfile(first.path / first.meta["tokenizer"], folder / first.meta["tokenizer"])
        manifest = _write(folder, out, corpora, arguments)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        folder.rename(out)
    return manifest, True


def _check(corpora: Mapping[str, Corpus], members: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError for members that do not fit together."""
    if not corpora:
        raise UserError("a mixture needs members: name some in --recipe.")
    for name, corpus in corpora.items():
        if "members" in corpus.meta:
            raise UserError(f"{corpus.path}: is a mixture itself: name its members instead.")
        if members[name]["selection"] not in corpus.meta["selections"]:
            known = ", ".join(corpus.meta["selections"])
            raise UserError(f"{corpus.path}: no selection {members[name]['selection']!r}: use one of {known}.")
        if not float(members[name]["weight"]) > 0:
            raise UserError(
                f"the weight of {name} is {members[name]['weight']}: give a number above 0, or leave it out."
            )
    for what, of in (
        ("image size", lambda corpus: corpus.image_size),
        ("tokenizer", lambda corpus: hashlib.sha256((corpus.path / corpus.meta["tokenizer"]).read_bytes()).hexdigest()),
    ):
        found = {name: of(corpus) for name, corpus in corpora.items()}
        first = next(iter(found))
        other = next((name for name in found if found[name] != found[first]), None)
        if other is not None:
            raise UserError(f"{first} and {other} differ in {what}: pack them with the same one.")


def _write(folder: Path, out: Path, corpora: Mapping[str, Corpus], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the indices; returns the manifest."""
    held_out = np.unique(
        np.concatenate([read_images(corpus.path, split) for corpus in corpora.values() for split in SPLITS[1:]])
    )
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    members = []
    for number, (name, corpus) in enumerate(corpora.items()):
        chosen = arguments["members"][name]
        rows, leaked = {}, 0
        for split in SPLITS:
            index = _index(corpus, split, chosen["selection"])
            kept = np.arange(len(index))
            if split == "train":
                kept = kept[~np.isin(read_images(corpus.path, split)[index[:, 0]], held_out)]
                leaked = len(index) - len(kept)
                kept = _passes(kept, chosen["weight"], np.random.default_rng([arguments["seed"], number]))
            rows[split] = len(kept)
            parts[split].append(np.stack([np.full(len(kept), number), kept], axis=1))
        known = {"name": name, "path": os.path.relpath(corpus.path, out), "dataset": corpus.meta["dataset"]}
        members.append(known | chosen | {"rows": rows, LEAKED: leaked})
    of_split = {split: write_index(folder, SELECTION, split, np.concatenate(parts[split])) for split in SPLITS}
    fingerprints = "".join(f"{member['name']} {member['fingerprint']}\n" for member in members)
    first = next(iter(corpora.values()))
    return {
        "format_version": rad_jax.FORMAT_VERSION,
        "dataset": "mixture",
        "access": strictest(corpus.access for corpus in corpora.values()),
        "image_size": first.image_size,
        "tokenizer": first.meta["tokenizer"],
        "members": members,
        "splits": {split: of_split[split]["rows"] for split in SPLITS},
        "selections": {SELECTION: {"splits": of_split}},
        "fingerprint": hashlib.sha256(fingerprints.encode()).hexdigest(),
        "arguments": arguments,
    }


def _index(corpus: Corpus, split: str, selection: str) -> np.ndarray:
    """The rows of a selection, empty where it has none."""
    if not corpus.meta["selections"][selection]["splits"][split]["rows"]:
        return np.zeros((0, 2), np.int32)
    return corpus.rows(split, selection)


def _passes(rows: np.ndarray, weight: float, rng: np.random.Generator) -> np.ndarray:
    """round(weight * n) of n rows: all of them as often as that goes, and a random part once more, in order."""
    whole, rest = divmod(round(weight * len(rows)), max(len(rows), 1))
    return np.sort(np.concatenate([np.tile(rows, whole), rng.choice(rows, rest, replace=False)])) if len(rows) else rows
