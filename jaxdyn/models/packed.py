"""Completions without their padding: rows of what they hold, one after another.

Everything but attention is done slot by slot, and so on packed rows; attention spreads their keys
and queries over the slots of `Branches`, and takes up what is there of its result. Both ways are
copies, of which each is the other's transpose: no gradient is scattered.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxdyn.types import Branches


@jax.custom_vjp
def moved(x: Array, places: Int[Array, "R M"], back: Int[Array, "R N"]) -> Array:
    """x[r, places[r, m]] of x [R, N, ...], and 0 where the place is -1.

    Args:
      places: of every slot the one that it is taken from, none of them twice.
      back: the same the other way; -1 for what is taken nowhere.
    """
    taken = jax.vmap(lambda row, at: row[at])(x, jnp.maximum(places, 0))
    there = jnp.expand_dims(places >= 0, tuple(range(2, x.ndim)))
    return jnp.where(there, taken, jnp.zeros((), x.dtype))


def _forward(x, places, back):
    return moved(x, places, back), (places, back)


def _backward(held, cotangent):
    places, back = held
    return moved(cotangent, back, places), None, None


moved.defvjp(_forward, _backward)


def spread(mask: Branches) -> Int[Array, "R N"]:
    """Of each of the N = P/R G C slots of a row's completions its packed one, and -1 of padding."""
    assert mask.packed is not None
    inside = mask.completions.reshape(len(mask.packed), -1)
    return jnp.where(inside, jnp.cumsum(inside, axis=1) - 1, -1)
