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


def attention_bytes(model: Model, slots: int) -> int:
    """What a row's attention needs in one backward pass; it keeps nothing of the forward pass.

    Four arrays of the weights that one layer has at once: [heads, T, T], float32 or better, and of
    more than 640 slots [heads, 640, T], in blocks of 256 queries of each quarter. XLA's own account
    of all that a pass needs (CPU, 2 layers, T = 512, 1024, 2048, 4096) is 2.9, 2.5, 0.9 and 0.6
    times [heads, T, T], and this 4, 2.5, 1.25 and 0.6.
    """
    wide = jnp.promote_types(model.dtype, jnp.float32)
    return 4 * model.config.num_heads * slots * min(slots, 640) * wide.itemsize


def opened_bytes(model: Model, slots: int) -> tuple[int, int]:
    """What an opened row of T slots holds, and what one of its backward passes needs.

    Both sides of an exact trace are opened at once: by XLA's own account (CPU, 8 layers, T = 64 to
    1024) they take 0.6 to 0.8 of what this says of two rows.
    """
    _, _, inputs, cotangents, _ = shapes_of_a_slot(model)
    kept, pulled = nbytes(inputs), nbytes(cotangents)
    return 2 * slots * kept, 2 * slots * pulled + attention_bytes(model, slots)


@functools.lru_cache
def shapes_of_a_slot(model: Model) -> tuple:
    """The backbone, and of one row of one slot φ, every layer's input, every layer's output's
    cotangent and the logits, as shapes."""

    def shapes(key):
        tokens, view = jnp.zeros((1, 1), jnp.int32), model.view(model.init(key))
        phi, inputs, pull = model.opened(view["backbone"], tokens, tokens == 0)
        logits = model.logits(view["classifier"], phi)
        return view["backbone"], phi, inputs, pull(phi), logits

    return jax.eval_shape(shapes, jax.random.key(0))


def workspace_of(budget: int, platform: str) -> tuple[int, int]:
    """Bytes of a block of products, and what to leave for blocks and their copies.

    On a CPU a block should stay near the caches; an accelerator wants large products.
    """
    workspace = min(budget // (8 * SPARE), 2**22 if platform == "cpu" else 2**27)
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


def tile_size(count: int, held: int, working: int, budget: int, shards: int = 1) -> int:
    """Rows of a tile of a set against itself: all, or as many as fit when two tiles are held.

    Args:
      count: rows of the whole.
      held: bytes that one prepared row holds.
      working: bytes that one row needs while it is prepared, beside those it will hold.
      budget: bytes for the rows, on each device.
      shards: the devices between which a tile's rows are divided.

    Returns:
      A size by which the rows are divided evenly, a multiple of `shards`.

    Raises:
      JaxdynError: if not even one row and one column fit.
    """
    longest = -(-count // shards)
    if longest * (held + working) <= budget:
        return shards * longest
    fitting = budget // (2 * held + working)
    if fitting < 1:
        raise _too_small(2 * held + working, budget)
    return shards * evenly(longest, fitting)


def tile_sizes(
    counts: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
    budget: int,
    shards: int = 1,
) -> tuple[int, int]:
    """Rows and columns of a tile of two sets: of all that fit, those that prepare the fewest again.

    A tile's rows are prepared while a tile's columns are held, and the other way round. Of n × m in
    a × b tiles at most n b + m a are prepared, and as many are multiplied out.

    Args:
      rows, columns: the bytes that a prepared row holds, and those that it needs beside them while
        it is prepared; of a column.

    For the others, and what is raised, see `tile_size`.
    """
    n, m = (-(-count // shards) for count in counts)
    (row, making_row), (column, making_column) = rows, columns
    found = []
    for strips in range(1, n + 1):
        high = -(-n // strips)
        beside_row = (budget - high * row) // (column + making_column)
        wide = min(m, beside_row, (budget - high * (row + making_row)) // column)
        if wide >= 1:
            parts = -(-m // wide)
            found.append((n * parts + m * strips, high, evenly(m, wide)))
    if not found:
        needed = max(row + column + making_column, row + making_row + column)
        raise _too_small(needed, budget)
    _, high, wide = min(found)
    return shards * high, shards * wide


def _too_small(needed: int, budget: int) -> JaxdynError:
    return JaxdynError(
        f"memory_budget is too small for one site: a pair needs about {needed} bytes beside the "
        f"workspace, got {budget}"
    )
