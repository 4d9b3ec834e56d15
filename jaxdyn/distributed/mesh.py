"""The mesh: a run's devices, arranged by what they divide among them.

    data      the batch; parameters are copied
    fsdp      the batch, and the parameters: each layer's are gathered where it is computed
    tensor    heads, feed-forward units and vocabulary: every sequence is computed by all of them

Devices that differ in `tensor` alone exchange the most, so they are neighbours.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdyn.models.config import ModelConfig
from jaxdyn.types import JaxdynError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""The axes that divide a batch."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices divide what; one of the three may be -1: all that the others leave.

    Attributes:
      data: copies of the parameters, each with its share of the batch.
      fsdp: parts of the batch that also share the parameters out between them.
      tensor: devices among which a sequence's heads and the vocabulary are divided.
      devices: how many to use; 0 for all of an accelerator's, and on a CPU one a process.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    devices: int = 0

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in AXES}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise JaxdynError(f"mesh.{name} must be at least 1, or -1, got {size}")
        if list(sizes.values()).count(-1) > 1:
            raise JaxdynError(f"only one of mesh.{', mesh.'.join(AXES)} may be -1, got {sizes}")
        if self.devices < 0:
            raise JaxdynError(f"mesh.devices must not be negative, got {self.devices}")

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """The mesh's shape on so many devices; JaxdynError if they cannot be divided so."""
        asked = [getattr(self, name) for name in AXES]
        fixed = int(np.prod([size for size in asked if size > 0]))
        filled = [devices // fixed if size == -1 else size for size in asked]
        if int(np.prod(filled)) != devices:
            shape = " x ".join(f"{name} {size}" for name, size in zip(AXES, asked, strict=True))
            raise JaxdynError(
                f"a mesh of {shape} does not divide {devices} devices; set mesh.data, mesh.fsdp "
                "and mesh.tensor to sizes whose product is that, or mesh.devices to their product"
            )
        return filled[0], filled[1], filled[2]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the devices, by default those `config` asks for of all there are.

    Raises:
      JaxdynError: if the axes do not divide the devices, or there are fewer than wanted.
    """
    if devices is None:
        devices = chosen_devices(config)
    return Mesh(np.asarray(devices).reshape(config.sizes(len(devices))), AXES)


def chosen_devices(config: MeshConfig) -> list[jax.Device]:
    """The devices a run uses: as many as it asks for, an equal share of every process's."""
    devices, processes = jax.devices(), jax.process_count()
    if devices[0].platform == "cpu" and not config.devices:
        wanted = processes  # a CPU's several devices are an illusion, good for tests
    else:
        wanted = config.devices or len(devices)
    if wanted > len(devices) or wanted % processes:
        raise JaxdynError(
            f"mesh.devices is {wanted}: there are {len(devices)} devices on {processes} processes, "
            "each of which must take part alike"
        )
    of_process = lambda p: [device for device in devices if device.process_index == p]
    return [d for p in range(processes) for d in of_process(p)[: wanted // processes]]


def require_divisible(mesh: Mesh, model: ModelConfig, rows: int, what: str) -> None:
    """That a mesh suits a model and a batch of `rows` sequences.

    Raises:
      JaxdynError: naming the axis, and what of the model or the batch it does not divide.
    """
    for axis, name in (
        ("tensor", "num_heads"),
        ("tensor", "num_kv_heads"),
        ("tensor", "mlp_width"),
        ("fsdp", "width"),
    ):
        size, whole = mesh.shape[axis], getattr(model, name)
        if whole % size:
            raise JaxdynError(f"mesh.{axis} is {size}, which does not divide {name} {whole}")
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shares:
        raise JaxdynError(
            f"mesh.data x mesh.fsdp is {shares}, which does not divide the {rows} of {what}"
        )
