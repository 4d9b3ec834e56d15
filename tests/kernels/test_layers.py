"""The layers' kernels against gradients written out, whatever the form and the workspace."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.kernels import layers

N, K, T, M, J, U, IN, OUT = 5, 2, 4, 3, 3, 6, 7, 6


def draw(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape))


def inner(x, y):
    """[N, K, ...] and [M, J, ...] -> [N, K, M, J], one pair after another."""
    pairs = itertools.product(*map(range, (*x.shape[:2], *y.shape[:2])))
    flat = [np.vdot(x[n, k], y[m, j]) for n, k, m, j in pairs]
    return np.reshape(flat, (*x.shape[:2], *y.shape[:2]))


@pytest.fixture
def pairs(x64):
    return (draw(N, T, IN), draw(N, K, T, OUT)), (draw(M, U, IN), draw(M, J, U, OUT))


def matrices(a, d):
    return np.einsum("nti,nkto->nkio", a, d)


@pytest.mark.parametrize("workspace", [1, 3000, 10**9])
@pytest.mark.parametrize("form", ["slots", "blocks", "cheaper"])
def test_dense(form, workspace, pairs):
    rows, columns = pairs
    by_slots = lambda r, c: layers._by_slots(
        r, c, workspace, lambda a: jnp.einsum("ti,mui->tmu", a, (c or r)[0])
    )
    kernel = {
        "slots": by_slots,
        "blocks": lambda r, c: layers._by_blocks(r, c, workspace),
        "cheaper": lambda r, c: layers.dense(r, c, workspace),
    }[form]
    expected = inner(matrices(*rows), matrices(*columns))
    np.testing.assert_allclose(kernel(rows, columns), expected, atol=1e-12)
    expected = inner(matrices(*rows), matrices(*rows))
    np.testing.assert_allclose(kernel(rows, None), expected, atol=1e-12)


@pytest.mark.parametrize("slots, width, by_slots", [(2, 64, True), (64, 8, False)])
def test_the_cheaper_form_is_chosen(slots, width, by_slots, monkeypatch):
    """Few slots: T² (I + O) products a pair; many: I O a pair, and T I O to form a gradient."""
    monkeypatch.setattr(layers, "_by_slots", lambda *_: jnp.array(1))
    monkeypatch.setattr(layers, "_by_blocks", lambda *_: jnp.array(0))
    pair = (jnp.zeros((8, slots, width)), jnp.zeros((8, 1, slots, width)))
    assert bool(layers.dense(pair, pair, 1)) == by_slots


@pytest.mark.parametrize("workspace", [1, 10**9])
def test_embedding(workspace, x64):
    """Repeated ids, so that slots of one row meet each other too."""
    rng = np.random.default_rng(0)
    ids, others = rng.integers(0, 3, (N, T)), rng.integers(0, 3, (M, U))
    d, e = draw(N, K, T, OUT), draw(M, J, U, OUT)
    tables = lambda i, x: np.einsum("ntv,nkto->nkvo", np.eye(3)[i], x)
    actual = layers.embedding((jnp.asarray(ids), d), (jnp.asarray(others), e), workspace)
    np.testing.assert_allclose(actual, inner(tables(ids, d), tables(others, e)), atol=1e-12)

    phi, g = draw(N, 2, OUT), draw(N, K, 2, 3)
    heads = np.einsum("nksv,nsd->nkvd", g, phi)
    actual = layers.cross((phi, g), (jnp.asarray(others), e), workspace)
    np.testing.assert_allclose(actual, inner(heads, tables(others, e)), atol=1e-12)


def test_elementwise_and_bias(x64):
    rows, columns = (draw(N, T, OUT), draw(N, K, T, OUT)), (draw(M, U, OUT), draw(M, J, U, OUT))
    scales = lambda a, d: (np.asarray(a)[:, None] * np.asarray(d)).sum(axis=2)
    biases = lambda a, d: np.asarray(d).sum(axis=2)
    for function, gradient in [(layers.elementwise, scales), (layers.bias, biases)]:
        left, right = gradient(*rows), gradient(*columns)
        np.testing.assert_allclose(function(rows, columns), inner(left, right), atol=1e-12)
        np.testing.assert_allclose(function(rows, None), inner(left, left), atol=1e-12)


def test_symmetric_products_by_bands(x64):
    """150 rows make three bands."""
    x = draw(50, 3, 4)
    result = layers.pairwise(x, None).reshape(150, 150)
    flat = np.asarray(x).reshape(150, 4)
    np.testing.assert_allclose(result, flat @ flat.T, atol=1e-12)
    np.testing.assert_array_equal(result, result.T)


def test_products_of_bfloat16_add_up_in_float32():
    """2⁸ + 1 ones: in bfloat16 the sum would stay at 256."""
    ones = jnp.ones((1, 1, 257, 1), jnp.bfloat16)
    result = jax.jit(layers.bias)((None, ones), None)
    assert result.dtype == jnp.float32
    assert float(result[0, 0, 0, 0]) == 257.0**2
