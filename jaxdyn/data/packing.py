"""Several examples in one row of slots, so that short ones cost no padding."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def first_fit(lengths: Sequence[int], slots: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `slots`: the longest first, each to the first
    row that has room (first-fit decreasing: at most 11/9 of the fewest rows, and one).
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        row = next((row for row, room in enumerate(left) if room >= length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(slots)
        rows[row].append(index)
        left[row] -= length
    return rows


def row_count(count: int, most: int, parts: int) -> int:
    """So many rows or a few more, in steps of a quarter of a power of two, so that shapes are few.

    A multiple of `parts`, as `most` is, and no more than it.
    """
    step = max(1, (1 << (count.bit_length() - 1)) // 4)
    rounded = -(-count // step) * step
    return min(-(-rounded // parts) * parts, most)


def pack(
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    predicted: Bool[Array, "B T"],
    parts: int = 1,
) -> tuple[Int[Array, "R T"], Int[Array, "R T"], Bool[Array, "R T"]]:
    """Examples padded on the right, in fewer rows of as many slots; their mask numbers them.

    In each row examples have the numbers 1, 2, ..., and padding 0 (`jaxdyn.types.Mask`). Rows
    without an example fill up to `row_count`.

    Args:
      parts: what divides the number of rows: micro-batches times the shares of a mesh.
    """
    ids, present, wanted = (np.asarray(x) for x in (tokens, mask, predicted))
    lengths = present.sum(axis=1).tolist()
    rows = first_fit(lengths, ids.shape[1])
    shape = row_count(len(rows), len(ids), parts), ids.shape[1]
    packed = np.full(shape, ids[~present][0] if not present.all() else 0, np.int32)
    numbers, told = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, members in enumerate(rows):
        start = 0
        for number, index in enumerate(members, 1):
            place, own = slice(start, start + lengths[index]), slice(lengths[index])
            packed[row, place], told[row, place] = ids[index, own], wanted[index, own]
            numbers[row, place] = number
            start = place.stop
    return jnp.asarray(packed), jnp.asarray(numbers), jnp.asarray(told)
