r"""The trace, exactly: one backward pass for each of the d rows of a factor of WᵀW.

tr(W J J'ᵀ Wᵀ) = tr(R J J'ᵀ Rᵀ) for every R with RᵀR = WᵀW; with the d×d factor R of W = QR it is
Σ_k ⟨Jᵀr_k, J'ᵀr_k⟩ over the d rows of R, the kernel of a model with d outputs. A tied model's
u(s) = Σ_t J_tᵀ W_{id_t} takes T backward passes more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.kernels.execution import Execution
from jaxdyn.kernels.passes import Opened, Pair, Traced, over_passes, wide_weight

_AT_ONCE = 16
"""Rows of R pulled back together, at most: more make the products no faster."""


def exact_traces(given: Traced, execution: Execution) -> dict[str, np.ndarray]:
    """The components' traces by name, [N, M]."""

    def tile_of(many, room, first, workspace):
        fitting = min(_AT_ONCE, room)
        at_once = max(k for k in range(1, fitting + 1) if many % k == 0)
        options = {"at_once": at_once, "first": first, "workspace": workspace}
        return functools.partial(exact_tile, given.model, **options)

    def add(found, done, more, many):
        return {**found, **{name: found[name] + more[name] for name in ("gradient", "cross")}}

    factor = metric_rows(given.view["classifier"]["weight"])
    return over_passes(given, factor, tile_of, add, execution)


@jax.jit
def metric_rows(weight: jax.Array) -> jax.Array:
    """R [min(V, D), D] with RᵀR = WᵀW, padded with zero rows to [D, D]."""
    r = jnp.linalg.qr(wide_weight(weight), mode="r")
    return jnp.pad(r, ((0, weight.shape[1] - r.shape[0]), (0, 0)))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("at_once", "first", "workspace"))
def exact_tile(model, operands, rows, columns, *, at_once: int, first: bool, workspace: int):
    """Sums over rows of R, [N, 1, M, 1]; the cross component is in the `first` group's."""
    view, roots, factor = operands
    pair = Pair(model, view, roots, rows, columns, workspace)
    representation = pair.representation()
    nothing = jnp.zeros_like(representation)
    step = lambda total, block: (total + pair.gradient(block)[0], None)
    blocks = factor.reshape(-1, at_once, factor.shape[1])
    gradient, cross = jax.lax.scan(step, nothing, blocks)[0], nothing
    if model.config.tied and first:
        u = _own_embeddings(pair.left)
        cross = pair.cross(u, u if pair.alike else _own_embeddings(pair.right))
    found = {"representation": representation, "gradient": gradient, "cross": cross}
    return {name: x[:, None, :, None] for name, x in found.items()}


def _own_embeddings(sites: Opened) -> jax.Array:
    """u = Σ_t P_{id_t} J_tᵀ W_{id_t}, [N, D]."""

    def step(total, slot):
        ids = sites.tokens[:, slot]
        start = sites.still.at[sites.at].set(sites.weight[ids].astype(sites.still.dtype))
        back = sites.pull(start)["embed"][:, slot]
        return total + sites.weighted(back.astype(total.dtype), ids, 2), None

    start = jnp.zeros(sites.phi.shape, jnp.promote_types(sites.phi.dtype, jnp.float32))
    return jax.lax.scan(step, start, jnp.arange(sites.tokens.shape[1]))[0]
