r"""The random projections of gradients that a sketch is made of, from their factors.

Replicate r of a matrix's gradient G = Σ_t δ_t a_tᵀ becomes S_rᵀ G Q_r with signs S, Q ∈ {±1/√p}:

    Σ_t (S_rᵀ δ_t) (Q_rᵀ a_t)ᵀ,    or    S_rᵀ (G ⊙ √P) Q_r

in a preconditioner's metric, where G is formed, some outputs at a time. All signs are drawn once, a
bit each, and unpacked a block of rows at a time; a row of them is drawn from a key of its own, so
that it is the same whatever else is drawn.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.kernels.gram import Factors, Path, is_ids, parameters_of
from jaxdyn.kernels.layers import product, wide_dtype
from jaxdyn.kernels.memory import evenly
from jaxdyn.types import Params, View

SIGN_ROWS = 4096
"""Rows of a sign matrix that are drawn at a time, at most."""

_FORMED = 2**24
"""Bytes of the gradients that are formed at a time in a preconditioner's metric."""


Sides = tuple[jax.Array, jax.Array]
"""The bits of S and of Q, [L, rows, words] each; L is 1 outside the scanned layers."""


class Signs(NamedTuple):
    """The signs of a model's projections, 32 of a row to a word."""

    matrices: dict[Path, Sides]
    layers: Sides  # of the layers' vectors
    rest: Sides  # of the vectors outside them
    head: Sides


@functools.partial(jax.jit, static_argnames=("config", "width"))
def draw_signs(key: jax.Array, view: View, config: Any, width: int) -> Signs:
    """`width` = R p signs for every row and column of the model's matrices; shapes alone are read.

    Every layer has its own, but a tied matrix [V, D] has the same on both of its paths.
    """
    layers = parameters_of(view["backbone"])
    shapes = {
        path: names[name].shape
        for path, names in layers.items()
        for name in ("kernel", "embedding")
        if name in names
    }
    *matrix_keys, layers_key, rest_key, head_key = jax.random.split(key, len(shapes) + 3)
    keys = dict(zip(shapes, matrix_keys, strict=True))

    def vectors(within):
        sizes = [
            names[name].shape
            for path, names in layers.items()
            for name in ("scale", "bias")
            if name in names and (path[0] == "layers") == within
        ]
        return sizes[0][0], *_square(sum(size for _, size in sizes))

    # A dense layer's kernel is [I, O]; a table [V, D] maps its ids' unit vectors.
    sides = lambda path, x: (
        (x[0], x[1], x[2]) if "embedding" in layers[path] else (x[0], x[2], x[1])
    )
    wanted = {path: (keys[path], sides(path, shape)) for path, shape in shapes.items()}
    outputs, inputs = view["classifier"]["weight"].shape
    head_key = keys[("embed",)] if config.tied else head_key
    groups = [
        *wanted.values(),
        (layers_key, vectors(True)),
        (rest_key, vectors(False)),
        (head_key, (1, outputs, inputs + config.classifier_bias)),
    ]
    *matrices, in_layers, rest, head = _drawn(groups, -(-width // 32))
    return Signs(dict(zip(shapes, matrices, strict=True)), in_layers, rest, head)


def _drawn(groups, words: int) -> list[Sides]:
    """Bits of all groups (key, (L, rows of S, rows of Q)), in one draw."""
    numbers = [jnp.arange(count) for _, (count, *_) in groups]
    of_layers = [
        jax.vmap(jax.random.split)(jax.vmap(lambda n, key=key: jax.random.fold_in(key, n))(number))
        for (key, _), number in zip(groups, numbers, strict=True)
    ]
    keys = [layer[:, side] for layer in of_layers for side in (0, 1)]
    counts = [(count, rows) for _, (count, *each) in groups for rows in each]
    every = jnp.concatenate([jnp.repeat(k, n) for k, (_, n) in zip(keys, counts, strict=True)])
    rows = np.concatenate([np.tile(np.arange(n), count) for count, n in counts])
    draw = lambda key, row: jax.random.bits(jax.random.fold_in(key, row), (words,), jnp.uint32)
    bits = jax.vmap(draw)(every, jnp.asarray(rows, jnp.uint32))
    parts = jnp.split(bits, np.cumsum([count * n for count, n in counts])[:-1])
    split = [x.reshape(*size, words) for x, size in zip(parts, counts, strict=True)]
    return list(zip(split[::2], split[1::2], strict=True))


def _square(size: int) -> tuple[int, int]:
    """A layer's vectors are laid out as a matrix of that shape.

    Any is right; a square one has the largest rank, hence the smallest variance.
    """
    high = math.isqrt(size - 1) + 1
    return high, -(-size // high)


def sketch_factors(
    signs: Signs,
    factors: Factors,
    config: Any,
    replicates: int,
    side: int,
    roots: Params | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sketches of N rows through the classifier and through the backbone, each [N, R, p²].

    `roots` is √P, shaped as the view, with which the factors were made.
    """
    width = replicates * side

    def outer(x, y):
        split = lambda z: z.reshape(*z.shape[:2], replicates, side)
        z = product("ntrp,ntrq->nrpq", split(x), split(y))
        return z.reshape(len(z), replicates, side**2) / side

    def matrix(sides, inputs, cotangents, root=None):
        left, right = sides
        if is_ids(inputs):
            rows = unpacked(left[inputs], width, cotangents.dtype)
            return outer(rows, _project(right, cotangents, width))
        if root is not None:
            z = _project_formed(left, right, inputs, cotangents, root, replicates, side)
            return z.reshape(len(z), replicates, side**2) / side
        return outer(_project(left, cotangents, width), _project(right, inputs, width))

    def vector(sides, x):
        n, size = x.shape
        high, wide = _square(size)
        square = jnp.pad(x, ((0, 0), (0, high * wide - size))).reshape(n, high, wide)
        unit = jnp.broadcast_to(jnp.eye(high, dtype=x.dtype), (n, high, high))
        return matrix(sides, square, unit)

    scales = {} if roots is None else parameters_of(roots["backbone"])

    def group(total, within, of_vectors):
        """The total, with what lies within the scanned layers or outside them added."""
        belongs = lambda path: (path[0] == "layers") == within
        inputs = {p: x for p, x in factors.inputs.items() if belongs(p)}
        pairs = {p: (x, factors.cotangents[p][:, :, 0]) for p, x in inputs.items()}
        own_roots = {p: scales[p]["kernel"] for p in pairs if "kernel" in scales.get(p, ())}
        own_signs = {p: signs.matrices[p] for p in pairs}
        vectors = [x for path, x in factors.vectors.items() if belongs(path)]

        def step(total, layer):
            own_signs, of_vectors, pairs, own_roots, gradient = layer
            for path, (inputs, cotangents) in pairs.items():
                total += matrix(own_signs[path], inputs, cotangents, own_roots.get(path))
            return total + vector(of_vectors, gradient), None

        beside = jnp.concatenate(vectors, axis=-1)[:, :, 0]
        return jax.lax.scan(step, total, (own_signs, of_vectors, pairs, own_roots, beside))[0]

    phi, g = factors.features, factors.logit_cotangents[:, 0]
    of_weight = [] if roots is None else [roots["classifier"]["weight"].T]
    if config.classifier_bias:  # a weight of the input 1
        phi = jnp.concatenate([phi, jnp.ones((*phi.shape[:2], 1), phi.dtype)], axis=-1)
        of_weight += [] if roots is None else [roots["classifier"]["bias"][None]]
    root = jnp.concatenate(of_weight) if of_weight else None
    head = matrix(jax.tree.map(lambda x: x[0], signs.head), phi, g, root)
    body = group(jnp.zeros_like(head), True, signs.layers)
    return head, group(body, False, signs.rest)


def unpacked(bits: jax.Array, width: int, dtype) -> jax.Array:
    """Words [..., W] as their first `width` signs, [..., width]."""
    shape = (*bits.shape, 32)
    shifts = jax.lax.broadcasted_iota(jnp.uint32, shape, bits.ndim)
    signs = 1 - 2 * (jnp.broadcast_to(bits[..., None], shape) >> shifts & 1).astype(dtype)
    return signs.reshape(*bits.shape[:-1], -1)[..., :width]


def _project(bits: jax.Array, x: jax.Array, width: int) -> jax.Array:
    """x [N, T, I] times signs [I, width], of which a block of rows is unpacked at a time."""
    high = evenly(x.shape[-1], SIGN_ROWS)

    def block(start, signs):
        return product("nti,iw->ntw", jax.lax.dynamic_slice_in_dim(x, start, high, 2), signs)

    return _over_signs(bits[: x.shape[-1]], high, width, x.dtype, block)


def _over_signs(bits: jax.Array, high: int, width: int, dtype, block) -> jax.Array:
    """Σ block(start, signs) over blocks of `high` rows of a matrix of signs."""
    size = len(bits)

    def one(number):
        # The last block reaches back over rows that have been counted.
        start = jnp.minimum(high * number, size - high)
        signs = unpacked(jax.lax.dynamic_slice_in_dim(bits, start, high), width, dtype)
        rows = start + jnp.arange(high)
        return block(start, jnp.where((rows >= high * number)[:, None], signs, 0))

    if high == size:
        return block(0, unpacked(bits, width, dtype))
    nothing = jnp.zeros_like(jax.eval_shape(one, 0))
    return jax.lax.fori_loop(0, -(-size // high), lambda i, total: total + one(i), nothing)


def _project_formed(left, right, a, d, root, replicates: int, side: int) -> jax.Array:
    """Sᵀ (G ⊙ √P) Q of G = Σ_t δ_t a_tᵀ, [N, R, p, p]; G is formed some outputs at a time.

    The signs are those that `_project` draws; `root` is √P, [I, O].
    """
    inner, outer = root.shape
    width, dtype = replicates * side, wide_dtype(d)
    each = len(a) * (inner + width) * dtype.itemsize
    high = min(outer, max(8, _FORMED // each))
    signs = unpacked(right[:inner], width, dtype)

    def block(start, own):
        part = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, high, axis)
        gradient = product("nto,nti->noi", part(d, 2), a) * part(root, 1).T[None]
        across = product("noi,iw->now", gradient, signs)
        split = lambda x: x.reshape(*x.shape[:-1], replicates, side)
        return product("norq,orp->nrpq", split(across), split(own))

    return _over_signs(left, high, width, dtype, block)
