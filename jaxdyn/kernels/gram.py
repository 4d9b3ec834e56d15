r"""The Gram engine: one forward and one backward pass, then inner products layer by layer.

A row's gradient is never formed as a whole. `factorize` runs the model once and pulls the logit
cotangents g back once; of every matrix it keeps what the layer read (a) and the cotangent of what
it wrote (δ), and of every vector (norm scales, biases) the gradient, which is small. `contract`
turns two sets of factors into kernels: the classifier's is that of a dense layer with input φ and
output cotangent g, the body's are those of `layers`, and a tied matrix adds the products of its
two roles.

In a preconditioner's metric P gradients are taken in the coordinates θ/√P, that is, multiplied by
`roots` = √P: where a gradient is a product of two factors, when it is formed; elsewhere at once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxdyn.kernels import layers
from jaxdyn.kernels.memory import attention_bytes, nbytes, shapes_of_a_slot
from jaxdyn.kernels.parts import kind_of
from jaxdyn.kernels.rows import Rows, logit_cotangents
from jaxdyn.types import Model, Params, View

Path = tuple[str, ...]


class Factors(NamedTuple):
    """What N rows' gradients are made of; every layer has a leading axis, L or 1."""

    inputs: dict[Path, jax.Array]  # of a matrix: a [L, N, T, I], or of a table: ids [L, N, T]
    cotangents: dict[Path, jax.Array]  # of the same: δ [L, N, K, T, O]
    vectors: dict[Path, jax.Array]  # gradients of a layer's vectors, side by side, [L, N, K, P]
    features: Any  # φ at the slots that count, [N, S, D]
    logit_cotangents: Any  # g, [N, K, S, V]


def parameters_of(backbone: Params) -> dict[Path, dict[str, jax.Array]]:
    """{layer: {name: array}}, each array with a leading layer axis, L or 1."""
    found: dict[Path, dict[str, jax.Array]] = {}
    for path, x in flatten_dict(backbone).items():
        found.setdefault(path[:-1], {})[path[-1]] = x if path[0] == "layers" else x[None]
    return dict(sorted(found.items()))


def is_ids(inputs: jax.Array) -> bool:
    """Whether a layer's input are rows of its table rather than numbers."""
    return jnp.issubdtype(inputs.dtype, jnp.integer)


def stacked(tree: Params) -> dict[Path, jax.Array]:
    """{layer: array}, each with a leading layer axis."""
    return {path: x if path[0] == "layers" else x[None] for path, x in flatten_dict(tree).items()}


def pulled(pull: Callable, starts: jax.Array) -> dict[Path, jax.Array]:
    """Cotangents {layer: [L, N, K, T, O]} of K functions, from theirs of φ, [K, N, T, D]."""
    if len(starts) == 1:  # no axis is mapped over: XLA on a CPU moves one by copying
        return {path: x[:, :, None] for path, x in stacked(pull(starts[0])).items()}
    return {
        path: jnp.moveaxis(x, 0, 2) if path[0] == "layers" else jnp.moveaxis(x, 0, 1)[None]
        for path, x in flatten_dict(jax.vmap(pull)(starts)).items()
    }


def factors_of(
    backbone: Params,
    inputs: dict[Path, jax.Array],
    cotangents: dict[Path, jax.Array],
    roots: Params | None,
) -> Factors:
    """The body's factors from every layer's inputs and output cotangents."""
    matrices: dict[Path, tuple[jax.Array, jax.Array]] = {}
    vectors: dict[Path, jax.Array] = {}
    scales = None if roots is None else parameters_of(roots)
    for path, names in parameters_of(backbone).items():
        a, d = inputs[path], cotangents[path]
        root = {} if scales is None else scales[path]
        if "embedding" in names:
            if root:
                d = d * jax.vmap(lambda table, ids: table[ids])(root["embedding"], a)[:, :, None]
            matrices[path] = a, d
        if "kernel" in names:
            matrices[path] = a, d
        found = []
        if "scale" in names:
            found.append(layers.scale_gradient(a, d))
        if "bias" in names:
            found.append(layers.bias_gradient(d))
        if found and root:
            across = [root[name] for name in ("scale", "bias") if name in names]
            found = [x * r[:, None, None] for x, r in zip(found, across, strict=True)]
        if found:
            vectors[path] = jnp.concatenate(found, axis=-1)
    left, right = ({path: pair[i] for path, pair in matrices.items()} for i in (0, 1))
    return Factors(left, right, vectors, None, None)


@functools.partial(jax.jit, static_argnums=0)
def factorize(model: Model, view: View, roots: Params | None, rows: Rows) -> Factors:
    """One forward pass of N rows and K backward passes; `roots` is √P, shaped as the view."""
    phi, inputs, pull = model.opened(view["backbone"], rows.tokens, rows.mask)
    features, g, cotangents = pulled_back(model, view, rows, phi, pull)
    body_roots = None if roots is None else roots["backbone"]
    body = factors_of(view["backbone"], stacked(inputs), cotangents, body_roots)
    return body._replace(features=features, logit_cotangents=g)


def pulled_back(model: Model, view: View, rows: Rows, phi: jax.Array, pull: Callable) -> tuple:
    """φ at the slots that count, the logits' cotangents, and those of all outputs."""
    at = (jnp.arange(len(phi))[:, None], rows.positions)
    g = jax.vmap(logit_cotangents)(rows, model.logits(view["classifier"], phi[at]))
    # One axis of rows: else XLA on a CPU transposes all of g first.
    back = g.reshape(-1, g.shape[-1]) @ view["classifier"]["weight"].astype(g.dtype)
    start = jnp.zeros((g.shape[1], *phi.shape), g.dtype)
    back = back.reshape(*g.shape[:-1], -1).swapaxes(0, 1)
    start = start.at[:, at[0], at[1]].add(back).astype(phi.dtype)
    return phi[at], g, pulled(pull, start)


def row_bytes(model: Model, slots: int, counted: int, outputs: int) -> tuple[int, int]:
    """What the factors of a row hold, and what making them needs beside that.

    The backward pass keeps the layers' outputs, as many bytes as their cotangents, and what norms
    read and are pulled back to: by XLA's own account of GPT-NeoX and Llama (CPU, 8 layers) 0.84 to
    1.07 of what is held, and at long contexts attention's.

    Args:
      slots: T.
      counted: S, the slots whose logits count.
      outputs: K.
    """
    inputs, cotangents, vectors, features, g = map(nbytes, smallest_factors(model))
    held = slots * (inputs + outputs * cotangents) + outputs * vectors
    held += counted * (features + outputs * g)
    return held, held + held // 10 + outputs * attention_bytes(model, slots)


@functools.lru_cache
def smallest_factors(model: Model) -> Factors:
    """The shapes of a row's factors with one function of one slot."""

    def factors(backbone, phi, inputs, cotangents, logits):
        several = pulled(lambda _: cotangents, phi[None])
        body = factors_of(backbone, stacked(inputs), several, None)
        return body._replace(features=phi, logit_cotangents=logits[:, None])

    return jax.eval_shape(factors, *shapes_of_a_slot(model))


def body_kernels(
    rows: Factors, columns: Factors | None, roots: Params | None, sizes: Any, workspace: int
) -> dict[str, jax.Array]:
    """Σ over a layer's parameters of the gradients' inner products, {kind: [L, N, K, M, J]}.

    Args:
      roots: √P of the body, or None.
      sizes: the body's own shapes, for the number of rows in a table.
    """
    scales = {} if roots is None else parameters_of(roots)
    shapes = parameters_of(sizes)
    kernels: dict[str, list] = {}

    def add(path, kernel, rows, columns, root=None, **options):
        operands = {"rows": rows, "columns": columns, **({} if root is None else {"root": root})}
        kernels.setdefault(kind_of(path), []).append(_by_layer(kernel, operands, **options))

    for path in rows.inputs:
        layer = lambda f, path=path: None if f is None else (f.inputs[path], f.cotangents[path])
        both = layer(rows), layer(columns)
        if is_ids(rows.inputs[path]):
            size = shapes[path]["embedding"].shape[1]
            add(path, layers.embedding, *both, size=size, workspace=workspace)
        else:
            root = scales[path]["kernel"] if scales else None
            add(path, layers.dense, *both, root, workspace=workspace)
    for path, gradients in rows.vectors.items():
        add(path, layers.pairwise, gradients, None if columns is None else columns.vectors[path])
    return {kind: sum(each) for kind, each in kernels.items()}


@functools.partial(jax.jit, static_argnames=("kernel", "size", "workspace"))
def _by_layer(kernel, operands: dict, **options) -> jax.Array:
    """Every layer's kernel. A program of its own, so that layers of one shape are traced once."""
    return jax.lax.map(lambda layer: kernel(**layer, **options), operands)


@functools.partial(jax.jit, static_argnames=("tied", "biased", "workspace"))
def contract(
    view: View,
    roots: Params | None,
    rows: Factors,
    columns: Factors | None,
    *,
    tied: bool,
    biased: bool,
    workspace: int,
) -> dict[str, jax.Array]:
    """Kernels by name: representation and cross [N, K, M, J], each kind [L, N, K, M, J].

    `columns=None` means the rows themselves; of the view only the shapes are read.
    """
    head_roots = None if roots is None else roots["classifier"]
    representation = head_kernel(rows, columns, head_roots, biased, workspace)
    crossed = jnp.zeros_like(representation)
    if tied:
        crossed = cross_kernel(rows, columns, head_roots, workspace)
    body_roots = None if roots is None else roots["backbone"]
    body = body_kernels(rows, columns, body_roots, view["backbone"], workspace)
    return {"representation": representation, "cross": crossed, **body}


def head_kernel(rows, columns, roots, biased, workspace):
    """The classifier's kernel: a dense layer from φ to the logits, whose cotangents are g."""
    head = lambda f: None if f is None else (f.features, f.logit_cotangents)
    root = None if roots is None else roots["weight"].T
    kernel = layers.dense(head(rows), head(columns), workspace, root)
    if biased:
        scale = 1 if roots is None else roots["bias"][None, None]
        gradient = lambda f: scale * layers.bias_gradient(f.logit_cotangents)
        kernel += layers.pairwise(gradient(rows), None if columns is None else gradient(columns))
    return kernel


def cross_kernel(rows, columns, roots, workspace):
    """A tied matrix's products of the gradient through one role with that through the other."""
    head = lambda f: (f.features, f.logit_cotangents)

    def table(f):
        ids, d = f.inputs[("embed",)][0], f.cotangents[("embed",)][0]
        return ids, d if roots is None else d * roots["weight"][ids][:, None]

    other = rows if columns is None else columns
    there = layers.cross(head(rows), table(other), workspace)
    back = there if columns is None else layers.cross(head(other), table(rows), workspace)
    return there + back.transpose(2, 3, 0, 1)
