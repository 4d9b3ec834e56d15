r"""Who among many stored gradients points where a few others do, with standard errors.

With the stored sketches Z [N, 2 R p²] and a query's z, all N estimates ⟨Z_n, z⟩/R of ⟨g_n, g⟩ are
one product of a matrix that is read once, from its memory map, some rows at a time: 4 R p² N
products a query. Of the rows that are found, and of no others, the R replicates are taken apart:
they are independent, identically distributed estimates x_r, so that

    s² = Σ_r (x_r − x̄)² / (R (R − 1))

is without bias the variance of their mean, given the gradients. Where two gradients are far from
parallel s is about ‖g_n‖ ‖g‖ / √(R p²): the formula of `sketch` at c = d = 0.

What is found was chosen for its size: of N rows that have nothing to do with the query the largest
estimate lies about √(2 log N) standard errors from 0 (4.8 of 10⁵ rows), so only what is beyond that
is found for certain; and what is less clear than that is on average estimated too far out.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdyn.kernels.result import Kernel
from jaxdyn.kernels.sketch import Sketch, require_comparable
from jaxdyn.kernels.sketch_file import SketchFile
from jaxdyn.types import COMPONENTS, JaxdynError

BLOCK = 2**27
"""Bytes of the rows that are taken at a time."""

SAMPLED = 256
"""Rows by which the estimates' error is told."""


class Nearest(NamedTuple):
    """Of Q queries the k rows with the largest inner products, and the k with the smallest.

    Attributes:
      up, down: their numbers [Q, k], from the outermost inwards.
      of_up, of_down: the estimates [Q, k] by component, with the total's standard error.
      up_cosines, down_cosines: ⟨g_n, g⟩/(‖g_n‖ ‖g‖), from sketched norms, [Q, k].
      error: the rows' standard error, root mean square over evenly chosen ones, [Q].
      largest: how many such errors the largest of N without any relation is from 0, √(2 log N).
    """

    up: np.ndarray
    down: np.ndarray
    of_up: Kernel
    of_down: Kernel
    up_cosines: np.ndarray
    down_cosines: np.ndarray
    error: np.ndarray
    largest: float


def nearest_sketches(stored: SketchFile, queries: Sketch, count: int = 10) -> Nearest:
    """The rows of a file whose gradients' inner products with the queries' are outermost.

    Args:
      stored: N rows.
      queries: Q sketches, made with the file's key, sizes and metric: `sketch_sequences(model,
        params, rollout, stored.key, replicates=stored.replicates, side=stored.side)`.
      count: k, at most N.

    Raises:
      JaxdynError: if the two do not compare, k is less than 1, or rows are not finite.
    """
    if count < 1:
        raise JaxdynError(f"count must be at least 1, got {count}")
    config = queries.config
    require_comparable(stored.take(slice(0, 1), config), queries)
    count = min(count, len(stored))
    estimates = _estimates(stored, queries)
    # Of a part that is chosen in linear time, the k in order.
    outermost = np.argpartition(-estimates, count - 1, axis=1)[:, :count]
    innermost = np.argpartition(estimates, count - 1, axis=1)[:, :count]
    at = lambda which: np.take_along_axis(estimates, which, axis=1)
    order = lambda which, keys: np.take_along_axis(which, np.argsort(keys, kind="stable"), axis=1)
    up, down = order(outermost, -at(outermost)), order(innermost, at(innermost))

    sampled = np.linspace(0, len(stored) - 1, min(SAMPLED, len(stored))).round().astype(int)
    pick = lambda rows: np.asarray(stored.rows[np.sort(rows)])[np.argsort(np.argsort(rows))]
    some, errors = pick(sampled), []
    found: dict[str, list[dict[str, np.ndarray]]] = {"up": [], "down": []}
    for number in range(len(queries)):
        own = np.stack([np.asarray(x[number]) for x in (queries.head, queries.body)])
        for side, rows in (("up", up), ("down", down)):
            found[side].append(_apart(own, pick(rows[number]), config.tied))
        errors.append(np.sqrt(np.mean(_apart(own, some, config.tied)["standard_error"] ** 2)))
    joined = {
        side: {name: np.stack([x[name] for x in each]) for name in each[0]}
        for side, each in found.items()
    }
    cosines = {side: each.pop("cosine") for side, each in joined.items()}

    def as_kernel(side: str) -> Kernel:
        parts = [jnp.asarray(joined[side][name]) for name in COMPONENTS]
        error = jnp.asarray(joined[side]["standard_error"])
        return Kernel(parts[0], parts[1], parts[2], error, stored.preconditioned)

    largest = float(np.sqrt(2 * np.log(max(len(stored), 2))))
    both = as_kernel("up"), as_kernel("down"), cosines["up"], cosines["down"]
    return Nearest(up, down, *both, np.array(errors), largest)


def _apart(query: np.ndarray, rows: np.ndarray, tied: bool) -> dict[str, np.ndarray]:
    """A query [2, R, p²] and rows [M, 2, R, p²], by component: `sketch_kernel`'s numbers, and
    cosines, [M], without a program to compile."""
    query, rows = query.astype(np.float64), rows.astype(np.float64)
    count = query.shape[1]
    each = np.einsum("irk,mjrk->ijmr", query, rows, optimize=True)
    cross = each[0, 1] + each[1, 0] if tied else np.zeros_like(each[0, 0])
    total = each[0, 0] + each[1, 1] + cross
    whole = lambda x: x.sum(axis=-3, keepdims=True) if tied else x
    norms = [np.sum(whole(x) ** 2, axis=(-3, -2, -1)) / count for x in (query, rows)]
    return {
        "representation": each[0, 0].mean(axis=1),
        "gradient": each[1, 1].mean(axis=1),
        "cross": cross.mean(axis=1),
        "standard_error": total.std(axis=1, ddof=1) / np.sqrt(count),
        "cosine": total.mean(axis=1) / np.sqrt(np.maximum(norms[0] * norms[1], 1e-300)),
    }


def _estimates(stored: SketchFile, queries: Sketch) -> np.ndarray:
    """⟨g_n, g_q⟩ of all rows, [Q, N]."""
    count, width = len(stored), int(np.prod(stored.rows.shape[1:]))
    head, body = (np.asarray(x).reshape(len(queries), -1) for x in (queries.head, queries.body))
    if queries.config.tied:  # the paths share parameters, and their sketches add
        head = body = head + body
    wanted = np.concatenate([head, body], axis=1).T.astype(np.float32) / stored.replicates
    rows = stored.rows.reshape(count, width)
    found = np.empty((len(queries), count), np.float32)
    high = max(BLOCK // (4 * width), 1)
    for start in range(0, count, high):
        found[:, start : start + high] = (rows[start : start + high] @ wanted).T
    bad = ~np.isfinite(found).all(axis=0)
    if bad.any():
        raise JaxdynError(f"{stored.path}: row {int(np.argmax(bad))} is damaged: it is not finite")
    return found
