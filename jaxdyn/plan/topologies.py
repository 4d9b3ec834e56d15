"""Devices to compile for, of which none need be there.

A Cloud TPU slice is compiled for by `libtpu`, and GPUs by JAX's CUDA plugin (`jaxdyn.plan.cuda`),
on any machine; "here" is the machine's own devices.
"""

import math
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxdyn import NO_TPU
from jaxdyn.plan.chips import Chip, chip_of, shape_of
from jaxdyn.plan.cuda import cuda_devices
from jaxdyn.plan.tiles import small_tiles
from jaxdyn.types import JaxdynError

# Where libtpu is, it asks no server, and as no TPU can be taken from another process, no lock.
OFFLINE = {**NO_TPU, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# What libtpu 0.0.42 compiles for the SparseCores of a v7x recurses deeper than its threads' stacks:
# without more, a plan now and then ends in a stack overflow.
STACKS = f"--fibers_default_thread_stack_size={8 * 2**20}"


class Topology(NamedTuple):
    """Devices to compile for; `chip` is None where no public figures are known."""

    name: str
    chip: Chip | None
    devices: list[jax.Device]
    hosts: int = 1
    """Hosts of GPUs; a TPU's slice counts as one, as its links do not end at a host."""
    options: dict[str, str | bool] | None = None
    """What the compiler is told."""

    @property
    def platform(self) -> str:
        """As JAX calls it: cpu, gpu or tpu."""
        return self.devices[0].platform


def open_topology(name: str) -> Topology:
    """The devices of a TPU slice or of hosts with GPUs, or with "here" this machine's.

    Raises:
      JaxdynError: as `shape_of`, and if what compiles for them is not installed.
    """
    if name == "here":
        devices = jax.devices()
        kind = devices[0].device_kind
        hosts = jax.process_count() if devices[0].platform == "gpu" else 1
        return Topology(f"here ({kind})", chip_of(kind), devices, hosts)
    chip, shape = shape_of(name)
    whole = f"{chip.name}:{'x'.join(map(str, shape[chip.is_gpu and shape[0] == 1 :]))}"
    if chip.is_gpu:
        hosts, each = shape
        devices = cuda_devices(chip.name, hosts, each, chip.hbm, chip.bandwidth)
        return Topology(whole, chip, devices, hosts)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise JaxdynError(
            f"compiling for {chip.name} needs libtpu: pip install 'jaxdyn[plan]'"
        ) from None
    for variable, value in OFFLINE.items():
        os.environ.setdefault(variable, value)
    tiles, flags = small_tiles(chip.name)
    tell_libtpu(STACKS, *flags)
    options: dict[str, Any] = {}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.cores > chip.devices:
        options["chip_config_name"] = "megacore"  # two cores are one device
    of_libtpu = whole.replace("v7x", "tpu7x")
    slice_ = topologies.get_topology_desc(of_libtpu, platform="tpu", **options)
    return Topology(whole, chip, slice_.devices, options=tiles)


def tell_libtpu(*flags: str) -> None:
    """Flags that libtpu reads when it is first asked for devices; one given by hand stays."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    new = [flag for flag in flags if flag.split("=")[0] not in given]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *new]).strip()
