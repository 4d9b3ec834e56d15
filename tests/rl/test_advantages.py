"""Advantages against loops over groups, with and without unscorable rewards."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxdyn.rl import group_relative, leave_one_out, plain
from jaxdyn.types import JaxdynError

REWARDS = np.array([[1.0, 0.0, 0.5, 0.5], [2.0, 2.0, 2.0, 2.0], [0.0, 3.0, -1.0, 4.0]])


def with_gaps():
    rewards = REWARDS.copy()
    rewards[0, 1] = rewards[2, 0] = rewards[2, 3] = np.nan
    return rewards


def flat(rewards):
    return jnp.asarray(rewards.reshape(-1))


@pytest.mark.parametrize("rewards", [REWARDS, with_gaps()], ids=["full", "gaps"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_by_hand(rewards, scale, x64):
    got = np.asarray(group_relative(flat(rewards), 4, scale=scale)).reshape(rewards.shape)
    for p, g in np.ndindex(rewards.shape):
        group = rewards[p][~np.isnan(rewards[p])]
        sigma = {
            "group": np.std(group, ddof=1) + 1e-4,
            "batch": np.std(rewards[~np.isnan(rewards)], ddof=1) + 1e-4,
            "none": 1.0,
        }[scale]
        want = (rewards[p, g] - group.mean()) / sigma if not np.isnan(rewards[p, g]) else 0.0
        np.testing.assert_allclose(got[p, g], want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rewards", [REWARDS, with_gaps()], ids=["full", "gaps"])
def test_leave_one_out_by_hand(rewards, x64):
    got = np.asarray(leave_one_out(flat(rewards), 4)).reshape(rewards.shape)
    for p, g in np.ndindex(rewards.shape):
        others = np.delete(rewards[p], g)
        want = rewards[p, g] - np.nanmean(others) if not np.isnan(rewards[p, g]) else 0.0
        np.testing.assert_allclose(got[p, g], want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rewards", [REWARDS, with_gaps()], ids=["full", "gaps"])
def test_plain_by_hand(rewards, x64):
    want = np.nan_to_num(rewards - np.nanmean(rewards)).reshape(-1)
    np.testing.assert_allclose(plain(flat(rewards)), want, rtol=1e-12)
    raw = plain(flat(rewards), baseline="none")
    np.testing.assert_allclose(raw, np.nan_to_num(rewards).reshape(-1), rtol=0)


@pytest.mark.parametrize("advantage", [group_relative, leave_one_out])
def test_a_group_with_one_score_or_none_gets_zero(advantage):
    rewards = jnp.asarray([np.nan, 5.0, np.nan, np.nan], jnp.float32)
    np.testing.assert_array_equal(advantage(rewards, 2), np.zeros(4))


def test_nothing_scored_gives_zero():
    np.testing.assert_array_equal(plain(jnp.full(3, jnp.nan)), np.zeros(3))


def test_an_infinite_reward_is_not_hidden():
    assert not np.isfinite(plain(jnp.asarray([1.0, np.inf]))).all()


def test_jit_compiles_once_for_scores_and_gaps():
    jitted = jax.jit(group_relative, static_argnums=(1, 2))
    jitted(flat(REWARDS.astype(np.float32)), 4, "group")
    got = jitted(flat(with_gaps().astype(np.float32)), 4, "group")
    assert np.isfinite(got).all()
    assert jitted._cache_size() == 1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda r: group_relative(r, 1), "num_generations must be at least 2.*got 1"),
        (lambda r: leave_one_out(r, 1), "num_generations must be at least 2.*got 1"),
        (lambda r: group_relative(r, 5), "12 rewards do not divide into groups of 5"),
        (lambda r: group_relative(r, 4, scale="global"), "scale must be .*, got 'global'"),
        (lambda r: plain(r, baseline="group"), "baseline must be .*, got 'group'"),
    ],
)
def test_nonsense_is_refused(call, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(JaxdynError, match=words):
        call(flat(REWARDS))
