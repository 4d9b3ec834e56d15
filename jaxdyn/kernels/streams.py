r"""Rows held as what their layers read and were sent back, which are opened one layer at a time.

The factors of a row (`jaxdyn.kernels.gram`) are an input and a cotangent of every matrix: at the
shape of SmolLM2-135M ten times the residual stream h_l and its cotangent ∂g/∂h_l. From these two a
layer's factors follow by one pass through the layer alone. So a memory budget holds many more rows,
which are prepared, and their gradients formed, once and not for every tile; for that each layer is
passed again wherever a tile is multiplied out.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdyn.kernels.gram import (
    Factors,
    body_kernels,
    contract,
    factors_of,
    pulled,
    pulled_back,
    smallest_factors,
    stacked,
)
from jaxdyn.kernels.memory import attention_bytes, nbytes
from jaxdyn.kernels.rows import Rows
from jaxdyn.types import Model, Params, View


class Stream(NamedTuple):
    """What N rows' gradients are made of, before their layers are opened."""

    outside: Factors  # of what lies outside the layers
    read: jax.Array  # h, [L, N, T, D]
    cotangents: jax.Array  # of what every layer wrote, [L, N, K, T, D]
    mask: jax.Array  # [N, T]


class Side(NamedTuple):
    """Rows, and the parameters they are rows of; `roots` is √P, shaped as the view."""

    view: View
    roots: Params | None
    stream: Stream


@functools.partial(jax.jit, static_argnums=0)
def stream(model: Model, view: View, roots: Params | None, rows: Rows) -> Stream:
    """One forward pass of N rows and K backward passes, which keep what the layers read."""
    phi, inputs, pull = model.streamed(view["backbone"], rows.tokens, rows.mask)
    features, g, cotangents = pulled_back(model, view, rows, phi, pull)
    every = stacked(inputs)
    read, back = every.pop(("layers",)), cotangents.pop(("layers",))
    without = lambda body: {name: x for name, x in body.items() if name != "layers"}
    outside_roots = None if roots is None else without(roots["backbone"])
    outside = factors_of(without(view["backbone"]), every, cotangents, outside_roots)
    outside = outside._replace(features=features, logit_cotangents=g)
    return Stream(outside, read, back, rows.mask)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("tied", "biased", "workspace"))
def contract_streams(
    model: Model, rows: Side, columns: Side | None, *, tied: bool, biased: bool, workspace: int
) -> dict[str, jax.Array]:
    """What `contract` gives of the rows' factors; `columns=None` means the rows themselves."""
    whole = rows.stream.outside, None if columns is None else columns.stream.outside
    options: Any = {"tied": tied, "biased": biased, "workspace": workspace}
    found = contract(rows.view, rows.roots, *whole, **options)

    def layers_of(side: Side):
        root = None if side.roots is None else side.roots["backbone"]["layers"]
        return side.view["backbone"]["layers"], root, side.stream.read, side.stream.cotangents

    def of_layer(layer):
        number, mine, other = layer
        left = _opened(model, number, rows.stream.mask, *mine)
        right = None
        if columns is not None:
            right = _opened(model, number, columns.stream.mask, *other)
        block, root, *_ = mine
        kernels = body_kernels(left, right, _alone(root), _alone(block), workspace)
        return {kind: x[0] for kind, x in kernels.items()}

    numbers = jnp.arange(len(rows.stream.read))
    other = None if columns is None else layers_of(columns)
    return found | jax.lax.map(of_layer, (numbers, layers_of(rows), other))


def _alone(block: Any) -> Any:
    """A layer's tree as that of a body of one layer; None of None."""
    return None if block is None else {"layers": jax.tree.map(lambda x: x[None], block)}


def _opened(model: Model, number, mask, block: Params, root, read, cotangents) -> Factors:
    """The factors of one layer, with an axis of layers of length one."""
    inputs, pull = model.open_block(block, number, read, mask)
    starts = jnp.moveaxis(cotangents, 1, 0)
    back = pulled(lambda cotangent: _alone(pull(cotangent)), starts)
    return factors_of(_alone(block), stacked(_alone(inputs)), back, _alone(root))


def stream_bytes(model: Model, slots: int, counted: int, outputs: int) -> tuple[int, int]:
    """What a streamed row holds with one of its layers opened, and what making it needs beside.

    By XLA's own account (CPU, GPT-NeoX and Llama, T = 64 to 256, K = 1 to 3) a pair of tiles being
    multiplied takes 1.4 to 1.9 of a layer's factors a row, and making a tile 2.0 to 2.5, attention
    included; this says 1.6 to 3.2 and 2.7 to 5. For the arguments see `gram.row_bytes`.
    """
    inputs, cotangents, vectors, features, g = smallest_factors(model)

    def of(inside: bool) -> int:
        part = lambda tree: nbytes([x for p, x in tree.items() if (p[0] == "layers") == inside])
        return slots * (part(inputs) + outputs * part(cotangents)) + outputs * part(vectors)

    layers, width = model.config.num_layers, model.config.width
    held = slots * (1 + outputs) * layers * width * features.dtype.itemsize
    held += of(False) + counted * (nbytes(features) + outputs * nbytes(g))
    layer, attention = of(True) // layers, outputs * attention_bytes(model, slots)
    return held + layer * 3 // 2 + attention // 2, layer + attention // 4
