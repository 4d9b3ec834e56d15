"""Small tiles for a TPU's compiler, most of whose time is machine code that nobody runs.

Of the reference's log-probs at 2.8B on a v6e-16, four fifths of the compiler's time go into the
scheduling and register allocation of instructions, after all that a plan counts is settled: it
unrolls a tile of each product, and tiles are as large as a core's memory (VMEM) allows. Told to
keep a tile's operands and result within `TILE`, it writes the same program of the same collectives
in a fraction of the time. What is set free so would hold more of the arrays that lie there for
longer, so as much is taken from the whole. The choice of these still comes out otherwise, and
with it the bytes read and written and a little of the memory (docs/devices.md has how much).
"""

from typing import NamedTuple

TILE = 5 * 1024
"""KiB. Of sums along an axis the compiler keeps 4 MiB for itself, and with no more it ends the
process."""


class Memory(NamedTuple):
    """KiB of a core's own memory, and what the compiler gives to a tile of it."""

    whole: int
    tile: int


MEMORIES = {
    "v5e": Memory(128 * 1024, 16 * 1024),
    "v5p": Memory(64 * 1024, 16 * 1024),
    "v6e": Memory(128 * 1024, 32 * 1024),
    "v7x": Memory(64 * 1024, 32 * 1024),
}


def small_tiles(chip: str) -> tuple[dict[str, str | bool] | None, list[str]]:
    """The compiler's options, and the flags of libtpu that go with them."""
    if chip not in MEMORIES:
        return None, []
    whole, tile = MEMORIES[chip]
    kept = f"--xla_tpu_override_vmem_size_kib={whole - tile + TILE}"
    return {"xla_tpu_scoped_vmem_limit_kib": str(TILE)}, [kept]
