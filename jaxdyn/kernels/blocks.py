"""Tiles of a kernel matrix under a memory budget: their size, their devices, their assembly.

Every kernel that is made of rows goes through `tiling` and `assemble`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdyn.hosts import fetch, from_first, gather, is_local
from jaxdyn.kernels.execution import Execution
from jaxdyn.kernels.memory import tile_size, tile_sizes, workspace_of
from jaxdyn.kernels.rows import Rows
from jaxdyn.kernels.store import Store, digest


class Tiling(NamedTuple):
    """Rows against columns (None: the rows), in tiles of high × wide that the budget allows; of
    rows against themselves they are square.

    `each` are the bytes that a row of a tile may take, `workspace` those of a block of products,
    and `shards` the devices between which a tile's rows are divided.
    """

    rows: Rows
    columns: Rows | None
    high: int
    wide: int
    each: int
    workspace: int
    shards: int = 1


def tiling(
    rows: Rows,
    columns: Rows | None,
    needs: Sequence[tuple[int, int]],
    budget: int,
    platform: str,
    shards: int = 1,
) -> Tiling:
    """The largest tiles within `budget` bytes.

    Args:
      needs: of a row and of a column, if there are columns, the bytes that it holds once it is
        prepared, and those that it needs beside them while it is; where rows are divided between
        `shards` devices, on one of them.

    Raises:
      JaxdynError: if not even one row and one column fit.
    """
    workspace, spare = workspace_of(budget, platform)
    room, n = budget - spare, len(rows.tokens)
    if columns is None:
        high = wide = tile_size(n, *needs[0], room, shards)
        at_once = high if high >= n else 2 * high
    else:
        of_row, of_column = needs
        high, wide = tile_sizes((n, len(columns.tokens)), of_row, of_column, room, shards)
        at_once = high + wide
    return Tiling(rows, columns, high, wide, room // (at_once // shards), workspace, shards)


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


def turns(given: Tiling) -> tuple[int, int]:
    """How many rows one device would prepare, and how many of a tile's it would multiply out."""
    n, square = len(given.rows.tokens), given.columns is None
    m = n if given.columns is None else len(given.columns.tokens)
    (tiles,) = strips(-(-n // given.high), -(-m // given.wide), square, 1)
    prepared = multiplied = 0
    held: dict[tuple, int] = {}
    for row, column in tiles:
        sides = {("row", row): given.high}
        sides |= {("row" if square else "column", column): given.wide}
        multiplied += sum(sides.values())
        prepared += sum(size for side, size in sides.items() if side not in held)
        held = sides
    return prepared, multiplied


class _Worker:
    """One device's operands and the tiles that it holds prepared: at most the two of a pair."""

    def __init__(self, device, operands, others, prepare, contract):
        here = lambda x: jax.device_put(x, device) if is_local(x) else x
        mine = jax.tree.map(here, operands)
        self.device = device
        self.sides = mine, mine if others is None else jax.tree.map(here, others)
        self.prepare, self.contract = prepare, contract
        self.held: dict[tuple, Any] = {}

    def start(self, left: tuple[Rows, int, int], right: tuple[Rows, int, int] | None) -> Any:
        """The pair's kernels, not yet waited for; a side is (all rows, first, how many)."""
        sides = [left] if right is None else [left, right]
        keys = [(id(rows), first) for rows, first, _ in sides]
        # What this pair does not need is freed before anything new is made.
        self.held = {key: self.held[key] for key in keys if key in self.held}
        for key, (rows, first, many), operands in zip(keys, sides, self.sides, strict=False):
            if key not in self.held:
                tile = jax.device_put(rows.take(first, many), self.device)
                self.held[key] = self.prepare(operands, tile)
        other = None if right is None else self.held[keys[1]]
        return self.contract(self.sides[0], self.held[keys[0]], other)


def assemble(
    kind: str,
    given: Tiling,
    operands: Any,
    prepare: Callable[[Any, Rows], Any],
    contract: Callable[[Any, Any, Any], dict[str, Any]],
    execution: Execution,
    others: Any = None,
) -> dict[str, np.ndarray]:
    """`contract(operands, left, right)` of all pairs of tiles: arrays [..., N, K, M, J] by name.

    `left` and `right` are tiles of rows and columns after `prepare(operands, tile)`. Without
    columns they are the rows: `contract` gets None for them on the diagonal, and the tiles above
    it are transposed to below. Columns are prepared with `others`, where these are given, in the
    operands' place. The operands are copied to every device; `kind` tells this kernel
    from others of the same rows where finished tiles are kept.

    Of many processes each takes tiles of its own if it has the whole operands; if these are divided
    among the processes, all do every tile together. All get all tiles; the first keeps them.
    """
    sides = operands, operands if others is None else others
    rows, columns, square = given.rows, given.columns or given.rows, given.columns is None
    n, m = len(rows.tokens), len(columns.tokens)
    devices = list(execution.get("devices") or [None])
    apart = all(map(is_local, jax.tree.leaves(sides)))
    lanes = len(devices) * (jax.process_count() if apart else 1)
    divisible = lambda count: -(-count // given.shards) * given.shards
    most = divisible(-(-max(n, m) // lanes))  # a strip for every device
    high, wide = min(given.high, most, divisible(n)), min(given.wide, most, divisible(m))
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

    def begin(worker: _Worker, tile: Tile | None) -> Any:
        if tile is None:
            return None
        left, right = (rows, tile.row * high, high), (columns, tile.column * wide, wide)
        return worker.start(left, None if square and tile.row == tile.column else right)

    def first_tile(sides, left, right):
        right = None if right is None else prepare(sides[1], right)
        return contract(sides[0], prepare(sides[0], left), right)

    shapes: dict[str, Any] = {}  # what a process must know of a tile that another one has
    if jax.process_count() > 1:
        firsts = rows.take(0, high), None if square else columns.take(0, wide)
        shapes = jax.eval_shape(first_tile, sides, *firsts)

    store = None
    if "blocks" in execution:
        both = digest(rows), digest(None if square else columns)
        content = [kind, high, wide, digest(operands), *both]
        content += [] if others is None else [digest(others)]
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
    workers = [_Worker(device, operands, others, prepare, contract) for device in devices]
    first = len(devices) * (jax.process_index() if apart else 0)
    for at_once in itertools.zip_longest(*work):
        begun = [begin(*pair) for pair in zip(workers, at_once[first:], strict=False)]
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
