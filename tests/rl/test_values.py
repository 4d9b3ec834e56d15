"""Returns, generalised advantages and the value loss against loops over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.rl import (
    LossConfig,
    explained_variance,
    generalized_advantages,
    normalizer_of,
    token_rewards,
    value_loss,
    whiten,
)

LENGTHS = [4, 1, 0, 6]
MASK = np.arange(6)[None] < np.array(LENGTHS)[:, None]
PPO = LossConfig(loss_type="ppo")


@functools.cache
def arrays():
    """Rewards, values, old values and returns of every token, in float64."""
    rng = np.random.default_rng(11)
    values = rng.normal(size=MASK.shape)
    old = values + rng.normal(0, 0.4, MASK.shape)
    return rng.normal(size=MASK.shape), values, old, rng.normal(size=MASK.shape)


def gae_by_hand(rewards, values, lengths, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k}, written as the double sum."""
    advantages = np.zeros_like(rewards)
    for b, n in enumerate(lengths):
        after = [*values[b, :n], 0.0]
        deltas = [rewards[b, t] + gamma * after[t + 1] - after[t] for t in range(n)]
        for t in range(n):
            advantages[b, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
    return advantages, np.where(MASK, advantages + values, 0)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_generalized_advantages_by_hand(gamma, lam, x64):
    rewards, values, _, _ = arrays()
    want = gae_by_hand(rewards, values, LENGTHS, gamma, lam)
    inputs = map(jnp.asarray, (rewards, values, MASK))
    got = generalized_advantages(*inputs, gamma, lam)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-14)


def test_with_lambda_one_the_returns_do_not_depend_on_the_values(x64):
    """Σ of the discounted δ telescopes: R_t = Σ_{k≥t} γ^(k-t) r_k."""
    rewards, values, old, _ = arrays()
    mask = jnp.asarray(MASK)
    returns = [
        generalized_advantages(jnp.asarray(rewards), jnp.asarray(v), mask, 0.9, 1.0)[1]
        for v in (values, old)
    ]
    np.testing.assert_allclose(returns[0], returns[1], rtol=1e-12, atol=1e-14)


def test_padding_may_lie_anywhere_and_hold_anything(x64):
    rewards, values, _, _ = arrays()
    spare = ((0, 0), (2, 3))
    pad = lambda x: jnp.asarray(np.pad(np.where(MASK, x, np.nan), spare, constant_values=np.nan))
    wide = generalized_advantages(pad(rewards), pad(values), jnp.asarray(np.pad(MASK, spare)))
    narrow = generalized_advantages(*map(jnp.asarray, (rewards, values, MASK)))
    for mine, theirs in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(mine, np.pad(theirs, spare))


def test_a_completions_reward_is_that_of_its_last_token():
    got = token_rewards(jnp.asarray([1.0, 2.0, jnp.nan, 4.0]), jnp.asarray(MASK))
    want = np.zeros(MASK.shape)
    want[0, 3], want[1, 0], want[3, 5] = 1, 2, 4  # the third has no token
    np.testing.assert_array_equal(got, want)


def test_whitened_by_hand(x64):
    x = arrays()[0]
    got = whiten(jnp.asarray(np.where(MASK, x, np.nan)), jnp.asarray(MASK))
    tokens = x[MASK]
    want = (x - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(got, np.where(MASK, want, 0), rtol=1e-12)


def test_one_token_whitens_to_zero():
    one = jnp.asarray([[True, False]])
    np.testing.assert_array_equal(whiten(jnp.asarray([[3.0, 5.0]]), one), [[0.0, 0.0]])


# -- the value loss -----------------------------------------------------------------------------


def value_by_hand(values, old, returns, clip):
    terms = []
    for b, t in zip(*np.nonzero(MASK), strict=True):
        square = (values[b, t] - returns[b, t]) ** 2
        if clip is not None:
            near = old[b, t] + min(max(values[b, t] - old[b, t], -clip), clip)
            square = max(square, (near - returns[b, t]) ** 2)
        terms.append(0.5 * square)
    return sum(terms) / len(terms)


def loss_and_grad(config, values, old, returns, mask=MASK, normalizer=None):
    old, returns, mask = map(jnp.asarray, (old, returns, mask))
    loss = lambda values: value_loss(config, values, old, returns, mask, normalizer)
    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(values))
    return value, metrics, grad


@pytest.mark.parametrize("clip", [0.2, 0.5, None])
def test_value_loss_and_gradient_by_hand(clip, x64):
    _, values, old, returns = arrays()
    config = LossConfig(loss_type="ppo", value_clip=clip, value_coefficient=0.7)
    value, metrics, grad = loss_and_grad(config, values, old, returns)
    want = value_by_hand(values, old, returns, clip)
    np.testing.assert_allclose(value, 0.7 * want, rtol=1e-13)
    np.testing.assert_allclose(metrics["value_loss"], want, rtol=1e-13)
    step = 1e-6
    for b, t in np.ndindex(values.shape):
        bump = np.zeros_like(values)
        bump[b, t] = step
        up, down = (value_by_hand(v, old, returns, clip) for v in (values + bump, values - bump))
        np.testing.assert_allclose(grad[b, t], 0.7 * (up - down) / (2 * step), atol=2e-9)


def test_value_clip_ratio_counts_where_the_clipped_square_is_larger(x64):
    # Towards the return 1 from 0: 0.1 is inside, 0.5 is held at 0.2; away from it none is worse.
    values, old, returns = np.array([[0.1, 0.5, -0.5]]), np.zeros((1, 3)), np.ones((1, 3))
    metrics = loss_and_grad(PPO, values, old, returns, np.ones((1, 3), bool))[1]
    np.testing.assert_allclose(metrics["clip_ratio/value_mean"], 1 / 3)
    unclipped = LossConfig(loss_type="ppo", value_clip=None)
    assert set(loss_and_grad(unclipped, values, old, returns, np.ones((1, 3), bool))[1]) == {
        "value_loss"
    }


def test_parts_padding_order_and_jit_change_nothing(x64):
    _, *whole = arrays()
    value, metrics, grad = loss_and_grad(PPO, *whole)

    counts = normalizer_of(jnp.asarray(MASK))
    parts = [
        loss_and_grad(PPO, *(x[rows] for x in whole), MASK[rows], counts)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], value, rtol=1e-13)
    for name in metrics:
        np.testing.assert_allclose(parts[0][1][name] + parts[1][1][name], metrics[name], rtol=1e-13)
    np.testing.assert_allclose(np.concatenate([p[2] for p in parts]), grad, rtol=1e-13)

    spare = ((0, 0), (1, 2))
    pad = lambda x: np.pad(np.where(MASK, x, np.nan), spare, constant_values=np.nan)
    wide = loss_and_grad(PPO, *map(pad, whole), np.pad(MASK, spare))
    np.testing.assert_allclose(wide[0], value, rtol=1e-13)
    np.testing.assert_allclose(wide[2], np.pad(grad, spare), rtol=1e-13)

    order = [2, 0, 3, 1]
    permuted = loss_and_grad(PPO, *(x[order] for x in whole), MASK[order])
    np.testing.assert_allclose(permuted[0], value, rtol=1e-13)

    jitted = jax.jit(functools.partial(loss_and_grad, PPO))
    np.testing.assert_allclose(jitted(*whole, MASK)[2], grad, rtol=1e-13)
    jitted(*whole[::-1], MASK[::-1].copy())
    assert jitted._cache_size() == 1


def test_explained_variance_by_hand(x64):
    _, values, _, returns = arrays()
    nan = lambda x: jnp.asarray(np.where(MASK, x, np.nan))
    got = explained_variance(nan(values), nan(returns), jnp.asarray(MASK))
    want = 1 - np.var((returns - values)[MASK]) / np.var(returns[MASK])
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(explained_variance(nan(returns), nan(returns), jnp.asarray(MASK)), 1)
    assert explained_variance(nan(values), nan(1 + 0 * returns), jnp.asarray(MASK)) == 0
