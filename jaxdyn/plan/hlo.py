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

import re
from collections.abc import Callable

from jaxdyn.plan.collectives import collective
from jaxdyn.plan.cost import Cost
from jaxdyn.plan.loops import Scope, loop
from jaxdyn.plan.products import PRODUCTS
from jaxdyn.plan.text import COLLECTIVES, Instruction, called_by, parse
from jaxdyn.plan.traffic import traffic


def cost_of(text: str, trips: int = 1, branch: Callable = max) -> Cost:
    """The cost of a program from `compiled.as_text()`.

    Args:
      text: of the program after compilation.
      trips: how often a loop runs whose trip count the compiler does not know.
      branch: which branch of a conditional counts, `max` or `min` by flops and bytes.
    """
    return Walk(text, trips, branch).cost()


class Walk:
    """The way through a compiled program's computations, each as often as it runs."""

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

        cost = Cost() if fused else Cost(bytes=traffic(self.computations, computation, one))
        if opcode == "fusion":
            cost += self.of(scope.enter(one, "calls", []), met)
        elif opcode in PRODUCTS:
            cost += PRODUCTS[opcode](computation, one)
        elif opcode in COLLECTIVES:
            chain = re.search(r"channel_id=\d+.*chain_id=\"\d+\"", one.attributes)
            if chain is None or chain[0] not in met:
                cost += collective(computation, one, self.devices)
            met |= {chain[0]} if chain else set()
        return cost
