"""The data-parallel update compiled by `jax.pmap`: every device has all parameters and some rows.

`jax.jit` over a mesh does the same with fsdp = tensor = 1, and more; it is the default. One would
still want this one where the sums between devices should be those written here and no others (three
in a program: the gradients with the metrics, the metrics that are maxima, and the batch's counts),
to rule the partitioner out when two results differ, or on a device whose compiler cannot partition.
"""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from jaxdyn.distributed import Layout
from jaxdyn.models import LanguageModel
from jaxdyn.train.policy import UpdateBatch
from jaxdyn.train.state import TrainState
from jaxdyn.train.update import take_update
from jaxdyn.types import JaxdynError, Params


def require_copies(mesh: Mesh) -> None:
    """That the mesh divides the batch alone, in one process; JaxdynError if not."""
    if mesh.shape["fsdp"] > 1 or mesh.shape["tensor"] > 1:
        raise JaxdynError(
            "train.update 'pmap' copies the parameters to every device: mesh.fsdp and mesh.tensor "
            f"must be 1, got {mesh.shape['fsdp']} and {mesh.shape['tensor']}; use mesh.data"
        )
    if jax.process_count() > 1:
        raise JaxdynError(
            f"train.update 'pmap' runs in one process, got {jax.process_count()}; use 'jit'"
        )


@functools.cache
def _program(devices: tuple[jax.Device, ...], batch: Any, static: tuple[tuple[str, Any], ...]):
    def of_device(state, frozen, rows, learning_rate, temperature):
        mine, features = jax.tree.unflatten(batch, rows)
        numbers = {"learning_rate": learning_rate, "temperature": temperature}
        return take_update(state, frozen, mine, features, **numbers, **dict(static))

    return jax.pmap(
        of_device,
        axis_name="data",
        in_axes=(None, None, 0, None, None),
        out_axes=None,
        devices=devices,
    )


def pmap_update(
    layout: Layout,
    state: TrainState,
    frozen: Params,
    batch: UpdateBatch,
    features: jax.Array | None,
    learning_rate: Any,
    temperature: Any,
    *,
    model: LanguageModel,
    **static: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`update` on the layout's devices, along "data"; see there for the arguments."""
    devices = tuple(layout.mesh.devices.flat)
    leaves, structure = jax.tree.flatten((batch, features))
    rows = [x.reshape(len(devices), -1, *x.shape[1:]) for x in leaves]
    alone = LanguageModel(model.config, model.dtype, model.remat, attention=model.attention)
    static |= {"model": alone, "axis": "data"}
    program = _program(devices, structure, tuple(sorted(static.items())))
    state, metrics = program(state, frozen, rows, learning_rate, temperature)
    return layout.place(state), metrics
