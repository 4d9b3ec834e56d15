"""What a compiled program does, counted from its text.

XLA's own account (`compiled.cost_analysis()`) counts the body of a loop once. Here the program is
walked from its entry, and a loop's body counts as often as it runs:

    flops      2 x the multiply-adds of matrix products and convolutions, in fusions too
    bytes      what instructions read and write: of a fusion its operands and results; of a slice,
               an update in place or a gather the part that is touched; nothing of what the
               compiler keeps in a memory of the chip's own (a layout's S(1) and above)
    sent       what a device sends in collectives over its links, with n devices a group and rings
               (or equally frugal ways): an all-gather of N bytes (n - 1) / n N, a reduce-scatter or
               all-to-all the same, an all-reduce twice that, a permutation N

A program of many devices is the program of one of them, so all of it is per device.
"""

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxdyn.plan.loops import Scope, loop
from jaxdyn.plan.text import (
    COLLECTIVES,
    Computation,
    Instruction,
    Number,
    called_by,
    numbers,
    parameters_of,
    parse,
    results_of,
)

# What moves no data, or leaves that to the computation it calls.
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
SLICES = {"dynamic-slice", "slice", "gather"}
# What the compilers for TPUs and GPUs note in the form of calls.
LABELS = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "Sharding",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Flops, bytes and collectives of one device; see the module.

    Attributes:
      flops: of matrix products and convolutions.
      bytes: read and written.
      sent: by ("all-reduce", devices a group), bytes that a device sends.
      moved: by the same, bytes of the whole arrays gathered, reduced, exchanged.
      uncounted: custom calls whose work is not known, by target, as often as they run.
    """

    flops: Number = 0
    bytes: Number = 0
    sent: Counter = dataclasses.field(default_factory=Counter)
    moved: Counter = dataclasses.field(default_factory=Counter)
    uncounted: Counter = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Cost") -> "Cost":
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Cost(*(a + b for a, b in pairs))

    def times(self, count: Number) -> "Cost":
        scale = lambda x: Counter({k: v * count for k, v in x.items()})
        return Cost(
            self.flops * count,
            self.bytes * count,
            scale(self.sent),
            scale(self.moved),
            scale(self.uncounted),
        )

    @property
    def collective_bytes(self) -> Number:
        """Bytes that a device sends, in all."""
        return sum(self.sent.values())


def cost_of(text: str, trips: int = 1, branch: Callable = max) -> Cost:
    """The cost of a program from `compiled.as_text()`.

    Args:
      text: of the program after compilation.
      trips: how often a loop runs whose trip count the compiler does not know.
      branch: which branch of a conditional counts, `max` or `min` by flops and bytes.
    """
    return Program(text, trips, branch).cost()


class Program:
    """A compiled program's computations, and the walk through them."""

    def __init__(self, text: str, trips: int, branch: Callable):
        self.computations, self.entry = parse(text)
        header = text.split("\n", 1)[0]
        count = lambda name: int((re.search(rf"{name}=(\d+)", header) or [0, 1])[1])
        self.devices = count("num_partitions") * count("replica_count")
        self.trips, self.branch = trips, branch

    def cost(self) -> Cost:
        return self.of(Scope(self.computations, self.entry, []))

    def of(self, scope: Scope, around: set[str] | None = None) -> Cost:
        """A computation's cost; within a fusion nothing is read or written.

        The compiler for TPUs may spread a collective over several fusions, which overlap it with
        their other work: `around` has those that the computation around a fusion met before it.
        """
        met = set[str]() if around is None else around
        lines = scope.computation.instructions.values()
        return sum((self.of_one(scope, one, met, around is not None) for one in lines), Cost())

    def of_one(self, scope: Scope, one: Instruction, met: set[str], fused: bool) -> Cost:
        opcode, computation = one.opcode, scope.computation
        if opcode == "while":
            count, kept = loop(scope, one)
            parts = (self.of(scope.enter(one, name, [kept])) for name in ("body", "condition"))
            return sum(parts, Cost()).times(self.trips if count is None else count)
        if opcode == "conditional":
            names = ("branch_computations", "true_computation", "false_computation")
            branches = [branch for name in names for branch in called_by(one, name)]
            given = scope.operands(one)[1:]
            costs = [
                self.of(Scope(self.computations, branch, [x]))
                for branch, x in zip(branches, given, strict=True)
            ]
            return self.branch(costs, key=lambda cost: (cost.flops, cost.bytes))
        for name in ("to_apply", "calls"):
            if opcode in ("call", "async") and called_by(one, name):
                return self.of(scope.enter(one, name, scope.operands(one)))

        cost = Cost() if fused else Cost(bytes=self.traffic(computation, one))
        if opcode == "fusion":
            cost += self.of(scope.enter(one, "calls", []), met)
        elif opcode == "dot":
            cost += Cost(flops=self.dot(computation, one))
        elif opcode == "convolution":
            cost += Cost(flops=self.convolution(computation, one))
        elif opcode == "custom-call":
            cost += self.custom_call(computation, one)
        elif opcode in COLLECTIVES:
            chain = re.search(r"channel_id=\d+.*chain_id=\"\d+\"", one.attributes)
            if chain is None or chain[0] not in met:
                cost += self.collective(computation, one)
            met |= {chain[0]} if chain else set()
        return cost

    # -- flops ----------------------------------------------------------------------------------

    def dot(self, computation: Computation, one: Instruction) -> Number:
        left = computation.instructions[one.operands[0]].arrays[0].dims
        contracted = math.prod(left[i] for i in numbers(one, "lhs_contracting_dims"))
        return 2 * math.prod(one.arrays[0].dims) * contracted

    def convolution(self, computation: Computation, one: Instruction) -> Number:
        """2 x multiply-adds with an element of the input: none with padding or dilation's zeros.

        The compiler for TPUs writes matrix products so, with batch axes as spatial ones.
        """
        left, right = (computation.instructions[name].arrays[0].dims for name in one.operands[:2])
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
        inputs, kernel, outputs = labels.groups()  # type: ignore[union-attr]
        out = one.arrays[0].dims
        places = 1
        for axis in sorted(set(inputs) - {"b", "f"}):
            window = window_of(one, int(axis))
            places *= positions(
                left[inputs.index(axis)],
                right[kernel.index(axis)],
                out[outputs.index(axis)],
                window,
            )
        groups = int((re.search(r"batch_group_count=(\d+)", one.attributes) or [0, 1])[1])
        rows = left[inputs.index("b")] // groups
        return 2 * rows * right[kernel.index("i")] * right[kernel.index("o")] * places

    def custom_call(self, computation: Computation, one: Instruction) -> Cost:
        """A matrix product of cuBLAS; others have a name, and no figures."""
        target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
        found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', one.attributes)
        if found is None:
            named = target[1] if target else "?"
            return Cost(uncounted=Counter({named: 1} if named not in LABELS else {}))
        left = computation.instructions[one.operands[0]].arrays[0].dims
        contracted = math.prod(left[int(i)] for i in json.loads(found[1]))
        return Cost(flops=2 * math.prod(one.arrays[0].dims) * contracted)

    # -- bytes ----------------------------------------------------------------------------------

    def traffic(self, computation: Computation, one: Instruction) -> Number:
        """Bytes of main memory that an instruction reads and writes."""
        if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
            return 0
        operands = [computation.instructions[name] for name in one.operands]
        sizes = [sum(x.nbytes for x in operand.arrays if x.main) for operand in operands]
        results = results_of(one)
        written = sum(x.nbytes for x in results if x.main)
        if one.opcode == "fusion":
            inner = self.computations[called_by(one, "calls")[0]]
            parts = [
                min(size, self.used(inner, parameter)) if size else 0
                for size, parameter in zip(sizes, parameters_of(inner), strict=True)
            ]
            new = self.made(inner, inner.root)
            pairs = zip(results, new, strict=True) if len(new) == len(results) else ()
            return sum(parts) + (sum(n for x, n in pairs if x.main) if pairs else written)
        if one.opcode in SLICES:
            whole = operands[0].arrays[0]
            read = sum(x.nbytes for x in results) if whole.main else 0
            return read + sum(sizes[1:]) + written
        if one.opcode == "dynamic-update-slice":
            return 2 * sizes[1]
        if one.opcode == "scatter":
            return sum(sizes[1:]) + 2 * sizes[-1]
        return sum(sizes) + written

    def used(self, computation: Computation, name: str) -> Number:
        """Bytes that a fusion reads of what it calls `name`: of slices only their own."""
        whole = sum(x.nbytes for x in computation.instructions[name].arrays)
        total: Number = 0
        for user in computation.instructions.values():
            if name not in user.operands:
                continue
            if user.opcode in SLICES and name == user.operands[0]:
                total += sum(x.nbytes for x in user.arrays)
            elif user.opcode == "bitcast":
                total += self.used(computation, user.name)
            elif user.opcode == "fusion":
                inner = self.computations[called_by(user, "calls")[0]]
                at = parameters_of(inner)[user.operands.index(name)]
                total += self.used(inner, at)
            elif not (user.opcode == "dynamic-update-slice" and name == user.operands[0]):
                return whole
        return min(total, whole)

    def made(self, computation: Computation, name: str) -> list[Number]:
        """Bytes that a fusion writes of each of its results: of updates in place only theirs."""
        one = computation.instructions[name]
        if one.opcode == "tuple":
            return [x for operand in one.operands for x in self.made(computation, operand)]
        if one.opcode == "bitcast":
            return self.made(computation, one.operands[0])
        if one.opcode == "dynamic-update-slice":
            return [computation.instructions[one.operands[1]].arrays[0].nbytes]
        if one.opcode == "fusion":
            inner = self.computations[called_by(one, "calls")[0]]
            return self.made(inner, inner.root)
        return [x.nbytes for x in one.arrays]

    # -- collectives ----------------------------------------------------------------------------

    def collective(self, computation: Computation, one: Instruction) -> Cost:
        kind, group = one.opcode, self.group_of(one)
        operands = [computation.instructions[name] for name in one.operands]
        whole = sum(x.nbytes for operand in operands for x in operand.arrays)
        if kind == "all-gather":
            whole = sum(x.nbytes for x in results_of(one))
        elif kind == "all-reduce" and feeds_a_slice(computation, one):
            kind = "reduce-scatter"  # as the compiler for TPUs writes it, in one fusion
        share = (group - 1) / group if group else 1
        if kind == "all-reduce":
            share *= 2
        elif kind.startswith("collective-"):
            share = 1
        return Cost(
            sent=Counter({(kind, group): share * whole}), moved=Counter({(kind, group): whole})
        )

    def group_of(self, one: Instruction) -> int:
        """How many devices take part together."""
        found = re.search(r"replica_groups=\[\d+,(\d+)\]<=", one.attributes)
        if found:
            return int(found[1])
        found = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", one.attributes)
        if found:
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        found = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", one.attributes)
        return len(found[1].split(",")) if found and found[1] else self.devices


def feeds_a_slice(computation: Computation, one: Instruction) -> bool:
    """Whether all that is left of a sum over devices is this device's part."""
    users = [x for x in computation.instructions.values() if one.name in x.operands]
    return bool(users) and all(x.opcode == "dynamic-slice" for x in users)


class Window(NamedTuple):
    """How a convolution goes along one axis."""

    stride: int = 1
    before: int = 0
    dilation: int = 1
    spread: int = 1


def window_of(one: Instruction, axis: int) -> Window:
    """`window={size=3x3 stride=2x1 pad=0_1x0_0 lhs_dilate=1x2 rhs_dilate=1x1}` at an axis."""
    found = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    take = lambda name, default: fields[name].split("x")[axis] if name in fields else default
    return Window(
        int(take("stride", 1)),
        int(take("pad", "0_0").split("_")[0]),
        int(take("rhs_dilate", 1)),
        int(take("lhs_dilate", 1)),
    )


@functools.lru_cache
def positions(size: int, kernel: int, out: int, window: Window) -> int:
    """Pairs of an output place and a kernel place that meet an element of the input."""
    start = np.arange(out, dtype=np.int64) * window.stride - window.before
    total = 0
    for k in range(kernel):
        at = start + k * window.dilation
        inside = (at >= 0) & (at <= (size - 1) * window.spread)
        total += int(np.sum(inside & (at % window.spread == 0)))
    return total
