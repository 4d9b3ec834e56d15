"""Bytes that an instruction of a compiled program reads and writes in the main memory."""

import re

from jaxdyn.plan.text import Computation, Instruction, Number, called_by, parameters_of, results_of

# What moves no data, or leaves that to the computation it calls.
FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast"),
    *("while", "conditional", "call", "async"),
    *("after-all", "add-dependency", "opt-barrier", "partition-id", "replica-id"),
}
SLICES = {"dynamic-slice", "slice", "gather"}
# Within a fusion another view of the same array: it is computed where it is asked for.
VIEWS = {"bitcast", "copy"}
# Calls of libraries whose last result is their workspace, of which little is touched.
LIBRARIES = re.compile(r"__cu(blas|dnn)\$")


Computations = dict[str, Computation]


def traffic(computations: Computations, computation: Computation, one: Instruction) -> Number:
    """Bytes of main memory that an instruction reads and writes."""
    if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
        return 0
    operands = [computation.instructions[name] for name in one.operands]
    sizes = [sum(x.nbytes for x in operand.arrays if x.main) for operand in operands]
    results = results_of(one)
    if one.opcode == "custom-call" and LIBRARIES.search(one.attributes):
        results = results[:-1] or results
    written = sum(x.nbytes for x in results if x.main)
    if one.opcode == "fusion":
        inner = computations[called_by(one, "calls")[0]]
        parts = [
            min(size, used(computations, inner, parameter)) if size else 0
            for size, parameter in zip(sizes, parameters_of(inner), strict=True)
        ]
        new = made(computations, inner, inner.root)
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


def used(computations: Computations, computation: Computation, name: str) -> Number:
    """Bytes that a fusion reads of what it calls `name`: of slices only their own."""
    whole = sum(x.nbytes for x in computation.instructions[name].arrays)
    if name == computation.root:
        return whole
    total: Number = 0
    for user in computation.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in SLICES and name == user.operands[0]:
            total += sum(x.nbytes for x in user.arrays)
        elif user.opcode in VIEWS:
            total += used(computations, computation, user.name)
        elif user.opcode == "fusion":
            inner = computations[called_by(user, "calls")[0]]
            at = parameters_of(inner)[user.operands.index(name)]
            if seen_through(inner) == at:
                total += used(computations, computation, user.name)
            else:
                total += used(computations, inner, at)
        elif not (user.opcode == "dynamic-update-slice" and name == user.operands[0]):
            return whole
    return min(total, whole)


def seen_through(computation: Computation) -> str:
    """What the result is a view of."""
    one = computation.instructions[computation.root]
    while one.opcode in VIEWS:
        one = computation.instructions[one.operands[0]]
    return one.name


def made(computations: Computations, computation: Computation, name: str) -> list[Number]:
    """Bytes that a fusion writes of each of its results: of updates in place only theirs."""
    one = computation.instructions[name]
    if one.opcode == "tuple":
        return [x for operand in one.operands for x in made(computations, computation, operand)]
    if one.opcode == "bitcast":
        return made(computations, computation, one.operands[0])
    if one.opcode == "dynamic-update-slice":
        return [computation.instructions[one.operands[1]].arrays[0].nbytes]
    if one.opcode == "fusion":
        inner = computations[called_by(one, "calls")[0]]
        return made(computations, inner, inner.root)
    return [x.nbytes for x in one.arrays]
