"""The mesh: a run's devices, arranged by what they divide among them.

    data      the batch; parameters are copied
    fsdp      the batch, and the parameters: each layer's are gathered where it is computed
    tensor    heads, feed-forward units and vocabulary: every sequence is computed by all of them

Devices that differ in `tensor` alone exchange the most, so they are neighbours.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdyn.models.config import ModelConfig
from jaxdyn.sections import AXES, MeshConfig
from jaxdyn.types import JaxdynError

ROWS = ("data", "fsdp")
"""The axes that divide a batch."""


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
