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
    across     of that, what has to leave its host, where groups have members on several: each host
               takes in what the h - 1 others have, through all its members at once

A program of many devices is the program of one of them, so all of it is per device.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from jaxdyn.plan.loops import Scope, loop
from jaxdyn.plan.products import PRODUCTS
from jaxdyn.plan.text import (
    COLLECTIVES,
    Computation,
    Instruction,
    Number,
    called_by,
    parse,
    results_of,
)
from jaxdyn.plan.traffic import traffic

# What the compilers for TPUs and GPUs note in the form of calls.
LABELS = {
    *("AllocateBuffer", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast", "Sharding"),
    *("AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"),
    *("PrepareAsyncCallDone", "PrepareAsyncCallStart"),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Flops, bytes and collectives of one device; see the module.

    Attributes:
      flops: of matrix products and convolutions.
      bytes: read and written.
      sent: by ("all-reduce", devices a group), bytes that a device sends.
      moved: by the same, bytes of the whole arrays gathered, reduced, exchanged.
      across: bytes that a device sends to other hosts.
      uncounted: custom calls whose work is not known, by target, as often as they run.
    """

    flops: Number = 0
    bytes: Number = 0
    sent: Counter = dataclasses.field(default_factory=Counter)
    moved: Counter = dataclasses.field(default_factory=Counter)
    across: Number = 0
    uncounted: Counter = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Cost") -> "Cost":
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Cost(*(a + b for a, b in pairs))

    def times(self, count: Number) -> "Cost":
        def scale(x):
            return (
                Counter({k: v * count for k, v in x.items()}) if isinstance(x, dict) else x * count
            )

        return Cost(*(scale(getattr(self, f.name)) for f in dataclasses.fields(self)))

    @property
    def collective_bytes(self) -> Number:
        """Bytes that a device sends, in all."""
        return sum(self.sent.values())


def cost_of(text: str, trips: int = 1, branch: Callable = max, hosts: int = 1) -> Cost:
    """The cost of a program from `compiled.as_text()`.

    Args:
      text: of the program after compilation.
      trips: how often a loop runs whose trip count the compiler does not know.
      branch: which branch of a conditional counts, `max` or `min` by flops and bytes.
      hosts: of the devices, each of which has as many, in order.
    """
    return Walk(text, trips, branch, hosts).cost()


class Walk:
    """The way through a compiled program's computations, each as often as it runs."""

    def __init__(self, text: str, trips: int, branch: Callable, hosts: int):
        self.computations, self.entry = parse(text)
        header = text.split("\n", 1)[0]
        count = lambda name: int((re.search(rf"{name}=(\d+)", header) or [0, 1])[1])
        self.devices = count("num_partitions") * count("replica_count")
        self.trips, self.branch, self.hosts = trips, branch, hosts

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

        cost = Cost() if fused else Cost(bytes=traffic(self.computations, computation, one))
        if opcode == "fusion":
            cost += self.of(scope.enter(one, "calls", []), met)
        elif opcode in PRODUCTS:
            flops = PRODUCTS[opcode](computation, one)
            cost += Cost(uncounted=unknown(one)) if flops is None else Cost(flops=flops)
        elif opcode in COLLECTIVES:
            chain = re.search(r"channel_id=\d+.*chain_id=\"\d+\"", one.attributes)
            if chain is None or chain[0] not in met:
                cost += collective(computation, one, self.devices, self.hosts)
            met |= {chain[0]} if chain else set()
        return cost


def collective(computation: Computation, one: Instruction, devices: int, hosts: int) -> Cost:
    """What a device sends in a collective of a program of so many devices."""
    groups = groups_of(one, devices)
    kind, group = one.opcode, groups.shape[1]
    operands = [computation.instructions[name] for name in one.operands]
    whole = sum(x.nbytes for operand in operands for x in operand.arrays)
    if kind == "all-gather":
        whole = sum(x.nbytes for x in results_of(one))
    elif kind == "all-reduce" and feeds_a_slice(computation, one):
        kind = "reduce-scatter"  # as the compiler for TPUs writes it, in one fusion
    spanned = max(len(np.unique(members * hosts // devices)) for members in groups)
    share, outside = (group - 1) / group, (spanned - 1) / group
    if kind == "all-reduce":
        share, outside = 2 * share, 2 * outside
    elif kind == "all-to-all":
        outside = (spanned - 1) / spanned
    elif kind.startswith("collective-"):
        share, outside = 1, float(spanned > 1)
    sent, moved = ({(kind, group): n} for n in (share * whole, whole))
    return Cost(sent=Counter(sent), moved=Counter(moved), across=outside * whole)


def groups_of(one: Instruction, devices: int) -> np.ndarray:
    """The devices that take part together, a row a group; a permutation's pairs.

    Of an arrangement by a mesh's axes, which only the compiler for TPUs writes, the size is right.
    """
    found = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.attributes
    )
    if found:
        dims, order = (
            [int(n) for n in (part or "").split(",") if n] for part in found.groups()[2:]
        )
        laid = np.arange(math.prod(dims)).reshape(dims).transpose(order or None)
        return laid.reshape(int(found[1]), int(found[2]))
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", one.attributes)
    if found:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return np.arange(math.prod(int(part or sizes[axis]) for axis, part in axes))[None]
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", one.attributes)
    groups = re.findall(r"\{([\d,]+)\}", found[1]) if found else []
    return np.array([[int(n) for n in g.split(",")] for g in groups] or [list(range(devices))])


def feeds_a_slice(computation: Computation, one: Instruction) -> bool:
    """Whether all that is left of a sum over devices is this device's part."""
    users = [x for x in computation.instructions.values() if one.name in x.operands]
    return bool(users) and all(x.opcode == "dynamic-slice" for x in users)


def unknown(one: Instruction) -> Counter:
    """The name of a custom call whose work is not known."""
    target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
    named = target[1] if target else "?"
    return Counter({named: 1} if named not in LABELS else {})
