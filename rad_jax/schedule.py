"""A step's time, read off the schedule that the TPU compiler made: an estimate, not a measurement.

The scheduled text gives every operation the cycles that the compiler expects. They are added up in order, loops as often as they turn.
Collectives take their bytes over the bandwidth of the links that their devices span, one after another; an asynchronous one runs beside
the operations between its start and its end, and only what is left at its end is waited for. Pallas kernels have no cycles in the text:
theirs are the products in their blocks at the share of peak that the kernels' own instructions reach (`KERNEL_SHARE`). Host input,
stalls within operations and contention on links are left out.

Against the two published step times of dense training on v5e that could be rebuilt (16 and 32 billion parameters on 256 chips) this kind
of reading was 13 to 26 % too long; nothing calibrates it on other generations.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rad_jax import hlo
from rad_jax.chips import Chip

HOP = 1e-6  # seconds for a message to pass one chip

# Share of a chip's peak that splash attention's kernels reach in the blocks they compute, with heads of 128 channels and blocks of 896:
# products per head over the instruction bundles of the compiled kernel. Two-core chips run the backward kernels on one core.
KERNEL_SHARE = {
    "v4": {"fwd": 0.46, "dq": 0.39, "dkv": 0.40},
    "v5e": {"fwd": 0.60, "dq": 0.97, "dkv": 0.98},
    "v5p": {"fwd": 0.58, "dq": 0.47, "dkv": 0.47},
    "v6e": {"fwd": 0.24, "dq": 0.37, "dkv": 0.40},
}
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # of queries' block times keys' block times channels


@dataclasses.dataclass
class Reading:
    """Seconds, bytes and FLOPs of a piece of schedule on one chip.

    Attributes:
        seconds: from start to end; the sum of matmul, other, kernels and exposed.
        matmul, other, kernels: operations with matrix products, without, and Pallas kernels.
        exposed: waiting for collectives. transfers: collectives, hidden ones too.
        flops: of matrix products and kernels.
        collectives: (kind, mesh axes) -> [bytes, seconds, number].
        unknown: names of Pallas kernels that no time is known for.
    """

    seconds: float = 0.0
    matmul: float = 0.0
    other: float = 0.0
    kernels: float = 0.0
    exposed: float = 0.0
    transfers: float = 0.0
    flops: float = 0.0
    collectives: Counter[tuple[str, str, str]] = dataclasses.field(default_factory=Counter)
    unknown: set[str] = dataclasses.field(default_factory=set)

    @property
    def compute(self) -> float:
        """Seconds of operations, without waiting."""
        return self.matmul + self.other + self.kernels

    def add(self, other: "Reading", times: float = 1.0) -> None:
        """Adds another piece so many times."""
        for name in ("seconds", "matmul", "other", "kernels", "exposed", "transfers", "flops"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for key, value in other.collectives.items():
            self.collectives[key] += times * value  # type: ignore[assignment]
        self.unknown |= other.unknown


@dataclasses.dataclass(frozen=True)
class Network:
    """Where the program's partitions stand.

    Attributes:
        chip: their generation.
        axes: mesh axis names and sizes, in the order in which partitions are numbered.
        places: of each partition, its slice and its three coordinates in it; empty when not known.
        wrap: which coordinates close to a ring.
    """

    chip: Chip
    axes: dict[str, int]
    places: Sequence[tuple[int, tuple[int, int, int]]] = ()
    wrap: tuple[bool, bool, bool] = (False, False, False)

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())

    def spanned(self, group: Sequence[int]) -> str:
        """The mesh axes along which the members of a group differ: "fsdp", or "data+fsdp"."""
        names, rest = [], [set() for _ in self.axes]  # type: ignore[var-annotated]
        for member in group:
            for i, extent in reversed(list(enumerate(self.axes.values()))):
                rest[i].add(member % extent)
                member //= extent
        names = [name for name, values in zip(self.axes, rest, strict=True) if len(values) > 1]
        return "+".join(names) or "none"

    def seconds(self, kind: str, size: float, groups: Sequence[Sequence[int]]) -> float:
        """Of one collective over arrays of `size` bytes: the gathered, the reduced or the sent one, of one chip."""
        if kind == "collective-permute":
            return self._permute(size, groups)
        group = groups[0]
        if len(group) < 2:
            return 0.0
        slices = {self.places[member][0] for member in group} if self.places else {0}
        inside = [m for m in group if not self.places or self.places[m][0] == self.places[group[0]][0]]
        seconds = self._links(kind, size, inside) if len(inside) > 1 else 0.0
        if len(slices) > 1:  # what remains after the part inside each slice goes over the data centre's network
            share, turns = size / len(inside), 2 if kind == "all-reduce" else 1
            seconds += turns * share * (1 - 1 / len(slices)) / self.chip.dcn
        return seconds

    def _links(self, kind: str, size: float, group: Sequence[int]) -> float:
        bandwidth, hops = self.chip.ici, len(group)
        if self.places:
            bandwidth, hops = 0.0, 0
            for axis in range(3):
                extent = max(place[axis] for _, place in self.places) + 1
                found = len({self.places[member][1][axis] for member in group})
                if found > 1:
                    ring = self.wrap[axis] and found == extent
                    bandwidth += self.chip.ici * (2 if ring else 1)
                    hops += found // 2 if ring else found - 1
        if kind == "all-to-all":
            return size / 4 / bandwidth + hops * HOP
        turns = 2 if kind == "all-reduce" else 1
        return turns * (size * (1 - 1 / len(group)) / bandwidth + hops * HOP)

    def _permute(self, size: float, pairs: Sequence[Sequence[int]]) -> float:
        if not self.places:
            return size / self.chip.ici + HOP
        longest = 1
        for source, target in pairs:
            (here, start), (there, end) = self.places[source], self.places[target]
            if here != there:
                return size / self.chip.dcn
            hops = 0
            for axis in range(3):
                extent = max(place[axis] for _, place in self.places) + 1
                direct = abs(start[axis] - end[axis])
                hops += min(direct, extent - direct) if self.wrap[axis] else direct
            longest = max(longest, hops)
        return size * longest / self.chip.ici + longest * HOP


def read(text: str, network: Network) -> Reading:
    """The whole program, once."""
    module = hlo.parse(text)
    return _Reader(module, network).run(module.entry, {})[0]


@dataclasses.dataclass
class _Transfers:
    """Collectives under way: when each will have arrived, in seconds from the start of the piece; they share the links in turn."""

    arrival: dict[str, float]
    free: float = 0.0

    def start(self, key: str, now: float, seconds: float) -> None:
        self.free = max(now, self.free) + seconds
        self.arrival[key] = self.free


class _Reader:
    def __init__(self, module: hlo.Module, network: Network):
        self._module, self._network = module, network
        self._chip = network.chip

    def run(self, name: str, under_way: dict[str, float]) -> tuple[Reading, dict[str, float]]:
        """A computation, entered while transfers are under way; also what is under way at its end: seconds until each arrives."""
        reading = Reading()
        transfers = _Transfers(dict(under_way), max(under_way.values(), default=0.0))
        home = self._module.computations[name]
        for instruction in home:
            if instruction.opcode == "while":
                self._loop(instruction, reading, transfers)
            elif instruction.opcode in ("call", "conditional"):
                self._branch(instruction, reading, transfers)
            elif instruction.collective:
                self._collective(home, instruction, reading, transfers)
            elif instruction.opcode in ("fusion", "async-start") and instruction.called:
                self._fusion(instruction, reading, transfers)
            elif instruction.opcode == "custom-call":
                self._kernel(home, instruction, reading)
            else:
                flops = hlo.product_flops(home, instruction) if instruction.opcode in ("dot", "convolution") else 0.0
                self._compute(instruction.cycles, flops, reading)
        left = {key: arrives - reading.seconds for key, arrives in transfers.arrival.items()}
        return reading, {key: max(0.0, seconds) for key, seconds in left.items()}

    def _compute(self, cycles: int, flops: float, reading: Reading) -> None:
        seconds = cycles / self._chip.clock
        if flops:
            reading.matmul += seconds
        else:
            reading.other += seconds
        reading.flops += flops
        reading.seconds += seconds

    def _loop(self, loop: hlo.Instruction, reading: Reading, transfers: _Transfers) -> None:
        """The first turn finds the transfers of what came before, the others those of the turn before them."""
        body, turns = loop.attribute(r"body=%?([\w.-]+)") or "", self._module.trips(loop)
        first, left = self.run(body, _relative(transfers, reading.seconds))
        reading.add(first)
        if turns > 1:
            again, left = self.run(body, left)
            reading.add(again, turns - 1)
        _resume(transfers, left, reading.seconds)

    def _branch(self, instruction: hlo.Instruction, reading: Reading, transfers: _Transfers) -> None:
        """A call, or of several branches the longest."""
        names = hlo.branches(instruction) if instruction.opcode == "conditional" else [instruction.called or ""]
        found = [self.run(name, _relative(transfers, reading.seconds)) for name in names]
        longest, left = max(found, key=lambda pair: pair[0].seconds)
        reading.add(longest)
        _resume(transfers, left, reading.seconds)

    def _collective(
        self, home: hlo.Computation, instruction: hlo.Instruction, reading: Reading, transfers: _Transfers
    ) -> None:
        if instruction.opcode.endswith("-done"):
            self._wait(instruction.operands[0], reading, transfers)
            return
        seconds = self._count(home, instruction, reading)
        transfers.start(instruction.name, reading.seconds, seconds)
        if not instruction.opcode.endswith("-start"):
            self._wait(instruction.name, reading, transfers)

    def _count(self, home: hlo.Computation, instruction: hlo.Instruction, reading: Reading) -> float:
        """Enters a collective's bytes and time into the reading; returns its seconds."""
        kind = instruction.collective or ""
        given = sum(hlo.size(home.instructions[name].shape) for name in instruction.operands if name in home.instructions)
        size = hlo.size(instruction.shape)
        if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
            size -= given  # the type of a start holds the operands beside the results
        size = size if kind in ("all-gather", "all-to-all") else given
        groups = hlo.groups(instruction, self._network.devices)
        seconds = self._network.seconds(kind, size, groups)
        axes = self._network.spanned([m for g in groups for m in g] if kind == "collective-permute" else groups[0])
        for what, value in (("bytes", size), ("seconds", seconds), ("number", 1)):
            reading.collectives[kind, axes, what] += value  # type: ignore[assignment]
        reading.transfers += seconds
        return seconds

    def _wait(self, key: str, reading: Reading, transfers: _Transfers) -> None:
        waited = max(0.0, transfers.arrival.pop(key, 0.0) - reading.seconds)
        reading.exposed += waited
        reading.seconds += waited

    def _fusion(self, fusion: hlo.Instruction, reading: Reading, transfers: _Transfers) -> None:
        """A fusion; the compiler puts collectives into some, which carry them on beside their own work."""
        called = fusion.called or ""
        flops = self._module.fusion_flops(called)
        found = self._inner_collective(called)
        if found is None:
            self._compute(fusion.cycles, flops, reading)
            return
        home, collective = found
        key = collective.attribute(r'chain_id="(\d+)"') or collective.name
        targets = " ".join(i.attributes for i in self._module.inside(called) if i.opcode == "custom-call")
        starts, ends = "AsyncCollectiveStart" in targets, "AsyncCollectiveDone" in targets
        alone = not starts and not ends and key not in transfers.arrival
        if starts or alone:
            transfers.start(key, reading.seconds, self._count(home, collective, reading))
        self._compute(fusion.cycles, flops, reading)
        if ends or alone:
            self._wait(key, reading, transfers)

    def _inner_collective(self, name: str) -> tuple[hlo.Computation, hlo.Instruction] | None:
        home = self._module.computations[name]
        for instruction in home:
            if instruction.collective:
                return home, instruction
            if instruction.opcode == "fusion" and instruction.called:
                found = self._inner_collective(instruction.called)
                if found:
                    return found
        return None

    def _kernel(self, home: hlo.Computation, call: hlo.Instruction, reading: Reading) -> None:
        """A Pallas kernel of splash attention; [B, N, S, H] arrays, with the sequence as `attend` has padded it."""
        if call.attribute(r'custom_call_target="([^"]+)"') != "tpu_custom_call":
            return
        kernel = re.match(r"splash_mha_(fwd|dq|dkv)", call.name)
        shares = KERNEL_SHARE.get(self._chip.generation)
        if kernel is None or shares is None:
            reading.unknown.add(re.sub(r"[.\d]+$", "", call.name))
            return
        flops = kernel_flops(kernel[1], home, call)
        # The systolic array is 128 wide, both ways: narrower heads leave a part of it idle.
        seconds = flops / (self._chip.peak * shares[kernel[1]])
        reading.kernels += seconds
        reading.seconds += seconds
        reading.flops += flops


def kernel_flops(kernel: str, home: hlo.Computation, call: hlo.Instruction) -> float:
    """Products in the blocks that one of splash attention's kernels computes."""
    raise NotImplementedError


def _relative(transfers: _Transfers, now: float) -> dict[str, float]:
    return {key: max(0.0, arrives - now) for key, arrives in transfers.arrival.items()}


def _resume(transfers: _Transfers, left: dict[str, float], now: float) -> None:
    transfers.arrival = {key: now + seconds for key, seconds in left.items()}
    transfers.free = max(transfers.arrival.values(), default=now)


def network_of(program: Any) -> Network:
    """The network of a compiled `aot.Program`."""
    flat = program.mesh.devices.reshape(-1)
    places = [(device.slice_index or 0, tuple(device.coords)) for device in flat]
    return Network(program.place.chip, dict(program.mesh.shape), places, program.place.wrap)
