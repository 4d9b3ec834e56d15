"""Token statistics against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.rl import per_token_kl, token_statistics


def oracle(logits, ids, temperature):
    scaled = np.asarray(logits, np.float64) / temperature
    probs = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(probs, ids[..., None], axis=-1)[..., 0]
    second, first = np.moveaxis(np.sort(probs, axis=-1)[..., -2:], -1, 0)
    return np.log(chosen), -(probs * np.log(probs)).sum(axis=-1), first, first - second


def fields(statistics):
    return statistics.logps, statistics.entropy, statistics.max_prob, statistics.margin


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(0, 3, (2, 4, 11)), dtype), rng.integers(0, 11, (2, 4))


# Logits reach |f| = 10 / temperature: a rounding of 2^-24 of that, over 11 terms, stays below 1e-5.
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_by_hand_in_float32_or_better(temperature, dtype):
    logits, ids = inputs(dtype)
    got = token_statistics(logits, jnp.asarray(ids), temperature)
    assert {x.dtype for x in fields(got)} == {jnp.dtype(jnp.float32)}
    want = oracle(logits.astype(jnp.float32), ids, temperature)
    for actual, expected in zip(fields(got), want, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_float64_stays_float64(x64):
    logits, ids = inputs(jnp.float64)
    got = token_statistics(logits, jnp.asarray(ids), 0.9)
    for actual, expected in zip(fields(got), oracle(logits, ids, 0.9), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-13)


def test_huge_logits_stay_finite():
    got = token_statistics(jnp.asarray([[3e4, 0.0, -3e4]]), jnp.asarray([1]), 1.0)
    np.testing.assert_array_equal([x[0] for x in fields(got)], [-3e4, 0, 1, 1])


def test_a_tie_has_no_margin():
    got = token_statistics(jnp.asarray([[1.0, 2.0, 2.0, 0.0]]), jnp.asarray([1]))
    e = np.exp(np.asarray([-1.0, 0.0, 0.0, -2.0]))
    np.testing.assert_allclose(got.max_prob[0], 1 / e.sum(), rtol=1e-6)
    assert got.margin[0] == 0


def test_temperature_zero_is_read_as_one():
    logits, ids = inputs()
    got, want = (token_statistics(logits, jnp.asarray(ids), t) for t in (0.0, 1.0))
    np.testing.assert_array_equal(got.logps, want.logps)


def test_temperature_is_traced():
    logits, ids = inputs()
    jitted = jax.jit(token_statistics)
    cold, warm = (jitted(logits, jnp.asarray(ids), jnp.float32(t)) for t in (0.5, 2.0))
    assert (warm.entropy > cold.entropy).all()
    assert jitted._cache_size() == 1


def test_gradient_is_token_minus_policy_over_temperature(x64):
    logits, ids = inputs(jnp.float64)
    total = lambda f: token_statistics(f, jnp.asarray(ids), 0.7).logps.sum()
    want = (jax.nn.one_hot(ids, 11) - jax.nn.softmax(logits / 0.7)) / 0.7
    np.testing.assert_allclose(jax.grad(total)(logits), want, atol=1e-14)


def test_gradients_of_entropy_and_confidence(x64):
    logits, ids = inputs(jnp.float64)
    gradient = lambda name: jax.grad(
        lambda f: getattr(token_statistics(f, jnp.asarray(ids), 0.7), name).sum()
    )(logits)
    pi = jax.nn.softmax(logits / 0.7)
    first, second = (jnp.argsort(-logits)[..., k, None] for k in range(2))
    of = lambda at: jnp.take_along_axis(pi, at, -1) * (jax.nn.one_hot(at[..., 0], 11) - pi) / 0.7
    entropy = -jnp.sum(pi * jnp.log(pi), axis=-1, keepdims=True)
    want = {
        "entropy": -pi * (jnp.log(pi) + entropy) / 0.7,
        "max_prob": of(first),
        "margin": of(first) - of(second),
    }
    for name, expected in want.items():
        np.testing.assert_allclose(gradient(name), expected, atol=1e-14)


def test_kl_estimators_by_hand_and_in_expectation(x64):
    rng = np.random.default_rng(2)
    logp, ref = (np.log(rng.dirichlet(np.ones(7))) for _ in range(2))
    exact = np.exp(logp) @ (logp - ref)
    estimate = lambda kind: per_token_kl(kind, jnp.asarray(logp), jnp.asarray(ref))
    np.testing.assert_allclose(np.exp(logp) @ estimate("k1"), exact, rtol=1e-12)
    np.testing.assert_allclose(np.exp(logp) @ estimate("k3"), exact, rtol=1e-12)
    np.testing.assert_allclose(estimate("k2"), (logp - ref) ** 2 / 2, rtol=1e-12)
    assert (estimate("k3") >= 0).all()
