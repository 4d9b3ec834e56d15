"""How a run's devices divide its work: the options of `jaxdyn.distributed`, without JAX."""

import dataclasses
import math

from jaxdyn.errors import JaxdynError

AXES = ("data", "fsdp", "tensor")


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
        fixed = math.prod(size for size in asked if size > 0)
        filled = [devices // fixed if size == -1 else size for size in asked]
        if math.prod(filled) != devices:
            shape = " x ".join(f"{name} {size}" for name, size in zip(AXES, asked, strict=True))
            raise JaxdynError(
                f"a mesh of {shape} does not divide {devices} devices; set mesh.data, mesh.fsdp "
                "and mesh.tensor to sizes whose product is that, or mesh.devices to their product"
            )
        return filled[0], filled[1], filled[2]
