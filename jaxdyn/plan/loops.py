"""How often a compiled program's loops run: constants, followed through its text.

The compiler for CPUs writes a loop's trip count beside it. Others do not; then the loop's condition
compares a counter with a limit, and its body says how far a turn brings the one to the other.
"""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

from jaxdyn.plan.text import Computation, Instruction, called_by

ARITHMETIC: dict[str, Callable] = {
    "copy": lambda x: x,
    "bitcast": lambda x: x,
    "convert": lambda x: x,
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
}
DISTANCES: dict[str, Callable] = {
    "LT": lambda a, b: b - a,
    "LE": lambda a, b: b - a + 1,
    "GT": lambda a, b: a - b,
    "GE": lambda a, b: a - b + 1,
}

Value = Any
"""What is known of an instruction's result: an integer, a tuple's elements in a list, or None."""


class Scope:
    """A computation, and what is known of its parameters."""

    def __init__(self, computations: dict[str, Computation], name: str, arguments: list[Value]):
        self.computations, self.computation = computations, computations[name]
        self.arguments, self.known = arguments, dict[str, Value]()

    def enter(self, one: Instruction, attribute: str, arguments: list[Value]) -> "Scope":
        """A computation that an instruction calls."""
        return Scope(self.computations, called_by(one, attribute)[0], arguments)

    def operands(self, one: Instruction) -> list[Value]:
        return [self.value(name) for name in one.operands]

    @property
    def result(self) -> Value:
        return self.value(self.computation.root)

    def value(self, name: str) -> Value:
        """What is known of the result of the instruction `name`."""
        if name not in self.known:
            self.known[name] = self._value(self.computation.instructions[name])
        return self.known[name]

    def _value(self, one: Instruction) -> Value:
        if one.opcode == "parameter":
            return self.arguments[int(one.attributes)] if self.arguments else None
        if one.opcode == "constant":
            return int(one.attributes) if re.fullmatch(r"-?\d+", one.attributes) else None
        if one.opcode == "tuple":
            return self.operands(one)
        if one.opcode == "get-tuple-element":
            whole = self.value(one.operands[0])
            index = int(re.search(r"index=(\d+)", one.attributes)[1])  # type: ignore[index]
            return whole[index] if isinstance(whole, list) else None
        if one.opcode == "fusion":
            return self.enter(one, "calls", self.operands(one)).result
        if one.opcode in ARITHMETIC:
            known = self.operands(one)
            integers = all(isinstance(x, int) for x in known)
            return ARITHMETIC[one.opcode](*known) if integers else None
        return None

    def distance(self) -> int | None:
        """How far a condition a < b is from failing: b - a."""
        one = self.computation.instructions[self.computation.root]
        if one.opcode == "fusion":
            return self.enter(one, "calls", self.operands(one)).distance()
        known = self.operands(one)
        if one.opcode != "compare" or not all(isinstance(x, int) for x in known):
            return None
        direction = re.search(r"direction=(\w+)", one.attributes)[1]  # type: ignore[index]
        return DISTANCES[direction](*known) if direction in DISTANCES else None


def loop(scope: Scope, one: Instruction) -> tuple[int | None, Value]:
    """How often a loop runs, if that is known, and what it leaves as it was at its start."""
    (start,) = scope.operands(one)
    after = scope.enter(one, "body", [start]).result
    kept = None
    if isinstance(start, list) and isinstance(after, list):
        kept = [a if a == b else None for a, b in zip(start, after, strict=True)]
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
    if found:
        return int(found[1]), kept
    begins, then = (scope.enter(one, "condition", [x]).distance() for x in (start, after))
    if begins is None or then is None or begins <= then:
        return None, kept
    return max(0, math.ceil(begins / (begins - then))), kept
