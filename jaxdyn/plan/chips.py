"""Chips by name: their public figures, and the slices or hosts they come in."""

import dataclasses
import itertools
import math
import re

from jaxdyn.types import JaxdynError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a data sheet says of one chip, or of what of it is a device of JAX's.

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
      devices: of JAX's on a chip.
      network: bytes a second that a GPU sends to other hosts than its own.
    """

    name: str
    hbm: int
    flops: float
    bandwidth: float
    interconnect: float
    kinds: tuple[str, ...]
    largest: tuple[int, ...] = ()
    cores: int = 1
    devices: int = 1
    network: float = 0.0

    @property
    def is_gpu(self) -> bool:
        return not self.largest


# Google's pages on TPU v4, v5e, v5p, v6e and TPU7x (docs.cloud.google.com/tpu/docs/v5p and so on),
# whose chip is two devices that have half of it each, and NVIDIA's data sheets of the A100, H100
# and H200 SXM and the HGX B200, whose dense rates are half of those "with sparsity". Links are one
# way: half of a sheet's bidirectional figure. Sheets say GB of memory and mean GiB. Between hosts:
# a DGX's network ports for computing, one a GPU, of 200 Gbit/s (A100) or 400.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1200e9, 300e9, ("TPU v4",), (16, 16, 16), 2),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, ("TPU v5 lite", "TPU v5e"), (16, 16)),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, ("TPU v5", "TPU v5p"), (16, 16, 24), 2),
        Chip("v6e", 32 * GIB, 918e12, 1600e9, 400e9, ("TPU v6 lite", "TPU v6e"), (16, 16)),
        Chip("v7x", 96 * GIB, 1153.5e12, 3690e9, 300e9, ("TPU7x",), (16, 24, 24), 2, 2),
        Chip("a100", 80 * GIB, 312e12, 2039e9, 300e9, ("NVIDIA A100",), network=25e9),
        Chip("h100", 80 * GIB, 989e12, 3350e9, 450e9, ("NVIDIA H100",), network=50e9),
        Chip("h200", 141 * GIB, 989e12, 4800e9, 450e9, ("NVIDIA H200",), network=50e9),
        Chip("b200", 180 * GIB, 2250e12, 8000e9, 900e9, ("NVIDIA B200",), network=50e9),
    )
}

FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Slices below a cube of 4 x 4 x 4, of which the larger ones are made."""
HOSTS = (1, 2, 4, 8)
"""GPUs of a host, all of them joined by NVLink."""


def slices(chip: Chip) -> list[tuple[int, ...]]:
    """The shapes in which a TPU is sold, smallest first."""
    if len(chip.largest) == 2:
        return list(FLAT)
    sides = [range(4, side + 1, 4) for side in chip.largest]
    cubes = [shape for shape in itertools.product(*sides) if tuple(sorted(shape)) == shape]
    return [*SMALL, *sorted(cubes, key=math.prod)]


def shape_of(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the arrangement of a topology.

    "v5p:4x4x4" is a slice by its shape, "v5p-128" the most cubic of its size; "h100:8" is a host of
    eight GPUs, (1, 8), and "h100:2x8" two such hosts.

    Raises:
      JaxdynError: if there is no such chip, slice or host, naming those there are.
    """
    mark = ":" if ":" in name else "-"
    kind, _, arrangement = name.lower().partition(mark)
    if kind not in CHIPS:
        raise JaxdynError(
            f"no chip {kind!r} in topology {name!r}; there are {', '.join(CHIPS)}, as in "
            "v5p:4x4x4, v5e-64 or h100:8, and `here` for this machine's devices"
        )
    chip = CHIPS[kind]
    if chip.is_gpu:
        form = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\d)", arrangement)
        hosts, each = form.groups() if form and mark == ":" else (1, 0)
        if int(each) not in HOSTS:
            listed = ", ".join(map(str, HOSTS))
            raise JaxdynError(
                f"no topology {name!r}; of {kind} there are {kind}:{listed} on a host, and hosts "
                f"of them, as in {kind}:2x8"
            )
        return chip, (int(hosts or 1), int(each))
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


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so, if it is one of `CHIPS`."""
    kinds = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    fitting = [kind for kind in kinds if device_kind.startswith(kind)]
    return kinds[max(fitting, key=len)] if fitting else None  # "TPU v5 lite" is no "TPU v5"
