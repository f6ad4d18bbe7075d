"""The mechanics of a mapping table: foreign tensors on one side, leaves of our parameter trees on the other.

A table is a list of entries, one per foreign tensor (or per foreign tensor of every layer). The same entry is read forwards by
`load` and backwards by `store`, so that what comes in goes out again bit for bit. Foreign tensors are looked up and yielded one
at a time: nothing here holds a foreign state dict.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rad_jax.errors import UserError

Shape = tuple[int, ...]
Leaves = tuple[np.ndarray, ...]
SHOWN = 12  # names listed in an error message


@dataclasses.dataclass(frozen=True)
class Entry:
    """One foreign tensor and the leaves of ours that it holds.

    Attributes:
        name: foreign name; `{}` stands for the layer's number.
        shape: of the foreign tensor.
        leaves: our paths ("blocks/attn/q/kernel") and their shapes within one layer; none for a tensor that we have no place for.
        read: the foreign tensor to our leaves.
        write: our leaves to the foreign tensor; the inverse of `read`.
        layers: L where our leaves are stacked [L, ...], None where they are not.
        unread: whether the foreign model never uses the tensor, so that a base carries it as it is.
    """

    name: str
    shape: Shape
    leaves: tuple[tuple[str, Shape], ...]
    read: Callable[[np.ndarray], Leaves]
    write: Callable[..., np.ndarray]
    layers: int | None = None
    unread: bool = False

    def names(self) -> list[str]:
        """The foreign names, layer by layer."""
        return [self.name] if self.layers is None else [self.name.format(layer) for layer in range(self.layers)]


@dataclasses.dataclass(frozen=True)
class Table:
    """A foreign format: its entries, and patterns of foreign names that hold nothing we use."""

    format: str
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()

    def under(self, path: str, name: str) -> "Table":
        """The same table one level down: `path` goes before our paths ("vision/"), `name` before foreign names ("visual.trunk.")."""
        entries = tuple(
            dataclasses.replace(e, name=name + e.name, leaves=tuple((path + leaf, shape) for leaf, shape in e.leaves))
            for e in self.entries
        )
        return Table(self.format, entries, tuple(re.escape(name) + pattern for pattern in self.ignored))

    def shapes(self) -> dict[str, Shape]:
        """Every foreign name and its shape, in the order of `store`."""
        return {name: entry.shape for entry in self.entries for name in entry.names()}


def stacked(entries: Iterable[Entry], layers: int) -> tuple[Entry, ...]:
    """Entries of one layer as entries of all `layers`."""
    return tuple(dataclasses.replace(entry, layers=layers) for entry in entries)


class Piece(NamedTuple):
    """One leaf of ours, of one layer where it is stacked: what a base has on disk."""

    path: str
    layer: int | None
    shape: Shape
    dtype: np.dtype


def check(table: Table, shapes: Mapping[str, Shape]) -> list[str]:
    """Refuses foreign tensors that the table does not describe.

    Args:
        table: the foreign format.
        shapes: of all foreign tensors, by name.

    Returns:
        Names that the model never uses, to be carried along.

    Raises:
        UserError: names that are missing or that the table does not know, or tensors of another shape; all of them are listed.
    """
    wanted = table.shapes()
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in table.ignored) or r"(?!)")
    unread = {name for entry in table.entries if entry.unread for name in entry.names()}
    _refuse(
        table,
        missing=[name for name in wanted if name not in shapes and name not in unread],
        unknown=[name for name in shapes if name not in wanted and not ignored.fullmatch(name)],
        misshapen=[
            f"{name} {tuple(shapes[name])} instead of {shape}"
            for name, shape in wanted.items()
            if name in shapes and tuple(shapes[name]) != shape
        ],
    )
    return [name for name in shapes if name in unread or name not in wanted]


def pieces(table: Table, dtypes: Mapping[str, np.dtype]) -> list[Piece]:
    """What `read` gives, in its order, known before anything is read."""
    return [
        Piece(path, layer if entry.layers is not None else None, shape, dtypes[name])
        for entry in table.entries
        for layer, name in enumerate(entry.names())
        for path, shape in entry.leaves
    ]


def read(table: Table, tensors: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The values of `pieces`; foreign tensors are looked up one at a time, those without a place of ours only to be checked."""
    for entry in table.entries:
        for name in entry.names():
            if not entry.unread:
                yield from entry.read(tensors[name])


def load(table: Table, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameter tree from foreign tensors, in their dtype.

    Raises:
        UserError: as `check` does.
    """
    tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    check(table, {name: tensor.shape for name, tensor in tensors.items()})
    stacks = {path: entry.layers for entry in table.entries for path, _ in entry.leaves}
    leaves: dict[str, np.ndarray] = {}
    found = pieces(table, {name: tensor.dtype for name, tensor in tensors.items()})
    for piece, value in zip(found, read(table, tensors), strict=True):
        layers = stacks[piece.path]
        if layers is None:
            leaves[piece.path] = value
        else:
            leaves.setdefault(piece.path, np.empty((layers, *piece.shape), piece.dtype))[piece.layer] = value
    return unflatten(leaves)


def store(
    table: Table, tree: Mapping[str, Any], carried: Mapping[str, np.ndarray] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Foreign names and tensors from our parameter tree, one at a time, in the tree's dtype.

    Args:
        table: the foreign format.
        tree: of arrays, lazy ones among them.
        carried: foreign tensors that the model never uses, as they came.

    Raises:
        UserError: leaves that are missing or that the table does not know, or of another shape; all of them are listed. Raised at the
            first item, before anything is yielded.
    """
    found, carried = flatten(tree), dict(carried or {})
    wanted = {
        path: shape if entry.layers is None else (entry.layers, *shape)
        for entry in table.entries
        for path, shape in entry.leaves
    }
    _refuse(
        table,
        missing=[path for path in wanted if path not in found],
        unknown=[path for path in found if path not in wanted],
        misshapen=[
            f"{path} {np.shape(found[path])} instead of {shape}"
            for path, shape in wanted.items()
            if path in found and np.shape(found[path]) != shape
        ],
    )
    for entry in table.entries:
        for layer, name in enumerate(entry.names()):
            if name in carried:
                yield name, carried.pop(name)
                continue
            leaves = [found[path] for path, _ in entry.leaves]
            if entry.layers is not None:
                leaves = [leaf[layer] for leaf in leaves]
            yield name, entry.write(*(np.asarray(leaf) for leaf in leaves))
    yield from carried.items()


def outline(
    table: Table, tree: Mapping[str, Any], carried: Mapping[str, np.ndarray] | None = None
) -> dict[str, tuple[Shape, np.dtype]]:
    """Name, shape and dtype of what `store` gives, in its order. Tensors that have no leaf of ours are of the first leaf's dtype."""
    found, carried = flatten(tree), dict(carried or {})
    usual = np.dtype(next(iter(found.values())).dtype)
    plan = {}
    for entry in table.entries:
        dtype = np.dtype(found[entry.leaves[0][0]].dtype) if entry.leaves else usual
        for name in entry.names():
            kept = carried.pop(name, None)
            plan[name] = (entry.shape, dtype) if kept is None else (kept.shape, kept.dtype)
    return plan | {name: (tensor.shape, tensor.dtype) for name, tensor in carried.items()}


def same(path: str, name: str, shape: Shape, foreign: Shape | None = None) -> Entry:
    """A leaf that is stored as it is, or (with `foreign`) under another shape of the same order."""
    foreign = shape if foreign is None else foreign
    return Entry(name, foreign, ((path, shape),), lambda x: (x.reshape(shape),), lambda x: x.reshape(foreign))


def linear(path: str, name: str, inputs: Shape, outputs: Shape, bias: bool = True) -> list[Entry]:
    """torch's Linear, weight (out, in), and our kernel [*in, *out]; head axes of ours are one axis of theirs."""
    rows, columns = math.prod(outputs), math.prod(inputs)
    entries = [
        Entry(
            f"{name}.weight",
            (rows, columns),
            ((f"{path}/kernel", inputs + outputs),),
            lambda x: (x.T.reshape(inputs + outputs),),
            lambda x: x.reshape(columns, rows).T,
        )
    ]
    return [*entries, same(f"{path}/bias", f"{name}.bias", outputs, (rows,))] if bias else entries


def fused(paths: Sequence[str], name: str, inputs: Shape, outputs: Shape) -> list[Entry]:
    """One torch Linear with bias whose output rows are those of several of ours, one after the other (timm's qkv)."""
    parts, rows, columns = len(paths), math.prod(outputs), math.prod(inputs)

    def read(x: np.ndarray) -> Leaves:
        return tuple(part.T.reshape(inputs + outputs) for part in np.split(x, parts))

    def write(*leaves: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf.reshape(columns, rows).T for leaf in leaves])

    return [
        Entry(
            f"{name}.weight",
            (parts * rows, columns),
            tuple((f"{path}/kernel", inputs + outputs) for path in paths),
            read,
            write,
        ),
        Entry(
            f"{name}.bias",
            (parts * rows,),
            tuple((f"{path}/bias", outputs) for path in paths),
            lambda x: tuple(part.reshape(outputs) for part in np.split(x, parts)),
            lambda *leaves: np.concatenate([leaf.reshape(rows) for leaf in leaves]),
        ),
    ]


def patches(path: str, name: str, size: int, channels: int, width: int, bias: bool) -> list[Entry]:
    """torch's Conv2d over non-overlapping patches, weight OIHW, and our kernel [Y, X, C, D]."""
    kernel = Entry(
        f"{name}.weight",
        (width, channels, size, size),
        ((f"{path}/kernel", (size, size, channels, width)),),
        lambda x: (x.transpose(2, 3, 1, 0),),
        lambda x: x.transpose(3, 2, 0, 1),
    )
    return [kernel, same(f"{path}/bias", f"{name}.bias", (width,))] if bias else [kernel]


def norm(path: str, name: str, width: int) -> list[Entry]:
    """LayerNorm: weight and bias."""
    return [same(f"{path}/scale", f"{name}.weight", (width,)), same(f"{path}/bias", f"{name}.bias", (width,))]


def constant(name: str, shape: Shape, value: float) -> Entry:
    """A tensor that the foreign model has and ours has not: written with `value`, refused when it holds anything else."""

    def read(x: np.ndarray) -> Leaves:
        if not np.all(x == value):
            raise UserError(f"the tensor {name} is not {value:g} everywhere, and this model has no place for it.")
        return ()

    return Entry(name, shape, (), read, lambda: np.full(shape, value, np.float32))


def filler(name: str, shape: Shape) -> Entry:
    """A tensor that the foreign model has and never uses: written as zeros, whatever it holds is not read."""
    return Entry(name, shape, (), lambda x: (), lambda: np.zeros(shape, np.float32), unread=True)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to leaves by path."""
    leaves = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves.update(flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value})
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path to nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _refuse(table: Table, **problems: list[str]) -> None:
    """Raises one UserError for all names that are wrong, by kind."""
    found = [f"{kind}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"weights do not fit the {table.format} model: {'; '.join(found)}.")


def listed(names: Sequence[str]) -> str:
    """The first `SHOWN` names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
