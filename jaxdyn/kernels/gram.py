r"""The Gram engine: one forward and one backward pass, then inner products layer by layer.

A row's gradient is never formed as a whole. `factorize` runs the model once and pulls the logit
cotangents g back once; it keeps what every layer read (a) and the cotangent of what it wrote (δ).
`contract` turns two sets of factors into kernels: the classifier's is that of a dense layer with
input φ and output cotangent g, the body's are those of `layers`, and a tied matrix adds the
products of its two roles.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxdyn.kernels import layers
from jaxdyn.kernels.parts import kind_of
from jaxdyn.kernels.sites import Rows, logit_cotangents
from jaxdyn.types import Params

Layout = tuple[tuple[tuple[str, ...], frozenset[str]], ...]
"""The body's layers: where each one is and which parameters it has."""


class Factors(NamedTuple):
    """What N rows' gradients are made of; every layer has a leading axis, L or 1."""

    inputs: Any  # {layer: a [L, N, T, I], or ids [L, N, T]}
    cotangents: Any  # {layer: δ [L, N, K, T, O]}
    features: Any  # φ at the slots that count, [N, S, D]
    logit_cotangents: Any  # g, [N, K, S, V]


def layout_of(backbone: Params) -> Layout:
    """The layers of a body and the names of their parameters, as a static argument."""
    found: dict[tuple[str, ...], set[str]] = {}
    for path in flatten_dict(backbone):
        found.setdefault(path[:-1], set()).add(path[-1])
    return tuple((path, frozenset(names)) for path, names in sorted(found.items()))


def stacked(tree: Params) -> dict:
    """{layer: array}, each with a leading layer axis."""
    return {path: x if path[0] == "layers" else x[None] for path, x in flatten_dict(tree).items()}


def rows_first(tree: Params) -> dict:
    """Cotangents {layer: [L, N, K, T, O]} of a pullback mapped over K in front."""
    return {
        path: jnp.moveaxis(x, 0, 2) if path[0] == "layers" else jnp.moveaxis(x, 0, 1)[None]
        for path, x in flatten_dict(tree).items()
    }


@functools.partial(jax.jit, static_argnums=0)
def factorize(model: Any, view: Params, rows: Rows) -> Factors:
    """One forward pass of N rows and K backward passes."""
    phi, inputs, pull = model.opened(view["backbone"], rows.tokens, rows.mask)
    at = (jnp.arange(len(phi))[:, None], rows.positions)
    g = jax.vmap(logit_cotangents)(rows, model.logits(view["classifier"], phi[at]))
    back = jnp.einsum("nksv,vd->knsd", g, view["classifier"]["weight"].astype(g.dtype))
    start = jnp.zeros((g.shape[1], *phi.shape), g.dtype)
    start = start.at[:, at[0], at[1]].add(back).astype(phi.dtype)
    cotangents = rows_first(jax.vmap(pull)(start))
    return Factors(stacked(inputs), cotangents, phi[at], g)


def body_kernels(layout: Layout, rows: Factors, columns: Factors | None, workspace: int) -> dict:
    """Σ over a layer's parameters of the gradients' inner products, {kind: [L, N, K, M, J]}."""
    kernels: dict[str, list] = {}
    for path, names in layout:

        def kernel(pair, names=names):
            left, right = pair
            found = []
            if "kernel" in names:
                found.append(layers.dense(left, right, workspace))
            if "embedding" in names:
                found.append(layers.embedding(left, right, workspace))
            if "scale" in names:
                found.append(layers.elementwise(left, right))
            if "bias" in names:
                found.append(layers.bias(left, right))
            return sum(found)

        layer = lambda f, path=path: None if f is None else (f.inputs[path], f.cotangents[path])
        kernels.setdefault(kind_of(path), []).append(
            jax.lax.map(kernel, (layer(rows), layer(columns)))
        )
    return {kind: sum(each) for kind, each in kernels.items()}


@functools.partial(jax.jit, static_argnames=("layout", "tied", "biased", "workspace"))
def contract(
    rows: Factors,
    columns: Factors | None,
    *,
    layout: Layout,
    tied: bool,
    biased: bool,
    workspace: int,
) -> tuple[jax.Array, dict, jax.Array]:
    """Representation [N, K, M, J], the gradient component by kind [L, N, K, M, J], and cross.

    `columns=None` means the rows themselves.
    """
    head = lambda f: (f.features, f.logit_cotangents)
    table = lambda f: (f.inputs[("embed",)][0], f.cotangents[("embed",)][0])
    right = None if columns is None else head(columns)
    representation = layers.dense(head(rows), right, workspace)
    if biased:
        representation += layers.bias(head(rows), right)
    crossed = jnp.zeros_like(representation)
    if tied:
        other = rows if columns is None else columns
        there = layers.cross(head(rows), table(other), workspace)
        back = there if columns is None else layers.cross(head(other), table(rows), workspace)
        crossed = there + back.transpose(2, 3, 0, 1)
    return representation, body_kernels(layout, rows, columns, workspace), crossed
