"""Tiles of a kernel matrix under a memory budget: their size, their devices, their assembly."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.hosts import fetch, from_first, gather, is_local
from jaxdyn.kernels.layers import SPARE
from jaxdyn.kernels.result import Execution
from jaxdyn.kernels.rows import Rows
from jaxdyn.kernels.store import Store, digest
from jaxdyn.types import JaxdynError, Model

DEFAULT_BUDGET = 4 * 2**30
"""Bytes that a kernel may use beside the parameters and its result, where the caller names none."""


def budget_of(execution: Execution) -> int:
    """The caller's memory budget, or the default.

    Raises:
      TypeError: if an option is unknown, as for any other keyword argument.
    """
    if unknown := set(execution) - set(Execution.__annotations__):
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    return execution.get("memory_budget", DEFAULT_BUDGET)


def workspace_of(budget: int) -> tuple[int, int]:
    """Bytes of a block of products, and what to leave for blocks and their copies.

    On a CPU a block should stay near the caches; an accelerator wants large products.
    """
    workspace = min(budget // (8 * SPARE), 2**22 if jax.default_backend() == "cpu" else 2**27)
    return workspace, 4 * SPARE * workspace


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


def tile_size(counts: tuple[int, int], square: bool, held: int, working: int, budget: int) -> int:
    """Rows and columns of a tile: all, or as many as fit when two sets are held at once.

    Args:
      counts: rows N and columns M of the whole.
      square: whether the columns are the rows, so that a single tile holds one set.
      held: bytes that one prepared row holds.
      working: bytes that one row needs while it is prepared, beside those it will hold.
      budget: bytes for the rows.

    Returns:
      A size by which the longer side is divided evenly.

    Raises:
      JaxdynError: if not even one row and one column fit.
    """
    longest = max(counts)
    if square and longest * (held + working) <= budget:
        return longest
    fitting = budget // (2 * held + working)
    if fitting < 1:
        raise JaxdynError(
            f"memory_budget is too small for one site: a pair needs about {2 * held + working} "
            f"bytes beside the workspace, got {budget}"
        )
    tiles = -(-longest // fitting)
    return -(-longest // tiles)


class Tile(NamedTuple):
    """A place in the grid of tiles; on the diagonal of a square one the columns are the rows."""

    row: int
    column: int


def strips(high: int, wide: int, square: bool, devices: int) -> list[list[Tile]]:
    """The grid's tiles, a list for each device, in an order that prepares few sets twice.

    A strip is a row of tiles, or a column where there are more of these; of a square grid only
    those from the diagonal on, which comes first. Each of a device's strips ends where its next
    one begins.
    """
    turned = not square and wide > high
    count, length = (wide, high) if turned else (high, wide)
    owned: list[list[int]] = [[] for _ in range(devices)]
    loads = [0] * devices
    for strip in range(count):
        least = loads.index(min(loads))
        owned[least].append(strip)
        loads[least] += length - strip if square else length

    lists = []
    for mine in owned:
        tiles = []
        for turn, (strip, after) in enumerate(itertools.zip_longest(mine, mine[1:])):
            if square:
                others = [place for place in range(length - 1, strip, -1) if place != after]
                places = [strip, *others] + ([] if after is None else [after])
            else:
                places = list(range(length))[:: -1 if turn % 2 else 1]
            tiles += [Tile(place, strip) if turned else Tile(strip, place) for place in places]
        lists.append(tiles)
    return lists


class _Worker:
    """One device's operands and the tiles that it holds prepared: at most the two of a pair."""

    def __init__(self, device, operands, prepare, contract):
        here = lambda x: jax.device_put(x, device) if is_local(x) else x
        self.device, self.operands = device, jax.tree.map(here, operands)
        self.prepare, self.contract = prepare, contract
        self.held: dict[tuple, Any] = {}

    def start(self, left: tuple[Rows, int, int], right: tuple[Rows, int, int] | None) -> Any:
        """The pair's kernels, not yet waited for; a side is (all rows, first, how many)."""
        sides = [left] if right is None else [left, right]
        keys = [(id(rows), first) for rows, first, _ in sides]
        # What this pair does not need is freed before anything new is made.
        self.held = {key: self.held[key] for key in keys if key in self.held}
        for key, (rows, first, many) in zip(keys, sides, strict=True):
            if key not in self.held:
                self.held[key] = self.prepare(
                    self.operands, jax.device_put(rows.take(first, many), self.device)
                )
        other = None if right is None else self.held[keys[1]]
        return self.contract(self.operands, self.held[keys[0]], other)


def assemble(
    kind: str,
    rows: Rows,
    columns: Rows | None,
    size: int,
    operands: Any,
    prepare: Callable[[Any, Rows], Any],
    contract: Callable[[Any, Any, Any], dict[str, Any]],
    execution: Execution,
) -> dict[str, np.ndarray]:
    """`contract(operands, left, right)` of all pairs of tiles: arrays [..., N, K, M, J] by name.

    `left` and `right` are tiles of rows and columns after `prepare(operands, tile)`. Without
    columns they are the rows: `contract` gets None for them on the diagonal, and the tiles above
    it are transposed to below. The operands are copied to every device; `kind` tells this kernel
    from others of the same rows where finished tiles are kept.

    Of many processes each takes tiles of its own if it has the whole operands; if these are divided
    among the processes, all do every tile together. All get all tiles; the first keeps them.
    """
    square = columns is None
    columns = rows if columns is None else columns
    n, m = len(rows.tokens), len(columns.tokens)
    devices = list(execution.get("devices") or [None])
    apart = all(map(is_local, jax.tree.leaves(operands)))
    lanes = len(devices) * (jax.process_count() if apart else 1)
    size = min(size, -(-max(n, m) // lanes))  # a strip for every device
    high, wide = min(size, n), min(size, m)
    work = strips(-(-n // high), -(-m // wide), square, lanes)
    total, done = sum(map(len, work)), 0
    whole: dict[str, np.ndarray] = {}
    progress = execution.get("progress", lambda done, total: None)

    def place(tile: Tile, result: dict[str, np.ndarray]) -> None:
        top, start = tile.row * high, tile.column * wide
        for name, x in result.items():
            if name not in whole:
                shape = (*x.shape[:-4], n, x.shape[-3], m, x.shape[-1])
                whole[name] = np.empty(shape, x.dtype)
            _place(whole[name], top, start, x)
            if square and tile.row != tile.column:
                _place(whole[name], start, top, np.moveaxis(x, (-2, -1), (-4, -3)))

    def first_tile(given, left, right):
        right = None if right is None else prepare(given, right)
        return contract(given, prepare(given, left), right)

    shapes: dict[str, Any] = {}  # what a process must know of a tile that another one has
    if jax.process_count() > 1:
        sides = rows.take(0, high), None if square else columns.take(0, wide)
        shapes = jax.eval_shape(first_tile, operands, *sides)

    store = None
    if "blocks" in execution:
        content = [kind, size, digest(operands), digest(rows), digest(None if square else columns)]
        if jax.process_index() == 0:
            store = Store(execution["blocks"], content)
        for tiles in work:
            for tile in list(tiles):
                saved = None if store is None else store.load(tile.row, tile.column)
                if from_first(np.array(saved is not None)):
                    place(tile, from_first(saved or empty(shapes)))
                    tiles.remove(tile)
                    done += 1
    if done:
        progress(done, total)

    # Every device gets a tile before the first one's is waited for.
    workers = [_Worker(device, operands, prepare, contract) for device in devices]
    first = len(devices) * (jax.process_index() if apart else 0)
    for at_once in itertools.zip_longest(*work):
        begun: list[Any] = []
        for worker, tile in zip(workers, at_once[first:], strict=False):
            if tile is None:
                begun.append(None)
                continue
            right = (columns, tile.column * wide, wide)
            diagonal = square and tile.row == tile.column
            left = (rows, tile.row * high, high)
            begun.append(worker.start(left, None if diagonal else right))
        results = exchanged(shapes, begun) if apart else [fetch(x) for x in begun]
        for tile, result in zip(at_once, results, strict=True):
            if tile is None:
                continue
            if store is not None:
                store.save(tile.row, tile.column, result)
            place(tile, result)
            done += 1
            progress(done, total)
    return whole


def exchanged(shapes: dict[str, Any], mine: list[Any]) -> list[Any]:
    """Every process's results as host arrays, one's after another's; None where it had no tile."""
    if jax.process_count() == 1:
        return [fetch(x) for x in mine]
    count = len(mine) * jax.process_count()
    own = [empty(shapes) if x is None else fetch(x) for x in mine]
    stacked = {name: gather(np.stack([x[name] for x in own]), count) for name in shapes}
    return [{name: x[place] for name, x in stacked.items()} for place in range(count)]


def empty(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """What stands for a tile that another process has."""
    return {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}


def _place(whole, top, start, tile):
    bottom = min(top + tile.shape[-4], whole.shape[-4])
    stop = min(start + tile.shape[-2], whole.shape[-2])
    whole[..., top:bottom, :, start:stop, :] = tile[..., : bottom - top, :, : stop - start, :]
