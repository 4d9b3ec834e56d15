"""Advantages against loops over groups and tokens, with and without unscorable rewards."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxdyn.rl import (
    KINDS,
    LOSSES,
    AdvantageConfig,
    LossConfig,
    ScoredBatch,
    advantage_kind,
    check_combination,
    estimate_advantages,
    generalized_advantages,
    group_relative,
    leave_one_out,
    overlong_penalty,
    plain,
)
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


@pytest.mark.parametrize("reward", [0.9, 1000.1, -1 / 3])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(reward, scale):
    """Whatever their float32 mean rounds to."""
    equal = jnp.full(16, reward, jnp.float32).at[3].set(jnp.nan)
    for got in (group_relative(equal, 8, scale), leave_one_out(equal, 8), plain(equal)):
        np.testing.assert_array_equal(got, np.zeros(16))


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


# -- the whole way from rewards to advantages -----------------------------------------------------

B, C, G = 6, 5, 3
LENGTHS = np.array([5, 3, 1, 4, 5, 2])
MASK = np.arange(C)[None] < LENGTHS[:, None]


def arrays():
    """Rewards (the fifth unscorable), old and reference log-probs, and values."""
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=B)
    rewards[4] = np.nan
    old, ref, values = (rng.normal(size=(B, C)) for _ in range(3))
    return rewards, old, ref, values


def scored(rewards, finished=None, **more):
    finished = np.ones(B, bool) if finished is None else finished
    fixed, more = jax.tree.map(jnp.asarray, ((rewards, finished, MASK), more))
    return ScoredBatch(*fixed, **more)


def estimate(config, loss, finished=None, max_completion_length=None):
    rewards, old, ref, values = arrays()
    names = ("old_per_token_logps", "ref_per_token_logps", "values")
    batch = scored(rewards, finished, **dict(zip(names, (old, ref, values), strict=True)))
    return estimate_advantages(config, loss, batch, G, max_completion_length)


def shaped(beta, gamma, baseline=False):
    """Rewards to go of every scorable token, by loops: k1 at each, the reward at the last."""
    rewards, old, ref, _ = arrays()
    if baseline:
        rewards = (rewards.reshape(-1, G) - np.nanmean(rewards.reshape(-1, G), 1)[:, None]).ravel()
    to_go = np.zeros((B, C))
    for b, t in zip(*np.nonzero(MASK), strict=True):
        steps = range(t, LENGTHS[b])
        kl = sum(gamma ** (k - t) * (old[b, k] - ref[b, k]) for k in steps)
        to_go[b, t] = gamma ** (steps[-1] - t) * rewards[b] - beta * kl
    return to_go


def whitened(x, counted):
    sigma = np.sqrt(x[counted].var(ddof=1) + 1e-8)
    return np.where(counted, (x - x[counted].mean()) / sigma, 0)


@pytest.mark.parametrize("beta, gamma", [(0.0, 1.0), (0.1, 1.0), (0.1, 0.9)])
@pytest.mark.parametrize("baseline", [False, True], ids=["", "baseline"])
def test_reinforce_plus_plus_by_hand(beta, gamma, baseline, x64):
    kind = "reinforce_plus_plus_baseline" if baseline else "reinforce_plus_plus"
    placement = "reward" if beta else "loss"
    loss = LossConfig(loss_type="reinforce_plus_plus", beta=beta, kl_placement=placement)
    got, returns = estimate(AdvantageConfig(kind=kind, gamma=gamma), loss)
    counted = MASK & (np.arange(B) != 4)[:, None]
    want = whitened(shaped(beta, gamma, baseline), counted)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    assert returns is None


@pytest.mark.parametrize("whiten", [True, False])
def test_gae_from_outcome_rewards_and_kl(whiten, x64):
    loss = LossConfig(loss_type="ppo", beta=0.1, kl_placement="reward")
    got, returns = estimate(AdvantageConfig(gamma=0.9, lam=0.8, whiten=whiten), loss)
    rewards, old, ref, values = arrays()
    tokens = -0.1 * (old - ref)
    tokens[np.arange(B), LENGTHS - 1] += rewards
    inputs = map(jnp.asarray, (tokens, values, MASK))
    raw, want_returns = (np.asarray(x) for x in generalized_advantages(*inputs, 0.9, 0.8))
    counted = MASK & (np.arange(B) != 4)[:, None]
    want = whitened(raw, counted) if whiten else np.where(counted, raw, 0)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(returns[counted], want_returns[counted], rtol=1e-12)
    np.testing.assert_array_equal(returns[4], values[4])  # nothing to learn


def kinds():
    """Every kind of advantage, with a loss that takes it."""
    for kind in KINDS:
        name = next(name for name, row in LOSSES.items() if kind in row.advantages)
        yield pytest.param(LossConfig(loss_type=name), AdvantageConfig(kind=kind), id=kind)


@pytest.mark.parametrize("loss, config", list(kinds()))
def test_what_is_unscorable_weighs_nothing(loss, config):
    """A completion without a score, and a whole group without one; the others as if alone."""
    rewards = np.float32([0.1, np.nan, 0.7, np.nan, np.nan, np.nan])
    values = np.float32(arrays()[3])
    got, returns = estimate_advantages(config, loss, scored(rewards, values=values), G)
    missing = np.isnan(rewards)
    assert (np.asarray(got)[missing] == 0).all()
    assert (np.asarray(got)[~missing] != 0).any(axis=-1).all()
    if returns is not None:
        np.testing.assert_array_equal(returns[missing], values[missing])


@pytest.mark.parametrize("loss, config", list(kinds()))
def test_equal_rewards_move_nothing(loss, config):
    rewards = np.full(B, 0.9, np.float32)
    rewards[4] = np.nan
    batch = scored(rewards, values=np.float32(MASK * 0.9))
    got, _ = estimate_advantages(config, loss, batch, G)
    np.testing.assert_array_equal(got, np.zeros(got.shape))


def test_truncated_completions_are_not_counted_in_a_whitening(x64):
    finished = jnp.asarray([False, True, True, True, True, True])
    loss = LossConfig(loss_type="reinforce_plus_plus", mask_truncated=True)
    got, _ = estimate(AdvantageConfig(), loss, finished=finished)
    counted = MASK & ((np.arange(B) != 4) & np.asarray(finished))[:, None]
    np.testing.assert_allclose(got, whitened(shaped(0, 1.0), counted), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["group_relative", "leave_one_out", "plain"])
def test_the_kl_in_the_reward_comes_before_the_comparison(kind, x64):
    loss = LossConfig(loss_type="reinforce", beta=0.1, kl_placement="reward")
    got, returns = estimate(AdvantageConfig(kind=kind), loss)
    rewards, old, ref, _ = arrays()
    net = jnp.asarray(rewards - 0.1 * np.where(MASK, old - ref, 0).sum(axis=1))
    want = {
        "group_relative": lambda: group_relative(net, G),
        "leave_one_out": lambda: leave_one_out(net, G),
        "plain": lambda: plain(net),
    }[kind]()
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert returns is None and got[4] == 0


def test_each_loss_scales_as_published_unless_told(x64):
    rewards = jnp.asarray(arrays()[0])
    for name, scale in (("grpo", "group"), ("dapo", "group"), ("dr_grpo", "none")):
        got, _ = estimate(AdvantageConfig(), LossConfig(loss_type=name))
        np.testing.assert_allclose(got, group_relative(rewards, G, scale), rtol=1e-12)
    got, _ = estimate(AdvantageConfig(scale="batch"), LossConfig(loss_type="dr_grpo"))
    np.testing.assert_allclose(got, group_relative(rewards, G, "batch"), rtol=1e-12)


def test_overlong_penalty_by_hand():
    lengths = jnp.asarray([0, 10, 16, 17, 18, 19, 20])
    want = [0, 0, 0, -0.25, -0.5, -0.75, -1]
    np.testing.assert_allclose(overlong_penalty(lengths, 20, 4), want)


def test_overlong_completions_lose_reward_before_anything_else(x64):
    """Against the sampler's limit of 6 tokens, a length of 5 loses the half of 2."""
    config = AdvantageConfig(kind="plain", overlong_buffer=2, overlong_weight=2.0)
    got, _ = estimate(config, LossConfig(loss_type="reinforce"), max_completion_length=6)
    lost = np.array([1.0, 0, 0, 0, 1.0, 0])
    np.testing.assert_allclose(got, plain(jnp.asarray(arrays()[0] - lost)), rtol=1e-12)
    by_slots, _ = estimate(config, LossConfig(loss_type="reinforce"))
    lost = np.array([2.0, 0, 0, 1.0, 2.0, 0])
    np.testing.assert_allclose(by_slots, plain(jnp.asarray(arrays()[0] - lost)), rtol=1e-12)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_gets_the_advantages_it_takes_and_compiles_once(loss_type):
    estimate_advantages.clear_cache()
    for fill in np.float32([0, 1]):
        got, returns = estimate_advantages(
            AdvantageConfig(),
            LossConfig(loss_type=loss_type),
            scored(np.arange(6, dtype=np.float32) + fill, values=np.full((B, C), fill)),
            G,
        )
    per_token = loss_type in ("ppo", "reinforce_plus_plus")
    assert got.shape == ((B, C) if per_token else (B,)) and np.isfinite(got).all()
    assert (returns is not None) == (loss_type == "ppo")
    assert estimate_advantages._cache_size() == 1


# -- combinations -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_losss_own_advantages_are_accepted(loss_type):
    loss = LossConfig(loss_type=loss_type)
    check_combination(loss, AdvantageConfig(), 2)
    for kind in LOSSES[loss_type].advantages:
        check_combination(loss, AdvantageConfig(kind=kind), 2)
    assert advantage_kind(loss, AdvantageConfig()) in KINDS


@pytest.mark.parametrize(
    "loss, advantage, generations, words",
    [
        ("ppo", {"kind": "group_relative"}, 2, "kind must be gae for loss ppo, got 'group_relat"),
        ("grpo", {"kind": "gae"}, 2, "kind must be group_relative or .* for loss grpo, got 'gae'"),
        ("rloo", {"kind": "reinforce_plus_plus"}, 2, "kind must be leave_one_out or .* for loss r"),
        ("reinforce_plus_plus", {"kind": "plain"}, 2, "kind must be reinforce_plus_plus or"),
        ("rloo", {"scale": "batch"}, 2, "scale is of no use to leave_one_out, got 'batch'"),
        ("reinforce", {"scale": "none"}, 2, "scale is of no use to plain, got 'none'"),
        ("ppo", {"scale": "group"}, 2, "scale is of no use to gae, got 'group'"),
        ("grpo", {"gamma": 0.9}, 2, "gamma is of no use to group_relative, got 0.9"),
        ("grpo", {"lam": 1.0}, 2, "lam is of no use to group_relative, got 1.0"),
        ("reinforce_plus_plus", {"lam": 1.0}, 2, "lam is of no use to reinforce_plus_plus, got 1"),
        ("grpo", {"whiten": False}, 2, "whiten is of no use to group_relative, got False"),
        ("rloo", {"epsilon": 1e-6}, 2, "epsilon is of no use to leave_one_out, got 1e-06"),
        ("grpo", {}, 1, "num_generations must be at least 2, got 1: group_relative"),
        (
            "reinforce_plus_plus",
            {"kind": "reinforce_plus_plus_baseline"},
            1,
            "num_generations must be at least 2, got 1: reinforce_plus_plus_baseline",
        ),
    ],
)
def test_combinations_without_sense_are_refused(loss, advantage, generations, words):
    with pytest.raises(JaxdynError, match=rf"^(advantage|train)\.{words}") as error:
        check_combination(LossConfig(loss_type=loss), AdvantageConfig(**advantage), generations)
    assert "\n" not in str(error.value)


def test_a_buffer_longer_than_a_completion_is_refused():
    config = AdvantageConfig(overlong_buffer=9)
    check_combination(LossConfig(), config, 2, max_completion_length=9)
    with pytest.raises(JaxdynError, match=r"between 1 and max_completion_length \(8\), got 9"):
        check_combination(LossConfig(), config, 2, max_completion_length=8)


@pytest.mark.parametrize("loss_type", ["ppo", "reinforce", "reinforce_plus_plus"])
def test_some_losses_need_one_generation_only(loss_type):
    check_combination(LossConfig(loss_type=loss_type), AdvantageConfig(), 1)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"kind": "mean"}, "kind must be one of .*, got 'mean'"),
        ({"scale": "prompt"}, "scale must be one of .*, got 'prompt'"),
        ({"gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
        ({"lam": -0.1}, r"lam must lie in \[0, 1\], got -0.1"),
        ({"epsilon": -1e-4}, "epsilon must be at least 0, got -0.0001"),
        ({"overlong_buffer": -1}, "overlong_buffer must be at least 0, got -1"),
        ({"overlong_weight": float("nan")}, "overlong_weight must be finite, got nan"),
        ({"overlong_weight": 2.0}, "overlong_weight needs .*overlong_buffer, which is 0; got 2.0"),
    ],
)
def test_nonsense_in_a_config_is_refused(fields, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(JaxdynError, match=rf"^advantage\.{words}"):
        AdvantageConfig(**fields)


@pytest.mark.parametrize(
    "config, loss, words",
    [
        (AdvantageConfig(), LossConfig(loss_type="ppo"), "gae needs the value head's estimates"),
        (
            AdvantageConfig(),
            LossConfig(beta=0.1, kl_placement="reward"),
            "kl_placement 'reward' needs old and reference log-probs",
        ),
        (
            AdvantageConfig(overlong_buffer=6),
            LossConfig(),
            r"overlong_buffer must lie between 1 and max_completion_length \(5\), got 6",
        ),
    ],
)
def test_what_an_estimate_needs_must_be_there(config, loss, words):
    with pytest.raises(JaxdynError, match=words):
        estimate_advantages(config, loss, scored(np.arange(6, dtype=np.float32)), G)
