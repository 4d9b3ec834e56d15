"""The plain method: whole gradients, one row after another, and their inner products.

Where a metric is zero nothing moves, and no gradient is taken: of a model with adapters these alone
are formed.
"""

import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdyn.kernels.parts import kind_of
from jaxdyn.kernels.rows import Rows, logit_cotangents
from jaxdyn.types import Model, Params, View

Leaves = tuple[tuple[str, ...], ...]
"""The paths of some of a view's leaves."""


def moving_leaves(view: View, roots: Params | None) -> Leaves:
    """Those of the view that a metric's √P moves: without one, all."""
    if roots is None:
        return tuple(flatten_dict(view))
    return tuple(path for path, x in flatten_dict(roots).items() if bool(jnp.any(x > 0)))


def gradients(
    model, view: View, roots: Params | None, rows: Rows, leaves: Leaves | None = None
) -> Params:
    """∇ of every row's K functions with respect to the view, or to some of its leaves, times
    `roots`: arrays [N, K, ...]."""
    whole, scales = flatten_dict(view), {} if roots is None else flatten_dict(roots)
    moved = whole if leaves is None else {path: whole[path] for path in leaves}

    def one(row):
        def logits(moving):
            view = unflatten_dict(whole | moving)
            phi = model.unfused.features(view["backbone"], row.tokens[None], row.mask[None])[0]
            return model.logits(view["classifier"], phi[row.positions])

        f, pull = jax.vjp(logits, moved)
        return jax.vmap(lambda g: pull(g)[0])(logit_cotangents(row, f))

    found = jax.lax.map(one, rows)
    scaled = {path: g * scales[path][None, None] if scales else g for path, g in found.items()}
    return unflatten_dict(scaled)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """[N, K, ...] and [M, J, ...] -> [N, K, M, J]."""
    flat = lambda z: z.reshape(*z.shape[:2], -1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("nkp,mjp->nkmj", flat(x), flat(y), preferred_element_type=wide)


@functools.partial(jax.jit, static_argnames=("model", "leaves"))
def plain_kernels(
    model: Model,
    view: View,
    roots: Params | None,
    rows: Rows,
    columns: Rows | None,
    other: View | None = None,
    *,
    leaves: Leaves | None = None,
) -> dict[str, jax.Array]:
    """Kernels by name: representation and cross [N, K, M, J], each kind [L, N, K, M, J].

    The columns' gradients are taken at `other`, where it is given.
    """
    taken = lambda view, rows: flatten_dict(gradients(model, view, roots, rows, leaves))
    left = taken(view, rows)
    right = left if columns is None else taken(view if other is None else other, columns)
    sides = [(len(x.tokens), x.outputs) for x in (rows, rows if columns is None else columns)]
    wide = jnp.promote_types(view["classifier"]["weight"].dtype, jnp.float32)
    representation = cross = nothing = jnp.zeros(sides[0] + sides[1], wide)

    parts: dict[str, jax.Array] = {}
    for path, whole in flatten_dict(view).items():
        of_layers = path[1] == "layers"
        if path[0] == "classifier":
            representation += _inner(left[path], right[path]) if path in left else nothing
            continue
        kernel = jnp.broadcast_to(nothing, (len(whole) if of_layers else 1, *nothing.shape))
        if path in left:
            layered = (lambda z: jnp.moveaxis(z, 2, 0)) if of_layers else lambda z: z[None]
            kernel = jax.vmap(_inner)(layered(left[path]), layered(right[path]))
        kind = kind_of(path[1:])
        parts[kind] = parts[kind] + kernel if kind in parts else kernel

    roles = ("classifier", "weight"), ("backbone", "embed", "embedding")
    if model.config.tied and all(path in left for path in roles):
        (head, table), (other_head, other_table) = ([g[x] for x in roles] for g in (left, right))
        cross = _inner(head, other_table) + _inner(table, other_head)
    return {"representation": representation, "cross": cross, **parts}
