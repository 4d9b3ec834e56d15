"""Tiles of a kernel matrix under a memory budget, and their assembly."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxdyn.kernels.sites import Rows
from jaxdyn.types import JaxdynError

DEFAULT_BUDGET = 4 * 2**30
"""Bytes that a kernel may use beside the parameters and its result, where the caller names none."""


def workspace_of(budget: int) -> int:
    """Bytes of a block of products: an eighth of the budget, or less, to stay near the caches."""
    return min(budget // 8, 2**25)


def nbytes(tree: Any) -> int:
    """The bytes of a tree of arrays or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def attention_bytes(config: Any, slots: int, itemsize: int) -> int:
    """The attention weights that a row's backward pass keeps, and their cotangents."""
    return 2 * config.num_layers * config.num_heads * slots**2 * itemsize


def tile_size(counts: tuple[int, int], square: bool, one_row: int, budget: int) -> int:
    """Rows and columns of a tile: all, or as many as fit when two sets are held at once.

    Args:
      counts: rows N and columns M of the whole.
      square: whether the columns are the rows, so that a single tile holds one set.
      one_row: bytes at the peak of preparing one row.
      budget: bytes for the rows.

    Raises:
      JaxdynError: if not even one row and one column fit.
    """
    if square and counts[0] * one_row <= budget:
        return counts[0]
    size = min(budget // (2 * one_row), max(counts))
    if size < 1:
        raise JaxdynError(
            f"memory_budget is too small for one site: a pair needs about {2 * one_row} bytes "
            f"beside the workspace, got {budget}"
        )
    return size


def assemble(
    rows: Rows,
    columns: Rows | None,
    size: int,
    prepare: Callable[[Rows], Any],
    contract: Callable[[Any, Any], Any],
) -> Any:
    """`contract` of all pairs of `prepare`d tiles: a tree of arrays [..., N, K, M, J].

    Without columns they are the rows: `contract` gets None for them on the diagonal, and the tiles
    above it are transposed to below.
    """
    square = columns is None
    columns = rows if columns is None else columns
    n, m = len(rows.tokens), len(columns.tokens)
    high, wide = min(size, n), min(size, m)
    whole = None
    for top in range(0, n, high):
        left = prepare(rows.take(top, high))
        for start in range(top if square else 0, m, wide):
            on_diagonal = square and start == top
            right = None if on_diagonal else prepare(columns.take(start, wide))
            tile = jax.tree.map(np.asarray, contract(left, right))
            if whole is None:
                whole = jax.tree.map(functools.partial(_empty, n, m), tile)
            jax.tree.map(functools.partial(_place, top, start), whole, tile)
            if square and not on_diagonal:
                tile = jax.tree.map(lambda x: np.moveaxis(x, (-2, -1), (-4, -3)), tile)
                jax.tree.map(functools.partial(_place, start, top), whole, tile)
    return whole


def _empty(n, m, tile):
    return np.empty((*tile.shape[:-4], n, tile.shape[-3], m, tile.shape[-1]), tile.dtype)


def _place(top, start, whole, tile):
    bottom = min(top + tile.shape[-4], whole.shape[-4])
    stop = min(start + tile.shape[-2], whole.shape[-2])
    whole[..., top:bottom, :, start:stop, :] = tile[..., : bottom - top, :, : stop - start, :]
