"""Kernel statistics on matrices whose answers are known, and against numpy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.kernels import statistics, summarize
from jaxdyn.types import Components, JaxdynError


def with_spectrum(*eigenvalues):
    """A symmetric matrix with these eigenvalues, far from diagonal."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))
    return jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)


# -- the spectrum ---------------------------------------------------------------------------------


def test_spectrum_is_that_of_the_symmetric_part_largest_first(x64):
    skew = np.triu(np.arange(16.0).reshape(4, 4), 1)
    kernel = with_spectrum(3.0, -1.0, 7.0, 0.5) + jnp.asarray(skew - skew.T)
    np.testing.assert_allclose(statistics.spectrum(kernel), [7.0, 3.0, 0.5, -1.0], atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
def test_spectrum_refuses_what_is_not_square(shape):
    with pytest.raises(JaxdynError, match="square"):
        inspect.unwrap(statistics.spectrum)(jnp.ones(shape))


@pytest.mark.parametrize(
    ("eigenvalues", "rank", "participation"),
    [
        ([2.0, 2.0, 2.0, 2.0], 4.0, 4.0),
        ([5.0, 0.0, 0.0], 1.0, 1.0),
        ([3.0, 3.0, 0.0], 2.0, 2.0),
        # p = ½, ¼, ¼: H = 1.5 log 2, Σp² = 3/8
        ([2.0, 1.0, 1.0], 2**1.5, 8 / 3),
        ([2.0, -1.0, -1.0], 2**1.5, 8 / 3),
    ],
)
def test_ranks_of_known_spectra(eigenvalues, rank, participation, x64):
    got = jnp.asarray(eigenvalues)
    np.testing.assert_allclose(statistics.effective_rank(got), rank, rtol=1e-14)
    np.testing.assert_allclose(statistics.participation_ratio(got), participation, rtol=1e-14)
    np.testing.assert_allclose(statistics.effective_rank(1e30 * got), rank, rtol=1e-14)


def test_ranks_of_a_kernel_from_its_traces(x64):
    """(tr K)² / ‖K‖², and never more than the effective rank."""
    rng = np.random.default_rng(2)
    factor = rng.standard_normal((6, 4))
    kernel = jnp.asarray(factor @ factor.T)
    eigenvalues = statistics.spectrum(kernel)
    participation = statistics.participation_ratio(eigenvalues)
    want = np.trace(kernel) ** 2 / np.linalg.norm(kernel) ** 2
    np.testing.assert_allclose(participation, want, rtol=1e-12)
    assert participation < statistics.effective_rank(eigenvalues) < 4


def test_ranks_of_nothing_are_nan():
    assert np.isnan(statistics.effective_rank(jnp.zeros(3)))
    assert np.isnan(statistics.participation_ratio(jnp.zeros(3)))


# -- two kernels ----------------------------------------------------------------------------------


def test_alignment_with_labels_and_against_them(x64):
    labels = np.array([1.0, 1.0, -1.0, -1.0])
    target = jnp.asarray(np.outer(labels, labels))
    np.testing.assert_allclose(statistics.alignment(3.0 * target, target), 1.0, rtol=1e-14)
    np.testing.assert_allclose(statistics.alignment(-2.0 * target, target), -1.0, rtol=1e-14)
    # ⟨I, yyᵀ⟩ = 4 over 2 · 4; centring takes 1 from ‖I‖² = 4
    uncentred = statistics.alignment(jnp.eye(4), target, centred=False)
    np.testing.assert_allclose(uncentred, 0.5, rtol=1e-14)
    np.testing.assert_allclose(statistics.alignment(jnp.eye(4), target), 3**-0.5, rtol=1e-14)


def test_alignment_is_centred_by_projections_on_both_sides(x64):
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((2, 5, 3))
    centre = lambda n: np.eye(n) - np.ones((n, n)) / n
    ca, cb = (centre(5) @ x @ centre(3) for x in (a, b))
    want = np.sum(ca * cb) / np.linalg.norm(ca) / np.linalg.norm(cb)
    got = statistics.alignment(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(got, want, rtol=1e-13)
    # a kernel that only adds a constant to every pair is all of the difference
    shifted = statistics.alignment(jnp.asarray(a + 100.0), jnp.asarray(b))
    np.testing.assert_allclose(shifted, want, rtol=1e-11)
    plain = statistics.alignment(jnp.asarray(a), jnp.asarray(b), centred=False)
    want = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(plain, want, rtol=1e-13)


def test_kernel_distance_is_one_minus_the_cosine(x64):
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, 4, 4))
    want = 1 - np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    got = statistics.kernel_distance(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(got, want, rtol=1e-13)
    same = statistics.kernel_distance(jnp.asarray(a), jnp.asarray(7.0 * a))
    np.testing.assert_allclose(same, 0.0, atol=1e-30)
    far = statistics.kernel_distance(jnp.asarray(a), jnp.asarray(-a))
    np.testing.assert_allclose(far, 2.0, rtol=1e-14)


def test_a_small_distance_survives_float32():
    """At an angle θ = 1e-4 it is θ²/2, less than float32 can take from 1."""
    a = jnp.diag(jnp.array([1.0, 0.0]))
    b = jnp.diag(jnp.array([1.0, 1e-4]))
    np.testing.assert_allclose(statistics.kernel_distance(a, b), 5e-9, rtol=1e-3)


def test_large_and_narrow_kernels_do_not_overflow():
    """bfloat16 in, float32 inside: 2^120 squared is out of float32's range."""
    kernel = (2.0**120 * jnp.eye(3)).astype(jnp.bfloat16)
    got = statistics.alignment(kernel, jnp.eye(3, dtype=jnp.bfloat16), centred=False)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1.0, rtol=1e-6)
    parts = Components(kernel, kernel, jnp.zeros_like(kernel))
    np.testing.assert_allclose(statistics.component_shares(parts).gradient, 0.5, rtol=1e-6)


@pytest.mark.parametrize("function", [statistics.alignment, statistics.kernel_distance])
def test_two_kernels_must_have_one_shape(function):
    with pytest.raises(JaxdynError, match=r"\(2, 2\) and \(3, 3\)"):
        inspect.unwrap(function)(jnp.eye(2), jnp.eye(3))


# -- two sets of features -------------------------------------------------------------------------


def hsic_by_hand(k, h):
    """Song et al. (2012), eq. 5, term by term."""
    n = len(k)
    k, h = k - np.diag(np.diag(k)), h - np.diag(np.diag(h))
    terms = np.trace(k @ h) + k.sum() * h.sum() / ((n - 1) * (n - 2))
    return (terms - 2 / (n - 2) * (k @ h).sum()) / (n * (n - 3))


def cka(x, y):
    return float(statistics.debiased_cka(jnp.asarray(x @ x.T), jnp.asarray(y @ y.T)))


def test_debiased_hsic_and_cka_equal_their_formulas(x64):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((9, 5)) + 3
    y = x[:, :3] + rng.standard_normal((9, 3))
    k, h = x @ x.T, y @ y.T
    got = statistics.debiased_hsic(jnp.asarray(k), jnp.asarray(h))
    np.testing.assert_allclose(got, hsic_by_hand(k, h), rtol=1e-11)
    wanted = hsic_by_hand(k, h) / np.sqrt(hsic_by_hand(k, k) * hsic_by_hand(h, h))
    np.testing.assert_allclose(cka(x, y), wanted, rtol=1e-11)
    assert 0.1 < wanted < 0.99


def test_debiased_cka_is_one_up_to_a_rotation_a_scale_and_a_shift(x64):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((12, 6))
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    np.testing.assert_allclose(cka(x, -7 * x @ rotation + rng.standard_normal(6)), 1, rtol=1e-12)
    assert cka(x, x * np.arange(6)) < 0.99


def test_debiased_cka_of_independent_features_is_zero_on_average(x64):
    """The mean of HSIC over 400 draws of 10 sites in 40 dimensions is within four standard errors
    of 0; that of the biased estimate is fifty away, and its CKA is above one half."""
    rng = np.random.default_rng(9)
    grams = np.stack([x @ x.T for x in rng.standard_normal((800, 10, 40))]).reshape(2, 400, 10, 10)
    found = np.asarray(jax.vmap(statistics.debiased_hsic)(*map(jnp.asarray, grams)))
    error = found.std(ddof=1) / np.sqrt(400)
    assert abs(found.mean()) < 4 * error
    centre = np.eye(10) - 1 / 10
    a, b = (centre @ g @ centre for g in grams)
    biased = (a * b).sum(axis=(1, 2)) / 90
    assert biased.mean() > 50 * biased.std(ddof=1) / np.sqrt(400)
    norm = lambda g: np.sqrt((g**2).sum(axis=(1, 2)))
    assert ((a * b).sum(axis=(1, 2)) / norm(a) / norm(b)).mean() > 0.5
    debiased = np.asarray(jax.vmap(statistics.debiased_cka)(*map(jnp.asarray, grams)))
    assert abs(debiased.mean()) < 4 * debiased.std(ddof=1) / np.sqrt(400) + 0.01


def test_debiased_cka_survives_float32_and_what_all_features_share():
    """A common mean a hundred times their spread, and 2^50 in size: exact to a part in 1e3."""
    rng = np.random.default_rng(10)
    x = rng.standard_normal((20, 8))
    y = x + 0.3 * rng.standard_normal((20, 8))
    with jax.enable_x64(True):
        wanted = cka(x, y)
    far = [jnp.asarray(2.0**50 * (z + 10) @ (z + 10).T, jnp.float32) for z in (x, y)]
    np.testing.assert_allclose(statistics.debiased_cka(*far), wanted, rtol=1e-3)


def test_debiased_cka_of_what_does_not_vary_is_nan_and_few_sites_are_refused():
    assert np.isnan(statistics.debiased_cka(jnp.ones((5, 5)), jnp.eye(5)))
    with pytest.raises(JaxdynError, match=r"4 sites or more, got \(3, 3\)"):
        inspect.unwrap(statistics.debiased_hsic)(jnp.eye(3), jnp.eye(3))


# -- the parts ------------------------------------------------------------------------------------


def test_component_shares_are_projections_that_sum_to_one(x64):
    first, second = np.eye(2), np.array([[0.0, 1.0], [1.0, 0.0]])
    parts = Components(*(jnp.asarray(x) for x in (4 * first, -first + second, second)))
    # total = 3 I + 2 S, ‖total‖² = 2 (9 + 4) = 26
    got = statistics.component_shares(parts)
    want = np.array([4 * 3 * 2, (-1 * 3 + 2) * 2, 2 * 2]) / 26
    np.testing.assert_allclose((got.representation, got.gradient, got.cross), want, rtol=1e-14)
    np.testing.assert_allclose(got.total, 1.0, rtol=1e-14)
    assert got.gradient < 0 < got.cross


def test_a_summary_equals_numpy():
    """Float32 kernels, summed up in float64; a component that is zero has no numbers."""
    rng = np.random.default_rng(11)
    phi = rng.standard_normal((6, 4)).astype(np.float32)
    stack = np.stack([x @ x.T for x in rng.standard_normal((3, 6, 9))]).astype(np.float32)
    gram = (phi @ phi.T).astype(np.float32)
    zero = np.zeros((6, 6), np.float32)
    kernel = {"representation": gram, "gradient": stack.sum(axis=0), "cross": zero}
    found = summarize(kernel, {"mlp": stack}, phi)
    total = sum(x.astype(np.float64) for x in kernel.values())
    for name, matrix in (("total", total), ("gradient", kernel["gradient"].astype(np.float64))):
        values = np.linalg.eigvalsh(matrix)[::-1]
        np.testing.assert_allclose(found[f"spectrum/{name}"], values, rtol=1e-9, atol=1e-9)
        p = values / values.sum()
        np.testing.assert_allclose(found[f"effective_rank/{name}"], np.exp(-(p * np.log(p)).sum()))
    on = np.eye(6, dtype=bool)
    for part in ("representation", "gradient"):
        x = kernel[part].astype(np.float64)
        wanted = [(x * total)[m].sum() / (total**2)[m].sum() for m in (on | True, on, ~on)]
        np.testing.assert_allclose(found[f"share/{part}"], wanted, rtol=1e-12)
    wanted = [(x * total).sum() / (total**2).sum() for x in stack.astype(np.float64)]
    np.testing.assert_allclose(found["share_by_layer/mlp"], wanted, rtol=1e-12)
    phi = phi.astype(np.float64)
    unit = phi / np.linalg.norm(phi, axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i in range(6) for j in range(i + 1, 6)]
    np.testing.assert_allclose(found["features/cosines"], cosines, rtol=1e-10)
    assert not [name for name in found if "cross" in name]
    alone = summarize({name: x[:1, :1] for name, x in kernel.items()})
    assert np.isnan(alone["share/gradient"][2]) and np.isfinite(alone["share/gradient"][:2]).all()


# -- signs of inner products ----------------------------------------------------------------------


def test_inner_products_of_known_features(x64):
    """Pairs of (2, 0), (1, 1), (0, 3), (-1, 0): products 2, 0, -2, 3, -1, 0."""
    features = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [-1.0, 0.0]])
    got = statistics.inner_products(jnp.asarray(features @ features.T))
    half = 0.5**0.5
    cosines = np.array([half, 0.0, -1.0, half, -half, 0.0])
    np.testing.assert_allclose(got.negative_share, 2 / 6)
    np.testing.assert_allclose(got.zero_share, 2 / 6)
    np.testing.assert_allclose((got.min, got.mean), (-2.0, 2 / 6))
    np.testing.assert_allclose(got.cosine_min, -1.0, rtol=1e-14)
    np.testing.assert_allclose(got.cosine_mean, cosines.mean(), rtol=1e-14)
    np.testing.assert_allclose(
        got.cosine_quantiles, np.quantile(cosines, (0.05, 0.25, 0.5, 0.75, 0.95)), atol=1e-14
    )


def test_alike_features_are_strictly_positive(x64):
    features = 1.0 + 0.1 * np.random.default_rng(6).standard_normal((7, 5))
    got = jax.jit(statistics.inner_products)(jnp.asarray(features @ features.T))
    assert got.negative_share == got.zero_share == 0 and got.min > 0
    assert 0.9 < got.cosine_min < got.cosine_mean < 1


def test_the_diagonal_is_no_pair(x64):
    """Orthogonal features: nothing negative, nothing positive, whatever their norms."""
    got = statistics.inner_products(jnp.diag(jnp.array([1.0, 4.0, 9.0])))
    assert (got.zero_share, got.negative_share, got.mean, got.cosine_mean) == (1, 0, 0, 0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_inner_products_need_pairs(shape):
    with pytest.raises(JaxdynError, match="2 sites or more"):
        inspect.unwrap(statistics.inner_products)(jnp.ones(shape))


def test_everything_compiles_and_is_float32_or_better():
    gram = with_spectrum(3.0, 2.0, 1.0).astype(jnp.float16)
    rank = jax.jit(lambda k: statistics.effective_rank(statistics.spectrum(k)))(gram)
    assert rank.dtype == jnp.float32
    assert jax.jit(statistics.kernel_distance)(gram, gram).dtype == jnp.float32
    assert jax.jit(statistics.inner_products)(gram).cosine_quantiles.dtype == jnp.float32
