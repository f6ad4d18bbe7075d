"""What a run changes (TrainState) and what it leaves alone: variables split by path, and joined again."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from rad_jax.errors import UserError
from rad_jax.lazy import first_layers

Tree = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and nothing else; saved and restored as one unit."""

    step: jax.Array
    rng: jax.Array
    trainable: Tree
    opt_state: Any


def split(variables: Mapping[str, Any], patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """Variables whose path matches one of `patterns` in full, and the others.

    Args:
        variables: nested dicts, collection names on top: a path reads "params/llm/layers/attn/q/kernel".
        patterns: regular expressions.

    Raises:
        UserError: a pattern matches nothing, so that a renamed module cannot silently stay frozen.
    """
    flat = flatten_dict(variables, sep="/")
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in flat):
            raise UserError(f"config.trainable: no variable matches {pattern!r}; the first are {sorted(flat)[:3]}.")
    chosen = {path for path in flat if any(re.fullmatch(pattern, path) for pattern in patterns)}
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def join(*trees: Mapping[str, Any]) -> Tree:
    """One tree from several; where two have the same path, the later one counts."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat.update(flatten_dict(tree, sep="/"))
    return unflatten_dict(flat, sep="/")


def select(base: Mapping[str, Any], shapes: Mapping[str, Any]) -> Tree:
    """The leaves of `base` that a model with `shapes` has; of a tower whose last blocks are not used, the first blocks.

    Raises:
        UserError: a leaf has another shape than the model's.
    """
    wanted, found = flatten_dict(shapes, sep="/"), flatten_dict(base, sep="/")
    chosen = {}
    for path in wanted.keys() & found.keys():
        leaf, shape = found[path], wanted[path].shape
        if "/blocks/" in path and leaf.shape[1:] == shape[1:]:
            leaf = first_layers(leaf, shape[0])
        if leaf.shape != shape:
            raise UserError(
                f"{path} is {leaf.shape} in the base but {shape} in this config: they are different models."
            )
        chosen[path] = leaf
    return unflatten_dict(chosen, sep="/")


def table(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    """How many parameters train and how many do not, by component, for people to read at the start of a run."""
    rows: dict[str, list[int]] = {}
    for column, tree in enumerate((trainable, frozen)):
        for path, leaf in flatten_dict(tree, sep="/").items():
            rows.setdefault("/".join(path.split("/")[:2]), [0, 0])[column] += leaf.size
    rows["total"] = [sum(row[i] for row in rows.values()) for i in (0, 1)]
    lines = [f"{'':24}{'trainable':>16}{'frozen':>16}"]
    lines += [f"{name:24}{train:16,}{kept:16,}" for name, (train, kept) in rows.items()]
    return "\n".join(lines)
