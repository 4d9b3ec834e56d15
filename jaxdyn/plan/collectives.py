"""What a device sends to the others, from the collectives of a compiled program."""

import math
import re
from collections import Counter

from jaxdyn.plan.cost import Cost
from jaxdyn.plan.text import Computation, Instruction, results_of


def collective(computation: Computation, one: Instruction, devices: int) -> Cost:
    """What a device sends in a collective of a program of so many devices."""
    kind, group = one.opcode, group_of(one, devices)
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
    return Cost(sent=Counter({(kind, group): share * whole}), moved=Counter({(kind, group): whole}))


def group_of(one: Instruction, devices: int) -> int:
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
    return len(found[1].split(",")) if found and found[1] else devices


def feeds_a_slice(computation: Computation, one: Instruction) -> bool:
    """Whether all that is left of a sum over devices is this device's part."""
    users = [x for x in computation.instructions.values() if one.name in x.operands]
    return bool(users) and all(x.opcode == "dynamic-slice" for x in users)
