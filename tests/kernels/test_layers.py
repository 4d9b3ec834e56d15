"""The layers' kernels against gradients written out, whatever the form and the workspace."""

import itertools

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


# Inputs I and functions K, J: more inputs than outputs and fewer, several functions and one.
@pytest.fixture(params=[(IN, K, J), (IN, 1, J), (5, K, J), (5, 1, 1)], ids=str)
def pairs(request, x64):
    i, k, j = request.param
    return (draw(N, T, i), draw(N, k, T, OUT)), (draw(M, U, i), draw(M, j, U, OUT))


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


# Fewer pairs of slots than rows of the table, and more; widths that divide the table and do not.
@pytest.mark.parametrize("workspace", [1, 2500, 10**9])
@pytest.mark.parametrize("size", [3, 11, 64])
def test_embedding(size, workspace, x64):
    """Repeated ids, so that slots of one row meet each other too."""
    rng = np.random.default_rng(0)
    ids, others = (jnp.asarray(rng.integers(0, size, shape)) for shape in [(N, T), (M, U)])
    ids, others = ids.at[:, 2].set(ids[:, 0]), others.at[:, 3].set(ids[0, 0])
    d, e = draw(N, K, T, OUT), draw(M, J, U, OUT)
    tables = lambda i, x: np.einsum("ntv,nkto->nkvo", np.eye(size)[np.asarray(i)], x)
    rows, columns = (ids, d), (others, e)
    kernels = {
        "by the cheaper": lambda r, c: layers.embedding(r, c, size, workspace),
        "by ids": lambda r, c: layers._by_ids(r, c, size, workspace),
        "by slots": lambda r, c: layers._by_slots(
            r, c, workspace, lambda x: x[:, None, None] == (c or r)[0][None]
        ),
    }
    for form, kernel in kernels.items():
        expected = inner(tables(*rows), tables(*columns))
        np.testing.assert_allclose(kernel(rows, columns), expected, atol=1e-12, err_msg=form)
        expected = inner(tables(*rows), tables(*rows))
        np.testing.assert_allclose(kernel(rows, None), expected, atol=1e-12, err_msg=form)

    phi, g = draw(N, 2, OUT), draw(N, K, 2, size)
    heads = np.einsum("nksv,nsd->nkvd", g, phi)
    actual = layers.cross((phi, g), columns, workspace)
    np.testing.assert_allclose(actual, inner(heads, tables(*columns)), atol=1e-12)


def test_slots_meet_one_by_one_where_the_table_is_large(monkeypatch):
    """T U pairs of slots against V rows."""
    monkeypatch.setattr(layers, "_by_slots", lambda *_: jnp.array(1))
    monkeypatch.setattr(layers, "_by_ids", lambda *_: jnp.array(0))
    pair = (jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 1, 4, 3)))
    assert [bool(layers.embedding(pair, None, size, 1)) for size in (15, 16)] == [False, True]


@pytest.mark.parametrize("copies", [1, 2])
def test_dense_with_roots(copies, pairs):
    """Every gradient times √P; two functions' outputs side by side have the same P."""
    rows, columns = pairs
    root = jnp.abs(draw(rows[0].shape[2], OUT // copies)).at[2].set(0.0)
    whole = np.tile(root, (1, copies))
    left, right = matrices(*rows) * whole, matrices(*columns) * whole
    for workspace in (1, 3000, 10**9):
        actual = layers.dense(rows, columns, workspace, root)
        np.testing.assert_allclose(actual, inner(left, right), atol=1e-12)
        actual = layers.dense(rows, None, workspace, root)
        np.testing.assert_allclose(actual, inner(left, left), atol=1e-12)


def test_gradients_of_vectors(x64):
    """Σ_t a_t ⊙ δ_t and Σ_t δ_t, with leading layers and without."""
    a, d = draw(2, N, T, OUT), draw(2, N, K, T, OUT)
    scale, bias = np.einsum("lnti,lnkti->lnki", a, d), np.einsum("lnkti->lnki", d)
    np.testing.assert_allclose(layers.scale_gradient(a, d), scale, atol=1e-14)
    np.testing.assert_allclose(layers.scale_gradient(a[0], d[0]), scale[0], atol=1e-14)
    np.testing.assert_allclose(layers.bias_gradient(d), bias, atol=1e-14)


def test_symmetric_products_by_bands(x64):
    """150 rows make two bands."""
    x = draw(50, 3, 4)
    result = layers.pairwise(x, None).reshape(150, 150)
    flat = np.asarray(x).reshape(150, 4)
    np.testing.assert_allclose(result, flat @ flat.T, atol=1e-12)
    np.testing.assert_array_equal(result, result.T)


def test_products_of_bfloat16_add_up_in_float32():
    """2⁸ + 1 ones: in bfloat16 the sum would stay at 256."""
    ones = jnp.ones((1, 1, 257, 1), jnp.bfloat16)
    for result in (layers.bias_gradient(ones), layers.scale_gradient(ones[0], ones)):
        assert result.dtype == jnp.float32
        assert float(result[0, 0, 0]) == 257.0
    result = layers.pairwise(ones.reshape(1, 1, 257), None)
    assert result.dtype == jnp.float32
    assert float(result[0, 0, 0, 0]) == 257.0
