"""What a kernel matrix says: its spectrum, its likeness to another, its parts, its signs.

Pure functions of arrays, each a program. Everything is computed in float32 or better, whatever
comes in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from jaxdyn.types import Components, JaxdynError

# -- the spectrum ---------------------------------------------------------------------------------


@jax.jit
def spectrum(kernel: Float[Array, "N N"]) -> Float[Array, " N"]:
    """Eigenvalues of (K + Kᵀ) / 2, the largest first.

    Raises:
        JaxdynError: the kernel is not square.
    """
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise JaxdynError(f"a spectrum needs a square kernel, got shape {kernel.shape}")
    kernel = _wide(kernel)
    return jnp.linalg.eigvalsh((kernel + kernel.T) / 2)[::-1]


@jax.jit
def effective_rank(eigenvalues: Float[Array, " N"]) -> Float[Array, ""]:
    """exp H(p) with p_i = |λ_i| / Σ|λ| and H the entropy: between 1 and N.

    N equal eigenvalues give N, one alone gives 1; eigenvalues all zero give NaN. For a symmetric
    kernel |λ_i| are the singular values of Roy and Vetterli, *The effective rank* (2007), eq. 1-3.
    """
    sizes = jnp.abs(_wide(eigenvalues))
    shares = sizes / jnp.sum(sizes)
    return jnp.exp(-jnp.sum(xlogy(shares, shares)))


@jax.jit
def participation_ratio(eigenvalues: Float[Array, " N"]) -> Float[Array, ""]:
    """(Σ|λ|)² / Σλ²: between 1 and N, and never above the effective rank.

    Eigenvalues all zero give NaN. It is the exponential of the Rényi entropy of order 2 where
    `effective_rank` is that of order 1.
    """
    sizes = jnp.abs(_wide(eigenvalues))
    shares = sizes / jnp.sum(sizes)
    return 1 / jnp.sum(shares**2)


# -- two kernels ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="centred")
def alignment(
    kernel: Float[Array, "N M"], target: Float[Array, "N M"], *, centred: bool = True
) -> Float[Array, ""]:
    """Kernel-target alignment ⟨K, T⟩ / (‖K‖ ‖T‖) in the Frobenius inner product.

    With `centred`, K and T are replaced by H K H and H T H, H = I - 11ᵀ/N: a constant added to
    every pair then changes nothing. For labels or a direction y [N] or [N, C] the target is yyᵀ.
    A zero kernel (after centring) gives NaN.

    Source: Cristianini, Shawe-Taylor, Elisseeff, Kandola, *On kernel-target alignment* (2001),
    def. 1, uncentred; Cortes, Mohri, Rostamizadeh, *Algorithms for learning kernels based on
    centered alignment* (2012), def. 4, centred.

    Raises:
        JaxdynError: the two differ in shape.
    """
    _same_shape(kernel, target)
    kernel, target = _wide(kernel), _wide(target)
    if centred:
        kernel, target = _centre(kernel), _centre(target)
    return _inner(_unit(kernel), _unit(target))


@jax.jit
def kernel_distance(a: Float[Array, "N M"], b: Float[Array, "N M"]) -> Float[Array, ""]:
    """1 - ⟨A, B⟩ / (‖A‖ ‖B‖): 0 for kernels equal up to a positive factor.

    Computed as ½‖A/‖A‖ - B/‖B‖‖², the same number without the cancellation, so that kernels a
    step apart can be told from equal ones. A zero kernel gives NaN.

    Source: Fort et al., *Deep learning versus kernel learning* (2020), section 4.

    Raises:
        JaxdynError: the two differ in shape.
    """
    _same_shape(a, b)
    difference = _unit(_wide(a)) - _unit(_wide(b))
    return _inner(difference, difference) / 2


@jax.jit
def debiased_hsic(gram: Float[Array, "N N"], other: Float[Array, "N N"]) -> Float[Array, ""]:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion, from N ≥ 4 samples.

    With K̃, L̃ the Gram matrices without their diagonals,

        (tr K̃L̃ + (1ᵀK̃1)(1ᵀL̃1) / ((N − 1)(N − 2)) − 2/(N − 2) 1ᵀK̃L̃1) / (N (N − 3)),

    zero in expectation where the two sets of features are independent. It is computed as the inner
    product of the two matrices centred off the diagonal, the same number without the cancellation.

    Source: Song et al., *Feature selection via dependence maximization* (2012), eq. 5; Székely and
    Rizzo, *Partial distance correlation* (2014), def. 2, U-centring.

    Raises:
        JaxdynError: the two differ in shape, are not square, or hold fewer than four samples.
    """
    _same_shape(gram, other)
    count = len(gram)
    if gram.shape != (count, count) or count < 4:
        raise JaxdynError(
            f"a debiased CKA needs square matrices of 4 sites or more, got {gram.shape}"
        )
    return _inner(_centre_off(gram), _centre_off(other)) / (count * (count - 3))


@jax.jit
def debiased_cka(gram: Float[Array, "N N"], other: Float[Array, "N N"]) -> Float[Array, ""]:
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with `debiased_hsic`: likeness of features of N sites.

    1 for features equal up to a rotation, a scale and a shift; near 0 for independent ones, which
    the plain CKA calls alike wherever there are more dimensions than sites. It may fall below 0;
    features that do not vary give NaN.

    Source: Kornblith et al., *Similarity of neural network representations revisited* (2019), eq.
    4, the CKA; Murphy, Zylberberg, Fyshe, *Correcting biased centered kernel alignment measures in
    biological and artificial neural networks* (2024), debiased.

    Raises:
        JaxdynError: as `debiased_hsic`.
    """
    unit = lambda x: _wide(x) / jnp.max(jnp.abs(x))  # keeps the squares in float32's range
    gram, other = unit(gram), unit(other)
    norms = debiased_hsic(gram, gram) * debiased_hsic(other, other)
    return debiased_hsic(gram, other) / jnp.sqrt(norms)


# -- the parts ------------------------------------------------------------------------------------


@jax.jit
def component_shares(components: Components) -> Components:
    """⟨part, total⟩ / ⟨total, total⟩ of each part: scalars that sum to 1.

    A share is a part's projection on the whole: negative where the part opposes it, above 1 where
    the others do. A zero total gives NaN.
    """
    components = jax.tree.map(_wide, components)
    return jax.tree.map(lambda part: share(part, components.total), components)


@jax.jit
def share(part: Float[Array, "*N"], total: Float[Array, "*N"]) -> Float[Array, ""]:
    """⟨part, total⟩ / ⟨total, total⟩ over all entries."""
    part, total = _wide(part), _wide(total)
    scale = jnp.max(jnp.abs(total))  # keeps the squares inside the range of float32
    unit = total / scale
    return _inner(part / scale, unit) / _inner(unit, unit)


# -- signs of inner products ----------------------------------------------------------------------

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@struct.dataclass
class InnerProducts:
    """Inner products ⟨φ_i, φ_j⟩ and cosines over the pairs i < j: scalars.

    All pairs are strictly positive where `min` > 0, or `negative_share + zero_share` = 0.
    `cosine_quantiles` [5] are at `QUANTILES`.
    """

    negative_share: Float[Array, ""]
    zero_share: Float[Array, ""]
    min: Float[Array, ""]
    mean: Float[Array, ""]
    cosine_min: Float[Array, ""]
    cosine_mean: Float[Array, ""]
    cosine_quantiles: Float[Array, " Q"]


@jax.jit
def inner_products(gram: Float[Array, "N N"]) -> InnerProducts:
    """Sign and size of the inner products in a Gram matrix G_ij = ⟨φ_i, φ_j⟩, G_ii left out.

    G is the representation component of the trace kernel (or Φ Φᵀ); the cosine of a pair is
    G_ij / √(G_ii G_jj). A site with a zero feature makes its cosines, and so their statistics,
    NaN. The signs decide whether an update at one site is copied to another or reversed there
    (theory: the representation component).

    Raises:
        JaxdynError: the matrix is not square, or holds fewer than two sites.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] < 2:
        raise JaxdynError(
            f"inner products need a square Gram matrix of 2 sites or more, got {gram.shape}"
        )
    gram = _wide(gram)
    rows, columns = np.triu_indices(gram.shape[0], k=1)
    pairs = gram[rows, columns]
    norms = jnp.sqrt(jnp.diagonal(gram))
    cosines = pairs / norms[rows] / norms[columns]
    return InnerProducts(
        negative_share=jnp.mean(pairs < 0),
        zero_share=jnp.mean(pairs == 0),
        min=jnp.min(pairs),
        mean=jnp.mean(pairs),
        cosine_min=jnp.min(cosines),
        cosine_mean=jnp.mean(cosines),
        cosine_quantiles=jnp.quantile(cosines, jnp.asarray(QUANTILES, cosines.dtype)),
    )


# -- arithmetic -----------------------------------------------------------------------------------


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _inner(a: Array, b: Array) -> Array:
    # A sum of products, not a matrix product: accelerators round a product's inputs.
    return jnp.sum(a * b)


def _unit(x: Array) -> Array:
    scaled = x / jnp.max(jnp.abs(x))
    return scaled / jnp.sqrt(_inner(scaled, scaled))


def _centre(x: Array) -> Array:
    x = x - jnp.mean(x, axis=0, keepdims=True)
    return x - jnp.mean(x, axis=1, keepdims=True)


def _centre_off(x: Array) -> Array:
    """K̃_ij − Σ_k K̃_ik/(N − 2) − Σ_k K̃_kj/(N − 2) + Σ_kl K̃_kl/((N − 1)(N − 2)) off the diagonal.

    Its sums over rows and columns are zero.
    """
    count = len(x)
    off = 1 - jnp.eye(count, dtype=_wide(x).dtype)
    x = _centre(_wide(x)) * off  # a first centring changes nothing but the size of the numbers
    rows, columns = jnp.sum(x, axis=1, keepdims=True), jnp.sum(x, axis=0, keepdims=True)
    total = jnp.sum(x) / (count - 1)
    return (x - (rows + columns - total) / (count - 2)) * off


def _same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise JaxdynError(f"two kernels must have one shape, got {a.shape} and {b.shape}")
