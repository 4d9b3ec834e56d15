"""Chips by name: their public figures, the slices they come in, and devices to compile for.

A Cloud TPU slice is compiled for on any machine by `libtpu`, of which no TPU is asked. A GPU's
compiler needs the GPU: such a machine is planned for on itself, as "here".
"""

import dataclasses
import itertools
import math
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxdyn import NO_TPU
from jaxdyn.types import JaxdynError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a data sheet says of one chip.

    Attributes:
      name: as in a topology, "v5e".
      hbm: bytes of memory.
      flops: bfloat16 matrix products at their peak, a second.
      bandwidth: bytes a second to and from the memory.
      interconnect: bytes a second that a chip sends over all its links together; a collective over
        one axis of a torus has fewer of them.
      kinds: JAX's names of the device.
      largest: the largest slice of a TPU, in chips along each axis.
      cores: what a slice's short name counts a chip as, "v5p-8" being four.
    """

    name: str
    hbm: int
    flops: float
    bandwidth: float
    interconnect: float
    kinds: tuple[str, ...]
    largest: tuple[int, ...] = ()
    cores: int = 1


# Google's pages on TPU v4, v5e, v5p and v6e (docs.cloud.google.com/tpu/docs/v5p and so on) and
# NVIDIA's data sheets of the H100 and H200 SXM, whose dense rates are half of those "with
# sparsity". Links are one way: half of a sheet's bidirectional figure. Sheets say GB of memory and
# mean GiB.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1200e9, 300e9, ("TPU v4",), (16, 16, 16), 2),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, ("TPU v5 lite", "TPU v5e"), (16, 16)),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, ("TPU v5", "TPU v5p"), (16, 16, 24), 2),
        Chip("v6e", 32 * GIB, 918e12, 1600e9, 400e9, ("TPU v6 lite", "TPU v6e"), (16, 16)),
        Chip("h100", 80 * GIB, 989e12, 3350e9, 450e9, ("NVIDIA H100",)),
        Chip("h200", 141 * GIB, 989e12, 4800e9, 450e9, ("NVIDIA H200",)),
    )
}

FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Slices below a cube of 4 x 4 x 4, of which the larger ones are made."""

# Where libtpu is, it asks no server, and as no TPU can be taken from another process, no lock.
OFFLINE = {**NO_TPU, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class Topology(NamedTuple):
    """Devices to compile for; `chip` is None where no public figures are known."""

    name: str
    chip: Chip | None
    devices: list[jax.Device]


def slices(chip: Chip) -> list[tuple[int, ...]]:
    """The shapes in which a TPU is sold, smallest first."""
    if len(chip.largest) == 2:
        return list(FLAT)
    sides = [range(4, side + 1, 4) for side in chip.largest]
    cubes = [shape for shape in itertools.product(*sides) if tuple(sorted(shape)) == shape]
    return [*SMALL, *sorted(cubes, key=math.prod)]


def shape_of(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the slice's shape of "v5p:4x4x4", or of "v5p-128", the most cubic of its size.

    Raises:
      JaxdynError: if there is no such chip or slice, naming those there are.
    """
    mark = ":" if ":" in name else "-"
    kind, _, arrangement = name.lower().partition(mark)
    if kind not in CHIPS:
        raise JaxdynError(
            f"no chip {kind!r} in topology {name!r}; there are {', '.join(CHIPS)}, as in v5p:4x4x4 "
            "or v5e-64, and `here` for this machine's devices"
        )
    chip = CHIPS[kind]
    if not chip.largest:
        raise JaxdynError(
            f"a program for {chip.name} cannot be compiled without one: run `jaxdyn plan ... "
            "--topology here` on the machine that has it"
        )
    known = slices(chip)
    if mark == ":":
        found = [shape for shape in known if "x".join(map(str, shape)) == arrangement]
        names = ["x".join(map(str, shape)) for shape in known]
    else:
        sizes = {shape: str(math.prod(shape) * chip.cores) for shape in known}
        found = sorted((shape for shape in known if sizes[shape] == arrangement), key=sum)
        names = list(dict.fromkeys(sizes.values()))
    if not found:
        listed = ", ".join(names if len(names) <= 10 else [*names[:9], "...", names[-1]])
        raise JaxdynError(f"no slice {name!r}; of {chip.name} there are {kind}{mark}{listed}")
    return chip, found[0]


def open_topology(name: str) -> Topology:
    """The devices of a TPU slice that need not be there, or with "here" this machine's.

    Raises:
      JaxdynError: as `shape_of`, and if libtpu is not installed.
    """
    if name == "here":
        devices = jax.devices()
        kind = devices[0].device_kind
        return Topology(f"here ({kind})", chip_of(kind), devices)
    chip, shape = shape_of(name)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise JaxdynError(
            f"compiling for {chip.name} needs libtpu: pip install 'jaxdyn[plan]'"
        ) from None
    for variable, value in OFFLINE.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.cores == 2:
        options["chip_config_name"] = "megacore"  # a chip is one device
    whole = f"{chip.name}:{'x'.join(map(str, shape))}"
    slice_ = topologies.get_topology_desc(whole, platform="tpu", **options)
    return Topology(whole, chip, slice_.devices)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so, if it is one of `CHIPS`."""
    kinds = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    fitting = [kind for kind in kinds if device_kind.startswith(kind)]
    return kinds[max(fitting, key=len)] if fitting else None  # "TPU v5 lite" is no "TPU v5"
