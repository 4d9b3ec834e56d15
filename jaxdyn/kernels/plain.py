"""The plain method: whole gradients, one row after another, and their inner products."""

import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxdyn.kernels.parts import kind_of
from jaxdyn.kernels.rows import Rows, logit_cotangents
from jaxdyn.types import Model, Params, View


def gradients(model, view: View, roots: Params | None, rows: Rows) -> Params:
    """∇ of every row's K functions with respect to the view, times `roots`: leaves [N, K, ...]."""

    def one(row):
        def logits(view):
            phi = model.unfused.features(view["backbone"], row.tokens[None], row.mask[None])[0]
            return model.logits(view["classifier"], phi[row.positions])

        f, pull = jax.vjp(logits, view)
        return jax.vmap(lambda g: pull(g)[0])(logit_cotangents(row, f))

    found = jax.lax.map(one, rows)
    return found if roots is None else jax.tree.map(lambda g, r: g * r[None, None], found, roots)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """[N, K, ...] and [M, J, ...] -> [N, K, M, J]."""
    flat = lambda z: z.reshape(*z.shape[:2], -1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("nkp,mjp->nkmj", flat(x), flat(y), preferred_element_type=wide)


@functools.partial(jax.jit, static_argnums=0)
def plain_kernels(
    model: Model,
    view: View,
    roots: Params | None,
    rows: Rows,
    columns: Rows | None,
    other: View | None = None,
) -> dict[str, jax.Array]:
    """Kernels by name: representation and cross [N, K, M, J], each kind [L, N, K, M, J].

    The columns' gradients are taken at `other`, where it is given.
    """
    left = gradients(model, view, roots, rows)
    there = view if other is None else other
    right = left if columns is None else gradients(model, there, roots, columns)
    heads = jax.tree.map(_inner, left["classifier"], right["classifier"])
    representation = functools.reduce(jnp.add, jax.tree.leaves(heads))

    parts: dict[str, jax.Array] = {}
    others = flatten_dict(right["backbone"])
    for path, x in flatten_dict(left["backbone"]).items():
        layered = (lambda z: jnp.moveaxis(z, 2, 0)) if path[0] == "layers" else lambda z: z[None]
        kernel = jax.vmap(_inner)(layered(x), layered(others[path]))
        kind = kind_of(path)
        parts[kind] = parts[kind] + kernel if kind in parts else kernel

    cross = jnp.zeros_like(representation)
    if model.config.tied:
        matrices = lambda g: (g["classifier"]["weight"], g["backbone"]["embed"]["embedding"])
        (head, table), (other_head, other_table) = matrices(left), matrices(right)
        cross = _inner(head, other_table) + _inner(table, other_head)
    return {"representation": representation, "cross": cross, **parts}
