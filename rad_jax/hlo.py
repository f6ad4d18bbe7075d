"""Compiled programs as text (`compiled.as_text()`): instructions, sizes, loop trip counts, FLOPs and the groups of collectives.

The text is what XLA prints after scheduling, so that anyone who has it can count again. FLOPs are those of matrix products and
convolutions, 2 per multiply and add, as in XLA's own cost analysis; a loop's body counts as often as the loop turns.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1.0),
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2.0),
    **dict.fromkeys(("f32", "s32", "u32"), 4.0),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8.0),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) \(.*\{\s*")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*)", re.DOTALL)
_OPCODE = re.compile(r"(?:^| )([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `shape` is its type as text, `operands` are names, `attributes` is what stands behind the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression over the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it gives none."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    @property
    def collective(self) -> str | None:
        """The kind of collective, whether it is whole or one half of an asynchronous pair."""
        kind = self.opcode.removesuffix("-start").removesuffix("-done")
        return kind if kind in COLLECTIVES else None

    @property
    def called(self) -> str | None:
        """The computation that a fusion, call or asynchronous operation runs."""
        return self.attribute(r"(?:calls|to_apply|called_computation)=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Computation:
    """A sequence of instructions, in the order they run where the module is scheduled."""

    name: str
    instructions: Mapping[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        return next(i for i in self if i.root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the one it starts in."""

    computations: Mapping[str, Computation]
    entry: str

    def trips(self, home: Computation, loop: Instruction) -> int:
        """How often a `while` in `home` turns; of one that ends by its data, the most it can.

        XLA writes known counts down. Otherwise the condition compares a counter with a constant. The counter does not begin at zero where
        the compiler has taken the first turn out of the loop, and grows by more than one where it has unrolled the body.
        """
        known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.-]+)") or ""]
        body = self.computations[loop.attribute(r"body=%?([\w.-]+)") or ""]
        bounds = [int(i.literal) for i in self.inside(condition.name) if i.opcode == "constant" and _whole(i.literal)]
        first, step = 0, 1
        if (place := _counter(condition)) is not None:
            start = home.instructions[loop.operands[0]]
            first = _value(home, start.operands[place]) if start.opcode == "tuple" else 0
            step = _value(body, body.root.operands[place]) if body.root.opcode == "tuple" else 1
        return max(1, -(-(max(bounds, default=1) - first) // max(1, step)))

    def inside(self, name: str) -> Iterator[Instruction]:
        """All instructions of a computation and of the fusions in it."""
        for instruction in self.computations[name]:
            yield instruction
            if instruction.opcode == "fusion" and instruction.called:
                yield from self.inside(instruction.called)

    @functools.cached_property
    def flops(self) -> float:
        """Of one run of the whole program on one device."""
        return self._computation_flops(self.entry, {})

    def fusion_flops(self, name: str) -> float:
        """Of a computation and the fusions and calls in it."""
        return self._computation_flops(name, {})

    def _computation_flops(self, name: str, memo: dict[str, float]) -> float:
        if name not in memo:
            memo[name] = sum(self._flops(self.computations[name], i, memo) for i in self.computations[name])
        return memo[name]

    def _flops(self, home: Computation, instruction: Instruction, memo: dict[str, float]) -> float:
        if instruction.opcode in ("dot", "convolution"):
            return product_flops(home, instruction)
        if instruction.opcode == "while":
            body = instruction.attribute(r"body=%?([\w.-]+)") or ""
            return self.trips(home, instruction) * self._computation_flops(body, memo)
        if instruction.opcode == "conditional":
            return max(self._computation_flops(branch, memo) for branch in branches(instruction))
        called = instruction.called
        if instruction.opcode in ("fusion", "call", "async-start") and called:
            return self._computation_flops(called, memo)
        return 0.0


def parse(text: str) -> Module:
    """Reads a module's text; metadata with line breaks in it (Pallas kernels) stays with its instruction."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    lines: list[str] = []
    instructions: dict[str, Instruction] = {}

    def close() -> None:
        if lines:
            found = _instruction("\n".join(lines))
            instructions[found.name] = found
            lines.clear()

    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.fullmatch(line):
                current, instructions = match[2], {}
                entry = current if match[1] else entry
        elif line == "}":
            close()
            computations[current] = Computation(current, instructions)
            current = None
        elif _INSTRUCTION.match(line):
            close()
            lines.append(line)
        elif lines:
            lines.append(line)
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.fullmatch(line)
    assert match is not None, line
    rest = match[3]
    opcode = _OPCODE.search(rest)
    assert opcode is not None, line
    depth, end = 1, opcode.end()
    for parenthesis in re.finditer(r"[()]", rest[opcode.end() :]):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            end = opcode.end() + parenthesis.start()
            break
    inner = rest[opcode.end() : end]
    return Instruction(
        name=match[2],
        shape=rest[: opcode.start()],
        opcode=opcode[1],
        operands=tuple(_NAME.findall(inner)),
        literal=inner,
        attributes=rest[end + 1 :],
        root=bool(match[1]),
    )


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and dimensions of each array in a type."""
    found = [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(shape)]
    return [(kind, dims) for kind, dims in found if kind in BYTES]


def size(shape: str) -> float:
    """Bytes of all arrays in a type, without padding."""
    return sum(BYTES[kind] * math.prod(dims) for kind, dims in arrays(shape))


def branches(conditional: Instruction) -> list[str]:
    """The computations that a `conditional` chooses among."""
    listed = conditional.attribute(r"branch_computations=\{([^}]*)\}")
    if listed:
        return _NAME.findall(listed)
    return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", conditional.attributes)


def product_flops(home: Computation, product: Instruction) -> float:
    """Of a `dot`, or of a `convolution` counting only what is not padding."""
    (_, out), (_, left), (_, right) = (
        arrays(shape)[0] for shape in (product.shape, *(home.instructions[name].shape for name in product.operands[:2]))
    )
    if product.opcode == "dot":
        contracted = product.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2.0 * math.prod(out) * math.prod(left[int(n)] for n in contracted.split(",") if n)
    labels = product.attribute(r"dim_labels=(\S+?)(?:,|$)") or ""
    inputs, kernel, outputs = re.split(r"_|->", labels)
    spatial = sorted(label for label in outputs if label.isdigit())
    window = dict(part.split("=") for part in (product.attribute(r"window=\{([^}]*)\}") or "").split())

    def each(key: str, default: int) -> list[int]:
        return [int(n.split("_")[0]) for n in window[key].split("x")] if key in window else [default] * len(spatial)

    settings = zip(
        spatial, each("stride", 1), each("pad", 0), each("lhs_dilate", 1), each("rhs_dilate", 1), strict=True
    )
    hits = 1
    for label, stride, pad, left_step, right_step in settings:
        places = np.arange(out[outputs.index(label)])[:, None] * stride - pad
        places = places + np.arange(right[kernel.index(label)])[None, :] * right_step
        inside = (places >= 0) & (places % left_step == 0) & (places // left_step < left[inputs.index(label)])
        hits *= int(inside.sum())
    return 2.0 * hits * right[kernel.index("i")] * out[outputs.index("f")] * out[outputs.index("b")]


def _counter(condition: Computation) -> int | None:
    """Which element of the loop's tuple a condition compares with a constant, where it does so plainly."""
    for compare in condition:
        terms = [condition.instructions[name] for name in compare.operands] if compare.opcode == "compare" else []
        for term in terms:
            if term.opcode == "get-tuple-element" and any(other.opcode == "constant" for other in terms):
                return int(term.attribute(r"index=(\d+)") or 0)
    return None


def _value(home: Computation, name: str) -> int:
    """The constant that an instruction gives, or adds to the counter it starts from."""
    found, total = home.instructions[name], 0
    while True:
        terms = [home.instructions[operand] for operand in found.operands]
        if found.opcode == "constant":
            return total + int(found.literal) if _whole(found.literal) else total
        if found.opcode not in ("add", "copy", "bitcast"):
            return total
        constants = [term for term in terms if term.opcode == "constant"] if found.opcode == "add" else []
        total += sum(int(term.literal) for term in constants if _whole(term.literal))
        rest = [term for term in terms if term not in constants]
        if len(rest) != 1:
            return total
        found = rest[0]


def _whole(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


# ----------------------------------------------------------------------------------------------------------------------- who talks to whom


def groups(collective: Instruction, devices: int) -> list[list[int]]:
    """Partitions that take part in a collective together; of a permute, its pairs."""
    text = collective.attributes
    if pairs := collective.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}"):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        grid = np.arange(devices).reshape([int(n) for n in match[3].split(",")])
        if match[4]:
            grid = grid.transpose([int(n) for n in match[4].split(",")])
        return grid.reshape(int(match[1]), int(match[2])).tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        chosen = re.findall(r"'(\w+)'", match[2])
        grid = np.arange(devices).reshape(list(axes.values()))
        order = [i for i, name in enumerate(axes) if name not in chosen] + [list(axes).index(name) for name in chosen]
        return grid.transpose(order).reshape(-1, math.prod(axes[name] for name in chosen)).tolist()
    if listed := collective.attribute(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}"):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed)]
    return [list(range(devices))]
