r"""The kernel's largest eigenvalues and their vector fields, from products Θ v alone.

Θ of N sites is an NV × NV matrix, symmetric and (its total) positive semi-definite. Lanczos'
method with implicit restarts (Lehoucq, Sorensen and Yang 1998, ARPACK) needs it only as an
operator. An eigenfield is the first-order change of the logits that reproduces itself under a
gradient step along it, λ times as large: what the network learns fastest.

With one cotangent g_i a site it is the scalar kernel K_ij = g_iᵀ Θ_ij g_j instead, N × N.

Of a repeated eigenvalue Lanczos finds one vector, and further ones only by rounding. Fields with
Wᵀ v_i = 0 are moved by the representation component alone, which is blind to the token: where
V > D, an untied model's total has every eigenvalue of ⟨φ, φ'⟩ at least V − D times. On the other
fields it is larger than that component by a positive semi-definite one, so D eigenvalues or more
come before the first that must repeat.
"""

import functools
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy.sparse import linalg

from jaxdyn.kernels.execution import Execution
from jaxdyn.kernels.operator import Batches, apply, batches_of
from jaxdyn.kernels.preconditioner import roots_of
from jaxdyn.types import COMPONENTS, JaxdynError, Model, Params, Sites, View

DEFINITE = ("total", *COMPONENTS[:2])
"""The kernels that are positive semi-definite; the cross component is not."""


@struct.dataclass
class Eigenpairs:
    """k eigenvalues [k], the largest first, and what belongs to them.

    `vectors` are of unit length: fields [k, N, V], or [k, N] of a scalar kernel. `residuals` [k]
    are ‖Θ v − λ v‖ from one more product each: an eigenvalue lies at most so far from λ.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray


def top_eigenpairs(
    model: Model,
    params: Params,
    sites: Sites,
    k: int,
    *,
    cotangents: jax.Array | np.ndarray | None = None,
    component: str = "total",
    preconditioner: Params | None = None,
    tolerance: float = 1e-4,
    max_restarts: int = 100,
    seed: int = 0,
    **execution: Unpack[Execution],
) -> Eigenpairs:
    """The k largest λ with Θ v = λ v over the vector fields v [N, V] at the sites.

    Host memory is that of max(2k + 1, 20) vectors; every restart takes about that many products,
    less k.

    Args:
      model, params, sites, preconditioner, execution: see `apply_kernel`.
      k: how many, from 1 to the dimension less one.
      cotangents: g [N, V]: take the scalar kernel g_iᵀ Θ_ij g_j, of dimension N, instead.
      component: "total", "representation" or "gradient". The representation component alone repeats
        each eigenvalue of ⟨φ, φ'⟩ V times, so it needs cotangents.
      tolerance: stop where Lanczos' own bound of the residual is below tolerance · λ.
      max_restarts: give up after so many.
      seed: of the start vector.

    Raises:
      JaxdynError: as `apply_kernel`; if k, the component, the cotangents' shape or the tolerance
        cannot be; if fewer than k converge; or if the kernel is zero.
    """
    vocab = model.config.vocab_size
    rows = batches_of(model, sites, "sites", execution)
    count = len(rows.places)
    if cotangents is not None and np.shape(cotangents) != (count, vocab):
        raise JaxdynError(
            f"cotangents must be [N, V] = {(count, vocab)}, got {np.shape(cotangents)}"
        )
    shape = (count, vocab) if cotangents is None else (count,)
    size = int(np.prod(shape))
    if not 1 <= k < size:
        raise JaxdynError(f"k must be from 1 to {size - 1}, the dimension less one, got {k}")
    if component not in DEFINITE:
        raise JaxdynError(f"component must be one of {', '.join(DEFINITE)}, got {component!r}")
    if component == "representation" and cotangents is None:
        raise JaxdynError(
            "the representation component repeats each eigenvalue of ⟨φ, φ'⟩ over the vocabulary; "
            "take the spectrum of trace_kernel(mean=True)'s, or give cotangents"
        )
    if not 0 < tolerance < 1:
        raise JaxdynError(f"tolerance must be between 0 and 1, got {tolerance}")
    if max_restarts < 1:
        raise JaxdynError(f"max_restarts must be at least 1, got {max_restarts}")

    view, roots = model.view(params), roots_of(model, params, preconditioner)
    rows, given = jax.device_put((rows, cotangents))

    def multiply(x: np.ndarray) -> np.ndarray:
        x = x.reshape(shape)
        return np.asarray(_product(model, view, roots, rows, given, x, component)).ravel()

    dtype = np.dtype(jnp.promote_types(model.dtype, jnp.float32))
    start = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    theta = linalg.LinearOperator((size, size), matvec=multiply, dtype=dtype)
    try:
        values, vectors = linalg.eigsh(
            theta, k, which="LA", v0=start, tol=tolerance, maxiter=max_restarts
        )
    except linalg.ArpackNoConvergence as error:
        raise JaxdynError(
            f"{len(error.eigenvalues)} of {k} eigenvalues converged to {tolerance} in "
            f"{max_restarts} restarts; raise tolerance or max_restarts"
        ) from None
    except linalg.ArpackError as error:
        raise JaxdynError(f"the kernel must be finite and not zero; Lanczos met {error}") from None
    order = np.argsort(-values)
    values, vectors = values[order], vectors[:, order].T
    products = np.stack([multiply(v) for v in vectors])
    residuals = np.linalg.norm(products - values[:, None] * vectors, axis=1)
    return Eigenpairs(values, vectors.reshape(k, *shape), residuals)


@functools.partial(jax.jit, static_argnames=("model", "component"))
def _product(
    model: Model,
    view: View,
    roots: Params | None,
    rows: Batches,
    cotangents: jax.Array | None,
    x: jax.Array,
    component: str,
) -> jax.Array:
    """Θ v of a field v [N, V], or K c of one number c [N] a cotangent."""
    field = x if cotangents is None else x[:, None] * cotangents
    moved = getattr(apply(model, view, roots, rows, None, field), component)
    return moved if cotangents is None else jnp.sum(cotangents * moved, axis=1)
