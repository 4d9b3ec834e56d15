"""Weights for the sampler's sake, and tokens held back for the entropy's: against plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.rl import (
    CovarianceConfig,
    ImportanceConfig,
    LossConfig,
    covariances,
    held_back,
    normalizer_of,
    policy_loss,
)
from jaxdyn.types import JaxdynError

ROWS, SLOTS = 6, 5
CONFIGS = {
    "grpo tokens": LossConfig(importance=ImportanceConfig(1.1)),
    "grpo sequences": LossConfig(importance=ImportanceConfig(1.2, "sequence")),
    "dapo tokens": LossConfig("dapo", importance=ImportanceConfig(0.9), beta=0.1),
    "rloo sequences": LossConfig("rloo", importance=ImportanceConfig(1.5, "sequence")),
    "reinforce": LossConfig("reinforce", importance=ImportanceConfig(1.2)),
    "clip-cov": LossConfig(
        "dapo", covariance=CovarianceConfig("clip", share=0.2, bounds=(0.0, 9.0))
    ),
    "kl-cov": LossConfig("dapo", covariance=CovarianceConfig("kl", share=0.3, beta=0.7), beta=0.1),
    "kl-cov weighed": LossConfig(
        "grpo", covariance=CovarianceConfig("kl"), importance=ImportanceConfig(1.1)
    ),
}


def arrays(of_tokens=False):
    """New, old and sampler's log-probs, advantages, a ragged mask."""
    rng = np.random.default_rng(5)
    new = -rng.exponential(1.5, (ROWS, SLOTS))
    old, sampler = (new + rng.normal(0, scale, new.shape) for scale in (0.2, 0.3))
    mask = np.arange(SLOTS)[None] < (1 + np.arange(ROWS) % SLOTS)[:, None]
    shape = (ROWS, SLOTS) if of_tokens else ROWS
    return new, old, sampler, rng.normal(0, 1, shape), mask


def of_batch(config, seed=0):
    """Which tokens are held back, as the run asks for it; all of any if nothing is to be."""
    _, old, _, advantages, mask = map(jnp.asarray, arrays())
    if config.covariance.control is None:
        return None
    return held_back(config.covariance, old, advantages, mask, jax.random.key(seed))


def by_hand(config, new, old, sampler, advantages, mask, held):
    """The loss in loops; the reference's log-probs are the sampler's."""
    high = 1.28 if config.loss_type == "dapo" else 1.2
    control, cap = config.covariance.control, config.importance.cap
    total, rows, tokens = 0.0, [], mask.sum()
    for b in range(ROWS):
        sequence, length = [], mask[b].sum()
        far = sum(old[b, t] - sampler[b, t] for t in range(length))
        of_row = sum(new[b, t] - old[b, t] for t in range(length))
        for t in range(length):
            a = advantages[b]
            ratio = np.exp(of_row if config.loss_type == "rloo" else new[b, t] - old[b, t])
            clipped = ratio if control == "kl" else min(max(ratio, 0.8), high)
            term = -min(ratio * a, clipped * a)
            if config.loss_type == "reinforce":
                term = -a * new[b, t]
            if config.loss_type == "rloo":
                term /= length  # one a sequence, spread over its tokens
            if held is not None and held[b, t] and control == "clip":
                term = 0.0
            if held is not None and held[b, t] and control == "kl":
                term += config.covariance.beta * (ratio - np.log(ratio) - 1)
            if cap:
                apart = far if config.importance.level == "sequence" else old[b, t] - sampler[b, t]
                term *= min(np.exp(apart), cap)
            if config.beta:
                d = sampler[b, t] - new[b, t]
                term += config.beta * (np.exp(d) - d - 1)
            sequence.append(term)
        rows.append(sum(sequence) / (length if config.loss_type == "grpo" else 1))
        total += sum(sequence)
    return total / tokens if config.loss_type == "dapo" else sum(rows) / ROWS


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_value_and_gradient_by_hand_and_in_parts(config, x64):
    new, old, sampler, advantages, mask = arrays()
    held = of_batch(config)
    ref, counts = sampler if config.beta else None, normalizer_of(jnp.asarray(mask))

    def loss(new, rows=slice(None)):
        pick = lambda x: None if x is None else jnp.asarray(x)[rows]
        given = map(pick, (old, ref, advantages, mask))
        beside = None, pick(sampler), pick(held)
        return policy_loss(config, new[rows], *given, counts, *beside)

    whole = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = whole(jnp.asarray(new))
    held = None if held is None else np.asarray(held)
    found = by_hand(config, new, old, sampler, advantages, mask, held)
    np.testing.assert_allclose(value, found, rtol=1e-12)
    step = 1e-6
    for b, t in np.ndindex(new.shape):
        bump = step * (np.arange(ROWS * SLOTS).reshape(new.shape) == b * SLOTS + t)
        around = (by_hand(config, x, *arrays()[1:], held) for x in (new + bump, new - bump))
        slope = float(np.subtract(*around)) / (2 * step)
        np.testing.assert_allclose(gradient[b, t], slope, rtol=0, atol=2e-9)

    # Rows in parts, as micro-batches are: the same number, since what is held back is the batch's.
    for parts in (2, 3):
        pieces = [loss(jnp.asarray(new), slice(i, None, parts)) for i in range(parts)]
        np.testing.assert_allclose(sum(x for x, _ in pieces), value, rtol=0, atol=1e-12)
        for name in metrics.keys() - {"sampling/logp_difference/max"}:
            np.testing.assert_allclose(sum(m[name] for _, m in pieces), metrics[name], atol=1e-12)

    apart = np.abs(old - sampler)[mask]
    np.testing.assert_allclose(metrics["sampling/logp_difference/mean"], apart.mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["sampling/logp_difference/max"], apart.max(), rtol=1e-12)
    if config.importance.cap:
        assert 0.05 < metrics["sampling/importance_ratio/capped"] < 0.95
    if held is not None:
        share = held.sum() / mask.sum()
        np.testing.assert_allclose(metrics["covariance/held_back"], share, rtol=1e-6)


def test_the_ratio_as_a_metric(x64):
    new, old, sampler, advantages, mask = map(jnp.asarray, arrays())
    for level, cap in (("token", 1.1), ("sequence", 1.2)):
        config = LossConfig(importance=ImportanceConfig(cap, level))
        given = new, old, None, advantages, mask, None, None, sampler
        metrics = policy_loss(config, *given)[1]
        apart = np.where(mask, old - sampler, 0)
        ratio = np.exp(apart if level == "token" else apart.sum(axis=1, keepdims=True) + 0 * apart)
        mean, capped = ratio[mask].mean(), (ratio[mask] > cap).mean()
        np.testing.assert_allclose(metrics["sampling/importance_ratio/mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(metrics["sampling/importance_ratio/capped"], capped, rtol=1e-6)


def test_without_old_log_probs_the_trainers_own_are_compared(x64):
    """On the first pass the update itself has them: a constant to the weights' gradient."""
    new, _, sampler, advantages, mask = map(jnp.asarray, arrays())
    config = LossConfig("dapo", importance=ImportanceConfig(1.1))

    def loss(new, old):
        return policy_loss(config, new, old, None, advantages, mask, None, None, sampler)[0]

    value, gradient = jax.value_and_grad(loss)(new, None)
    weights = np.minimum(np.exp(new - sampler), 1.1)
    terms = np.where(mask, weights * np.asarray(advantages)[:, None], 0) / mask.sum()
    np.testing.assert_allclose(value, -terms.sum(), rtol=1e-12)
    np.testing.assert_allclose(gradient, -terms, rtol=1e-12)
    np.testing.assert_allclose(gradient, jax.grad(loss)(new, new), rtol=1e-12)


@pytest.mark.parametrize("of_tokens", [False, True])
def test_which_tokens_are_held_back(of_tokens, x64):
    """Of N tokens ⌊share N⌋, at least one: the largest covariances, or some within bounds."""
    _, old, _, advantages, mask = arrays(of_tokens)
    wide = advantages if of_tokens else np.repeat(advantages[:, None], SLOTS, axis=1)
    a, logps = wide[mask], old[mask]
    cov = (a - a.mean()) * (logps - logps.mean())
    given = tuple(map(jnp.asarray, (old, advantages, mask)))
    np.testing.assert_allclose(np.asarray(covariances(*given))[mask], cov, rtol=1e-12)
    assert not np.asarray(covariances(*given))[~mask].any()
    count = len(cov)
    for share in (1e-6, 0.2, 0.5, 1.0):
        wanted = max(int(share * count), 1)
        largest = held_back(CovarianceConfig("kl", share), *given, jax.random.key(0))
        assert set(np.flatnonzero(largest[mask])) == set(np.argsort(-cov)[:wanted])
        low, high = np.quantile(cov, [0.31, 0.79])
        clip = CovarianceConfig("clip", share, (float(low), float(high)))
        inside = np.flatnonzero((cov > low) & (cov < high))
        drawn = [held_back(clip, *given, jax.random.key(i)) for i in range(20)]
        for x in drawn:
            assert not np.asarray(x)[~mask].any()
            assert set(np.flatnonzero(x[mask])) <= set(inside)
            assert x.sum() == min(wanted, len(inside))
        if 2 < wanted < len(inside):  # each has its turn
            assert np.array_equal(np.flatnonzero(sum(x[mask].astype(int) for x in drawn)), inside)
    none = CovarianceConfig("clip", 0.5, (1e3, 2e3))
    assert not held_back(none, *given, jax.random.key(0)).any()


def test_kl_cov_at_ratio_1_adds_no_gradient(x64):
    """The slope of the penalty is β (ρ − 1): rounding gives it no sign."""
    new, _, _, advantages, mask = map(jnp.asarray, arrays())
    config = LossConfig("dapo", covariance=CovarianceConfig("kl", 1.0))
    beside = None, None, None, jnp.ones_like(mask)
    loss = lambda new, old, c, b: policy_loss(c, new, old, None, advantages, mask, *b)[0]
    plain = jax.grad(loss)(new, new, LossConfig("dapo"), (None, None))
    np.testing.assert_allclose(jax.grad(loss)(new, new, config, beside), plain, rtol=1e-14)
    moved = jax.grad(loss)(new, new - 1e-3, config, beside)
    weight = np.where(mask, (1 - np.asarray(advantages)[:, None]) * np.exp(1e-3) - 1, 0)
    np.testing.assert_allclose(moved, weight / mask.sum(), rtol=1e-10)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: ImportanceConfig(0.0), "^loss.importance.cap must be positive, got 0.0$"),
        (lambda: ImportanceConfig(level="sequence"), "level needs loss.importance.cap, which is"),
        (lambda: ImportanceConfig(support=True), "support needs loss.importance.cap, which"),
        (lambda: CovarianceConfig("kl", 0.0), r"share must lie in \(0, 1\], got 0.0"),
        (lambda: CovarianceConfig("clip", bounds=(2.0, 1.0)), "must be 2 that ascend, got"),
        (lambda: CovarianceConfig("clip", beta=2.0), "beta is of no use to control clip, got 2.0"),
        (lambda: CovarianceConfig(share=0.1), "share is of no use to control None, got 0.1"),
        (lambda: LossConfig("rloo", importance=ImportanceConfig(2.0)), "be 'sequence' for rloo"),
        (lambda: LossConfig("gspo", covariance=CovarianceConfig("clip")), "no use to gspo, which"),
        (lambda: LossConfig(epsilon=0.1, covariance=CovarianceConfig("kl")), "takes the clip"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(build, said):
    with pytest.raises(JaxdynError, match=said):
        build()


def test_what_is_missing_is_named():
    new, old, _, advantages, mask = map(jnp.asarray, arrays())
    given = new, old, None, advantages, mask
    config = LossConfig(importance=ImportanceConfig(2.0))
    with pytest.raises(JaxdynError, match="there are no log-probs of the sampler"):
        policy_loss(config, *given)
    config = LossConfig(covariance=CovarianceConfig("clip"))
    with pytest.raises(JaxdynError, match="no old log-probs or no tokens held back"):
        policy_loss(config, *given)
    assert dataclasses.replace(config).clip_range == (0.8, 1.2)
