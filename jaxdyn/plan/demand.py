"""What a program would need and take on a chip, from its compilation alone.

A roofline: a program takes at least as long as each of its demands at the chip's full rate,

    max( flops / peak,  bytes / memory bandwidth,  bytes sent / interconnect,
         bytes sent to other hosts / network )

and no program reaches it. Nothing is run, and no array is made.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from jaxdyn.plan.chips import Chip
from jaxdyn.plan.hlo import Cost, cost_of
from jaxdyn.plan.text import Number

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
      name: what it is called in a table.
      lower: traces it, for the devices where its arguments lie.
      roles: its arguments by what they are for: trees of arrays' shapes with their shardings.
      held: what else lies on the devices while it runs, by the same names.
      trips: how often its loops run that end by what they compute.
      steps: how many equal steps it takes; the cost is one's.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    roles: dict[str, Any]
    held: dict[str, Any] = dataclasses.field(default_factory=dict)
    trips: int = 1
    steps: int = 1


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a program asks of each device; without `cost` it was refused for its memory.

    Attributes:
      roles: bytes of its arguments, and of what is held beside them, by role.
      temporary: bytes beside the arguments and results.
      own: bytes of arguments, results that do not take an argument's place, temporaries.
      peak: those, and what is held beside them.
      cost: flops, bytes and collectives.
    """

    name: str
    roles: dict[str, Number]
    temporary: Number
    own: Number
    peak: Number
    cost: Cost | None = None

    def fits(self, chip: Chip | None) -> bool:
        """Whether the memory suffices, as far as that is known."""
        return self.cost is not None and (chip is None or self.peak <= chip.hbm)

    def seconds(self, chip: Chip) -> dict[str, Number]:
        """The time at the chip's full rates, by what is asked of it."""
        cost = self.cost or Cost()
        times = {
            "compute": cost.flops / chip.flops,
            "memory": cost.bytes / chip.bandwidth,
            "links": cost.collective_bytes / chip.interconnect,
        }
        return {**times, "network": cost.across / chip.network} if cost.across else times

    def least(self, chip: Chip | None) -> Number:
        """The roofline's time; without a chip's figures, the flops."""
        if self.cost is None:
            return math.inf
        return self.cost.flops if chip is None else max(self.seconds(chip).values())


def demand_of(
    program: Program, hosts: int = 1, options: dict[str, str | bool] | None = None
) -> Demand:
    """Compile a program for the devices of so many hosts, and account for it.

    Conditionals count their cheaper branch: ours are of filters that are mostly off.

    Args:
      options: the compiler's (`jaxdyn.plan.tiles`).
    """
    by_role = lambda trees: Counter({name: bytes_of(tree) for name, tree in trees.items()})
    arguments, held = by_role(program.roles), by_role(program.held)
    beside = sum(held.values())
    demand = functools.partial(Demand, program.name, dict(arguments + held))
    try:
        compiled = program.lower().compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        own = exhausted(str(error), sum(arguments.values()))
        return demand(own - sum(arguments.values()), own, own + beside)
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    own = memory.argument_size_in_bytes + results + temporary
    cost = cost_of(str(compiled.as_text()), program.trips, min, hosts).times(1 / program.steps)
    return demand(temporary, own, own + beside, cost)


def exhausted(message: str, arguments: Number) -> Number:
    """The bytes that a compiler says a program needs, of which it had too few."""
    whole = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    temporary = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message)
    if whole:
        return float(whole[1]) * UNITS[whole[2]]
    if temporary:
        return arguments + float(temporary[1]) * UNITS[temporary[2]]
    return math.inf


def bytes_of(tree: Any) -> Number:
    """Bytes on one device of a tree of shapes with shardings."""
    return sum(share_of(x) for x in jax.tree.leaves(tree))


def share_of(x: jax.ShapeDtypeStruct) -> Number:
    """Bytes of an array that one device holds."""
    count = math.prod(x.sharding.shard_shape(x.shape))
    return count * (8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else x.dtype.itemsize)
