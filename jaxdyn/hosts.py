"""Values that several processes hold together: whole copies, and shares.

With one process all of this is what it looks like. With many, a global array has parts that other
processes hold, and NumPy cannot read it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def is_local(x: Any) -> bool:
    """Whether this process has the whole array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def fetch(tree: Any) -> Any:
    """NumPy copies of the whole arrays, on every process."""
    return jax.tree.map(_host_copy, tree)


def whole(tree: Any) -> Any:
    """The arrays undivided, on a device of this process."""
    undivided = lambda x: is_local(x) and len(x.devices()) == 1
    return jax.tree.map(lambda x: x if undivided(x) else jnp.asarray(_host_copy(x)), tree)


def _host_copy(x: Any) -> np.ndarray:
    if is_local(x) or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def share_of(count: int) -> slice:
    """This process's share of `count` things that every process knows."""
    each = -(-count // jax.process_count())
    start = min(each * jax.process_index(), count)
    return slice(start, min(start + each, count))


def gather(mine: np.ndarray, count: int) -> np.ndarray:
    """All processes' shares of an array, one after another, on every process."""
    each = -(-count // jax.process_count())
    padded = np.zeros((each, *mine.shape[1:]), mine.dtype)
    padded[: len(mine)] = mine
    # Bytes: JAX would round float64 to float32.
    gathered = multihost_utils.process_allgather(padded.view(np.uint8), tiled=True)
    return np.ascontiguousarray(gathered).view(mine.dtype)[:count]
