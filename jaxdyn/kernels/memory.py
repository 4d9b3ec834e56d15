"""Bytes: what arrays and passes take, and how many rows fit into a budget."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxdyn.kernels.layers import SPARE
from jaxdyn.types import JaxdynError, Model


def nbytes(tree: Any) -> int:
    """The bytes of a tree of arrays or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def attention_bytes(model: Model, slots: int) -> tuple[int, int]:
    """What attention keeps of a row's forward pass, and what one backward pass needs beside it.

    In units of a layer's weights [heads, T, T], which are float32 or better: 2 a layer, and 4.
    XLA's own account of the passes (CPU, T = 512, 2 and 6 layers) is 2.0 a layer, and 3.4.
    """
    config, wide = model.config, jnp.promote_types(model.dtype, jnp.float32)
    weights = config.num_heads * slots**2 * wide.itemsize
    return 2 * config.num_layers * weights, 4 * weights


def opened_bytes(model: Model, slots: int) -> tuple[int, int]:
    """What an opened row of T slots holds, and what one of its backward passes needs."""
    kept, pulled = _opened_slot(model)
    of_forward, of_backward = attention_bytes(model, slots)
    return 3 * slots * kept + of_forward, 3 * slots * pulled + of_backward


@functools.lru_cache
def _opened_slot(model: Model) -> tuple[int, int]:
    """The bytes of every layer's input at a slot, and of every layer's output's cotangent."""

    def shapes(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        phi, inputs, pull = model.opened(model.init(key)["backbone"], tokens, tokens == 0)
        return inputs, pull(phi)

    kept, pulled = jax.eval_shape(shapes, jax.random.key(0))
    return nbytes(kept), nbytes(pulled)


def workspace_of(budget: int) -> tuple[int, int]:
    """Bytes of a block of products, and what to leave for blocks and their copies.

    On a CPU a block should stay near the caches; an accelerator wants large products.
    """
    workspace = min(budget // (8 * SPARE), 2**22 if jax.default_backend() == "cpu" else 2**27)
    return workspace, 4 * SPARE * workspace


def evenly(count: int, most: int) -> int:
    """`count` in as few parts of at most `most` as there can be: the size of all but the last."""
    return -(-count // -(-count // most))


def rows_at_once(
    what: str, count: int, each: int, beside: int, budget: int, shards: int = 1
) -> int:
    """How many of `count` rows fit, each of so many bytes and all `beside` others, evened out.

    Of rows that are divided between `shards` devices, each of which has the budget: a multiple of
    `shards`, which may exceed the count, since other numbers of rows cannot be divided.

    Raises:
      JaxdynError: if not even one fits.
    """
    fitting = (budget - beside) // each
    if fitting < 1:
        raise JaxdynError(
            f"memory_budget is too small for one {what}: it needs about {beside + each} bytes, "
            f"got {budget}"
        )
    return shards * evenly(-(-count // shards), fitting)


def tile_size(
    counts: tuple[int, int], square: bool, held: int, working: int, budget: int, shards: int = 1
) -> int:
    """Rows and columns of a tile: all, or as many as fit when two sets are held at once.

    Args:
      counts: rows N and columns M of the whole.
      square: whether the columns are the rows, so that a single tile holds one set.
      held: bytes that one prepared row holds.
      working: bytes that one row needs while it is prepared, beside those it will hold.
      budget: bytes for the rows, on each device.
      shards: the devices between which a tile's rows are divided.

    Returns:
      A size by which the longer side is divided evenly, a multiple of `shards`.

    Raises:
      JaxdynError: if not even one row and one column fit.
    """
    longest = -(-max(counts) // shards)
    if square and longest * (held + working) <= budget:
        return shards * longest
    fitting = budget // (2 * held + working)
    if fitting < 1:
        raise JaxdynError(
            f"memory_budget is too small for one site: a pair needs about {2 * held + working} "
            f"bytes beside the workspace, got {budget}"
        )
    return shards * evenly(longest, fitting)
