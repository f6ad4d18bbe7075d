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
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rad_jax import flops, hlo
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
        collectives: (kind, mesh axes, "bytes", "seconds" or "number") -> how much or many.
        unknown: names of Pallas kernels that no time is known for.
    """

    seconds: float = 0.0
    matmul: float = 0.0
    other: float = 0.0
    kernels: float = 0.0
    exposed: float = 0.0
    transfers: float = 0.0
    flops: float = 0.0
    collectives: dict[tuple[str, str, str], float] = dataclasses.field(default_factory=lambda: defaultdict(float))
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
            self.collectives[key] += times * value
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

    def spanned(self, group: Iterable[int]) -> str:
        """The mesh axes along which the members of a group differ: "fsdp", or "data+fsdp"."""
        where = np.unravel_index(list(group), tuple(self.axes.values()))
        return "+".join(name for name, values in zip(self.axes, where, strict=True) if len(set(values)) > 1) or "none"

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
        if len(slices) > 1:  # what is left after the part inside each slice
            seconds += self.between(kind, size / len(inside))
        return seconds

    def between(self, kind: str, size: float) -> float:
        """Seconds for `size` bytes of each chip to go between slices, over the data centre's network."""
        slices = len({place[0] for place in self.places}) or 2
        turns = 2 if kind == "all-reduce" else 1
        return turns * size * (1 - 1 / slices) / self.chip.dcn

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
    return _Reader(module, network).run(module.entry, _Links())[0]


@dataclasses.dataclass
class _Links:
    """Collectives under way.

    Attributes:
        free: when the links have done what was asked of them: they serve one asynchronous collective after another.
        network: the same of the data centre's network.
        arrival: when each of these will have arrived, in seconds from the start of the piece of schedule.
        carried: of collectives that fusions carry on, the seconds still to go; only their own fusions bring them on.
    """

    free: float = 0.0
    network: float = 0.0
    arrival: dict[str, float] = dataclasses.field(default_factory=dict)
    carried: dict[str, float] = dataclasses.field(default_factory=dict)

    def shifted(self, seconds: float) -> "_Links":
        """The same, with times counted from `seconds` earlier."""
        arrival = {key: time + seconds for key, time in self.arrival.items()}
        return _Links(self.free + seconds, self.network + seconds, arrival, dict(self.carried))


class _Reader:
    def __init__(self, module: hlo.Module, network: Network):
        self._module, self._network = module, network
        self._chip = network.chip

    def run(self, name: str, links: _Links) -> tuple[Reading, _Links]:
        """A computation, entered with collectives under way; also what is under way at its end, with times from there."""
        reading, links = Reading(), links.shifted(0.0)
        home = self._module.computations[name]
        for instruction in home:
            if instruction.opcode == "while":
                links = self._loop(home, instruction, reading, links)
            elif instruction.opcode in ("call", "conditional"):
                links = self._branch(instruction, reading, links)
            elif instruction.collective:
                self._collective(home, instruction, reading, links)
            elif instruction.opcode in ("send", "recv-done") and "is_host_transfer=true" in instruction.attributes:
                self._between_slices(home, instruction, reading, links)
            elif instruction.opcode in ("fusion", "async-start") and instruction.called:
                self._fusion(instruction, reading, links)
            elif instruction.opcode == "custom-call":
                self._kernel(instruction, reading)
            else:
                product = instruction.opcode in ("dot", "convolution")
                self._compute(instruction.cycles, hlo.product_flops(home, instruction) if product else 0.0, reading)
        return reading, links.shifted(-reading.seconds)

    def _compute(self, cycles: int, products: float, reading: Reading) -> None:
        seconds = cycles / self._chip.clock
        if products:
            reading.matmul += seconds
        else:
            reading.other += seconds
        reading.flops += products
        reading.seconds += seconds

    def _loop(self, home: hlo.Computation, loop: hlo.Instruction, reading: Reading, links: _Links) -> _Links:
        """The first turn finds under way what came before it, the others what the turn before them left."""
        body, turns = loop.attribute(r"body=%?([\w.-]+)") or "", self._module.trips(home, loop)
        first, left = self.run(body, links.shifted(-reading.seconds))
        reading.add(first)
        if turns > 1:
            again, left = self.run(body, left)
            reading.add(again, turns - 1)
        return left.shifted(reading.seconds)

    def _branch(self, instruction: hlo.Instruction, reading: Reading, links: _Links) -> _Links:
        """A call, or of several branches the longest."""
        names = hlo.branches(instruction) if instruction.opcode == "conditional" else [instruction.called or ""]
        found = [self.run(name, links.shifted(-reading.seconds)) for name in names]
        longest, left = max(found, key=lambda pair: pair[0].seconds)
        reading.add(longest)
        return left.shifted(reading.seconds)

    def _collective(self, home: hlo.Computation, instruction: hlo.Instruction, reading: Reading, links: _Links) -> None:
        if not instruction.opcode.endswith("-done"):
            seconds = self._count(home, instruction, reading)
            links.free = max(reading.seconds, links.free) + seconds
            links.arrival[instruction.name] = links.free
        if not instruction.opcode.endswith("-start"):
            name = instruction.operands[0] if instruction.opcode.endswith("-done") else instruction.name
            self._wait(links.arrival.pop(name, 0.0) - reading.seconds, reading)

    def _count(
        self, home: hlo.Computation, instruction: hlo.Instruction, reading: Reading, scatters: bool = False
    ) -> float:
        """Enters a collective's bytes and time into the reading; returns its seconds. An all-reduce that `scatters` is half of one."""
        kind = "reduce-scatter" if scatters else instruction.collective or ""
        given = sum(hlo.size(home.instructions[name].shape) for name in instruction.operands)
        size = hlo.size(instruction.shape)
        if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
            size -= given  # the type of a start holds the operands beside the results
        size = size if kind in ("all-gather", "all-to-all") else given
        groups = hlo.groups(instruction, self._network.devices)
        seconds = self._network.seconds(kind, size, groups)
        axes = self._network.spanned(
            {m for group in groups for m in group} if kind == "collective-permute" else groups[0]
        )
        self._enter(kind, axes, size, seconds, reading)
        return seconds

    def _enter(self, kind: str, axes: str, size: float, seconds: float, reading: Reading) -> None:
        for what, value in (("bytes", size), ("seconds", seconds), ("number", 1)):
            reading.collectives[kind, axes, what] += value
        reading.transfers += seconds

    def _between_slices(
        self, home: hlo.Computation, instruction: hlo.Instruction, reading: Reading, links: _Links
    ) -> None:
        """What the hosts of several slices do with each other's arrays, from a chip's `send` to the end of its `recv`."""
        rendezvous = r'_xla_host_transfer_rendezvous="([^"]+)"'
        if instruction.opcode == "recv-done":
            key = home.instructions[instruction.operands[0]].attribute(rendezvous) or ""
            self._wait(links.arrival.pop(key, 0.0) - reading.seconds, reading)
            return
        kind = (instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"') or "send").lower().replace("_", "-")
        size = hlo.size(home.instructions[instruction.operands[0]].shape)
        seconds = self._network.between(kind, size)
        links.network = max(reading.seconds, links.network) + seconds
        links.arrival[instruction.attribute(rendezvous) or instruction.name] = links.network
        self._enter(kind, "slices", size, seconds, reading)

    def _wait(self, seconds: float, reading: Reading) -> None:
        reading.exposed += max(0.0, seconds)
        reading.seconds += max(0.0, seconds)

    def _fusion(self, fusion: hlo.Instruction, reading: Reading, links: _Links) -> None:
        """A fusion; the compiler puts collectives into some, which carry them on beside their own work."""
        called = fusion.called or ""
        products = self._module.fusion_flops(called)
        found = self._inner_collective(called)
        if found is None:
            self._compute(fusion.cycles, products, reading)
            return
        home, collective = found
        key = collective.attribute(r'chain_id="(\d+)"') or collective.name
        targets = {i.attribute(r'custom_call_target="(\w+)"') for i in self._module.inside(called)}
        starts, ends = "AsyncCollectiveStart" in targets, "AsyncCollectiveDone" in targets
        alone = not starts and not ends and key not in links.carried
        if starts or alone:
            scatters = "all-reduce-scatter" in called
            links.carried[key] = self._count(home, collective, reading, scatters)
        if not alone:
            links.carried[key] = links.carried.get(key, 0.0) - fusion.cycles / self._chip.clock
        self._compute(fusion.cycles, products, reading)
        if ends or alone:
            self._wait(links.carried.pop(key), reading)

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

    def _kernel(self, call: hlo.Instruction, reading: Reading) -> None:
        """A Pallas kernel of splash attention."""
        if call.attribute(r'custom_call_target="([^"]+)"') != "tpu_custom_call":
            return
        kernel = re.match(r"splash_mha_(fwd|dq|dkv)", call.name)
        if kernel is None:
            reading.unknown.add(re.sub(r"[.\d]+$", "", call.name))
            return
        products, width = kernel_flops(kernel[1], call)
        # The multipliers stand 128 wide: narrower heads leave a part of them idle.
        share = KERNEL_SHARE[self._chip.generation][kernel[1]] * min(1.0, width / 128)
        seconds = products / (self._chip.peak * share)
        reading.kernels += seconds
        reading.seconds += seconds
        reading.flops += products


def kernel_flops(kernel: str, call: hlo.Instruction) -> tuple[float, int]:
    """FLOPs in the blocks that one of splash attention's kernels computes, and H.

    Its first result of three or more dimensions is [..., N, S, H] with S padded to whole blocks. Encoders attend to everything.
    """
    dims = max((dims for _, dims in hlo.arrays(call.shape) if len(dims) > 2), key=math.prod)
    causal = not re.search(r"/(vision|text)/", call.attribute(r'op_name="([^"]*)"') or "")
    pairs = flops.splash_pairs(dims[-2], causal)
    return 2.0 * KERNEL_PRODUCTS[kernel] * math.prod(dims[:-2]) * pairs * dims[-1], dims[-1]


def network_of(program: Any) -> Network:
    """The network of a compiled `aot.Program`."""
    flat = program.mesh.devices.reshape(-1)
    # Devices of a single slice have no slice_index.
    places = [(getattr(device, "slice_index", 0), tuple(device.coords)) for device in flat]
    return Network(program.place.chip, dict(program.mesh.shape), places, program.place.wrap)
