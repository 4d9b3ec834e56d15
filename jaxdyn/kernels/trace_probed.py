r"""The trace, estimated: one backward pass for each of m random probes.

For signs ε ∈ {±1}^V, E[⟨JᵀWᵀε, J'ᵀWᵀε⟩] = tr(W J J'ᵀ Wᵀ) (Hutchinson 1990), and the mean over m
independent draws has the standard error of a mean. Of a tied model a probe's own pass gives
Σ_t ε_{id_t} J_tᵀ Wᵀ ε, whose expectation is u(s) = Σ_t J_tᵀ W_{id_t}.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.kernels.execution import Execution
from jaxdyn.kernels.gram import Factors
from jaxdyn.kernels.passes import Opened, Pair, Traced, over_passes, wide_weight


def probed_traces(
    given: Traced, key: jax.Array, count: int, execution: Execution
) -> dict[str, np.ndarray]:
    """The components' traces by name, [N, M], and the total's "variance" (of the mean)."""
    probes = draw_probes(key, count, given.view["classifier"]["weight"])
    # One probe at a time: each is a sample, and the spread of the samples is the error.
    tile_of = lambda many, room, first, workspace: functools.partial(
        probed_tile, given.model, workspace=workspace
    )
    found = over_passes(given, probes, tile_of, _merge, execution)
    found["variance"] = found.pop("spread") / (count * (count - 1))
    return found


@functools.partial(jax.jit, static_argnums=1)
def draw_probes(key: jax.Array, count: int, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Wᵀε [m, D] of m draws of V signs, and the signs ε [m, V]."""
    wide = wide_weight(weight)
    signs = jax.random.rademacher(key, (count, weight.shape[0]), wide.dtype)
    return jnp.matmul(signs, wide, precision="highest"), signs


@functools.partial(jax.jit, static_argnums=0, static_argnames="workspace")
def probed_tile(model, operands, rows, columns, *, workspace: int) -> dict[str, jax.Array]:
    """Means over probes, [N, 1, M, 1], and the total's sum of squared deviations ("spread")."""
    view, roots, probes = operands
    pair = Pair(model, view, roots, rows, columns, workspace)
    representation = pair.representation()
    nothing = jnp.zeros_like(representation)

    def probe(carry, drawn):
        count, gradient, cross, spread = carry
        start, signs = drawn
        own, mine, other = pair.gradient(start[None])
        crossed = nothing
        if model.config.tied:
            u = _signed_embeddings(pair.left, mine, signs)
            crossed = pair.cross(u, _signed_embeddings(pair.right, other, signs))
        # Welford's running mean and sum of squared deviations.
        count = count + 1
        step = own + crossed - gradient - cross
        gradient, cross = gradient + (own - gradient) / count, cross + (crossed - cross) / count
        spread = spread + step * (own + crossed - gradient - cross)
        return (count, gradient, cross, spread), None

    start = (jnp.zeros((), pair.wide), nothing, nothing, nothing)
    (_, gradient, cross, spread), _ = jax.lax.scan(probe, start, probes)
    parts = {"representation": representation, "gradient": gradient, "cross": cross}
    found = {**parts, "spread": spread}
    return {name: x[:, None, :, None] for name, x in found.items()}


def _merge(found: dict, done: int, more: dict, many: int) -> dict:
    """Means over `done` and `many` probes, and their spreads, combined."""
    share = many / (done + many)
    shift = {name: more[name] - found[name] for name in ("gradient", "cross")}
    apart = (shift["gradient"] + shift["cross"]) ** 2 * done * share
    means = {name: found[name] + share * x for name, x in shift.items()}
    return {**found, **means, "spread": found["spread"] + more["spread"] + apart}


def _signed_embeddings(sites: Opened, factors: Factors, signs: jax.Array) -> jax.Array:
    """Σ_t ε_{id_t} P_{id_t} J_tᵀ Wᵀε of one probe, [N, D], from its factors (√P is in them)."""
    back = factors.cotangents[("embed",)][0][:, 0].astype(signs.dtype)
    weighted = sites.weighted(back, sites.tokens, 1)
    return jnp.sum(signs[sites.tokens][..., None] * weighted, axis=1)
