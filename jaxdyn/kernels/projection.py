r"""The random projections of gradients that a sketch is made of, from their factors.

Replicate r of a matrix's gradient G = Σ_t δ_t a_tᵀ becomes S_rᵀ G Q_r with signs S, Q ∈ {±1/√p}:

    Σ_t (S_rᵀ δ_t) (Q_rᵀ a_t)ᵀ,    or    S_rᵀ (G ⊙ √P) Q_r

in a preconditioner's metric, where G is formed, some outputs at a time. A row of signs is drawn
from a key of its own, so that it is the same whatever else is drawn.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdyn.kernels.gram import Factors, is_ids, parameters_of
from jaxdyn.kernels.layers import product, wide_dtype
from jaxdyn.kernels.memory import evenly
from jaxdyn.types import Params

SIGN_ROWS = 4096
"""Rows of a sign matrix that are drawn at a time, at most."""

_FORMED = 2**24
"""Bytes of the gradients that are formed at a time in a preconditioner's metric."""


def sketch_factors(
    key: jax.Array,
    factors: Factors,
    config: Any,
    replicates: int,
    side: int,
    roots: Params | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sketches of N rows through the classifier and through the backbone, each [N, R, p²].

    Every layer has its own signs, but a tied matrix [V, D] has the same on both of its paths.
    `roots` is √P, shaped as the view, with which the factors were made.
    """
    width = replicates * side

    def outer(x, y):
        split = lambda z: z.reshape(*z.shape[:2], replicates, side)
        z = product("ntrp,ntrq->nrpq", split(x), split(y))
        return z.reshape(len(z), replicates, side**2) / side

    def matrix(key, inputs, cotangents, root=None):
        left, right = jax.random.split(key)
        if is_ids(inputs):
            rows = _signs(left, inputs, width, cotangents.dtype)
            return outer(rows, _project(right, cotangents, width))
        if root is not None:
            z = _project_formed(left, right, inputs, cotangents, root, replicates, side)
            return z.reshape(len(z), replicates, side**2) / side
        return outer(_project(left, cotangents, width), _project(right, inputs, width))

    def vector(key, x):
        """Any layout is right; a square one has the largest rank, hence the smallest variance."""
        n, size = x.shape
        high = math.isqrt(size - 1) + 1
        wide = -(-size // high)
        square = jnp.pad(x, ((0, 0), (0, high * wide - size))).reshape(n, high, wide)
        unit = jnp.broadcast_to(jnp.eye(high, dtype=x.dtype), (n, high, high))
        return matrix(key, square, unit)

    paths = sorted(factors.inputs)
    *matrix_keys, layers_key, rest_key, head_key = jax.random.split(key, len(paths) + 3)
    keys = dict(zip(paths, matrix_keys, strict=True))
    scales = {} if roots is None else parameters_of(roots["backbone"])

    def group(total, within, vector_key):
        """The total, with what lies within the scanned layers or outside them added."""
        belongs = lambda path: (path[0] == "layers") == within
        pairs = {p: (factors.inputs[p], factors.cotangents[p]) for p in paths if belongs(p)}
        own_roots = {p: scales[p]["kernel"] for p in pairs if "kernel" in scales.get(p, ())}
        vectors = [x for path, x in factors.vectors.items() if belongs(path)]

        def step(total, layer):
            number, pairs, own_roots, gradient = layer
            for path, (inputs, cotangents) in pairs.items():
                own_key = jax.random.fold_in(keys[path], number)
                total += matrix(own_key, inputs, cotangents[:, 0], own_roots.get(path))
            return total + vector(jax.random.fold_in(vector_key, number), gradient[:, 0]), None

        many = jnp.arange(len(vectors[0]))
        operands = (many, pairs, own_roots, jnp.concatenate(vectors, axis=-1))
        return jax.lax.scan(step, total, operands)[0]

    phi, g = factors.features, factors.logit_cotangents[:, 0]
    of_weight = [] if roots is None else [roots["classifier"]["weight"].T]
    if config.classifier_bias:  # a weight of the input 1
        phi = jnp.concatenate([phi, jnp.ones((*phi.shape[:2], 1), phi.dtype)], axis=-1)
        of_weight += [] if roots is None else [roots["classifier"]["bias"][None]]
    root = jnp.concatenate(of_weight) if of_weight else None
    head_key = keys[("embed",)] if config.tied else head_key
    head = matrix(jax.random.fold_in(head_key, 0), phi, g, root)
    return head, group(group(jnp.zeros_like(head), True, layers_key), False, rest_key)


def _signs(key: jax.Array, rows: jax.Array, width: int, dtype) -> jax.Array:
    """Rows of a matrix of signs, [*rows.shape, width]; a row is the same whatever the others."""
    words = -(-width // 32)
    draw = lambda row: jax.random.bits(jax.random.fold_in(key, row), (words,), jnp.uint32)
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None]
    bits = jax.vmap(draw)(rows.reshape(-1))[:, :, None] >> shifts
    signs = 1 - 2 * (bits & 1).astype(dtype)
    return signs.reshape(-1, 32 * words)[:, :width].reshape(*rows.shape, width)


def _project(key: jax.Array, x: jax.Array, width: int) -> jax.Array:
    """x [N, T, I] times signs [I, width], of which a block of rows is drawn at a time."""
    size = x.shape[-1]
    high = evenly(size, SIGN_ROWS)

    def block(start, signs):
        return product("nti,iw->ntw", jax.lax.dynamic_slice_in_dim(x, start, high, 2), signs)

    return _over_signs(key, size, high, width, x.dtype, block)


def _over_signs(key: jax.Array, size: int, high: int, width: int, dtype, block) -> jax.Array:
    """Σ block(start, signs) over blocks of `high` of the `size` rows of a matrix of signs."""

    def one(number):
        # The last block reaches back over rows that have been counted.
        start = jnp.minimum(high * number, size - high)
        rows = start + jnp.arange(high)
        signs = _signs(key, rows, width, dtype)
        return block(start, jnp.where((rows >= high * number)[:, None], signs, 0))

    if high == size:
        return one(0)
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
    signs = _signs(right, jnp.arange(inner), width, dtype)

    def block(start, own):
        part = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, high, axis)
        gradient = product("nto,nti->noi", part(d, 2), a) * part(root, 1).T[None]
        across = product("noi,iw->now", gradient, signs)
        split = lambda x: x.reshape(*x.shape[:-1], replicates, side)
        return product("norq,orp->nrpq", split(across), split(own))

    return _over_signs(left, outer, high, width, dtype, block)
