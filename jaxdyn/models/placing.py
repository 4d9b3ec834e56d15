"""Parameters on their way from a file to their devices: a tensor at a time, never a whole model."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.models.hf_layout import StoredTensor

STREAMED = 2**27
"""Bytes from which a leaf of all layers is written on its devices, layer by layer."""

Where = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""The sharding of the parameter at a path, "backbone/norm/scale", of a shape."""
OfShape = Callable[[tuple[int, ...]], jax.sharding.Sharding]
"""That of one parameter."""


def put(array: np.ndarray, where: OfShape | None) -> jax.Array:
    """A leaf in float32 where it is to lie, of which other processes may hold a share."""
    array = array.astype(np.float32, copy=False)
    if where is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, where(array.shape), lambda i: array[i])


def put_layers(
    layers: Iterator[list[np.ndarray]], stored: StoredTensor, places: Sequence[OfShape | None]
) -> list[jax.Array]:
    """The leaves of all layers: large ones filled in on their devices, others before they go."""
    shapes = [(len(stored.names), *shape) for shape in stored.leaf_shapes]
    if 4 * sum(map(math.prod, shapes)) < STREAMED:
        stacks = [np.empty(shape, np.float32) for shape in shapes]
        for number, leaves in enumerate(layers):
            for stack, leaf in zip(stacks, leaves, strict=True):
                stack[number] = leaf
        return list(map(put, stacks, places))
    shardings = [where and where(shape) for where, shape in zip(places, shapes, strict=True)]
    arrays = [
        jnp.zeros(shape, np.float32, device=sharding)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    for number, leaves in enumerate(layers):
        for i, leaf in enumerate(leaves):
            leaf = np.ascontiguousarray(leaf, np.float32)
            # One layer after another is under way: each holds its tensor until it is there.
            arrays[i] = _set_layer(shardings[i])(arrays[i], number, leaf).block_until_ready()
    return arrays


@functools.lru_cache
def _set_layer(sharding: jax.sharding.Sharding | None) -> Callable:
    """Writes a layer into a leaf of all layers, in its place."""
    write = jax.lax.dynamic_update_index_in_dim
    return jax.jit(
        lambda stack, number, leaf: write(stack, leaf, number, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
