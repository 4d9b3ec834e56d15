"""Values that several processes hold together: whole copies, and shares.

With one process all of this is what it looks like. With many, a global array has parts that other
processes hold, and NumPy cannot read it.
"""

import contextlib
from collections.abc import Iterator
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


def from_first(tree: Any) -> Any:
    """The first process's arrays, on every process; the others give some of the same shapes."""
    if jax.process_count() == 1:
        return tree

    def of_leaf(x):
        sent = multihost_utils.broadcast_one_to_all(np.ascontiguousarray(x).ravel().view(np.uint8))
        return np.asarray(sent).view(x.dtype).reshape(x.shape)

    return jax.tree.map(of_leaf, tree)


@contextlib.contextmanager
def host_memory() -> Iterator[None]:
    """What is made inside stays in the host's memory: a model may not fit one accelerator."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the host's own out
        yield
        return
    with jax.default_device(device):
        yield
