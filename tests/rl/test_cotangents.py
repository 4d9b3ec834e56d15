"""∂loss/∂f in its compact form, against automatic differentiation of the loss as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.rl import (
    LOSSES,
    CovarianceConfig,
    ImportanceConfig,
    LossConfig,
    logit_cotangents,
    normalizer_of,
    policy_loss,
    token_statistics,
)

ROWS, SLOTS, VOCAB, TEMPERATURE = 6, 5, 9, 0.7
KL = {"beta": 0.3, "entropy_coefficient": 0.2}
CONFIGS = {name: LossConfig(loss_type=name, **KL) for name in LOSSES}
CONFIGS |= {
    "grpo plain": LossConfig(),
    "grpo corrected": LossConfig(beta=0.3, use_bias_correction_kl=True),
    "grpo dual clip": LossConfig(delta=1.25, entropy_coefficient=0.1),
    "gspo wide": LossConfig(loss_type="gspo", epsilon=0.05, epsilon_high=0.06, **KL),
    "grpo weighed": LossConfig(importance=ImportanceConfig(1.1), **KL),
    "rloo weighed": LossConfig("rloo", importance=ImportanceConfig(1.3, "sequence"), **KL),
    "grpo clip-cov": LossConfig(covariance=CovarianceConfig("clip"), **KL),
    "dapo kl-cov": LossConfig("dapo", covariance=CovarianceConfig("kl"), **KL),
    "cispo capped": LossConfig(loss_type="cispo", epsilon_high=1.1, **KL),
}


def batch(config):
    """Logits, and what the loss wants: ragged completions, old and reference log-probs."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(2 * rng.standard_normal((ROWS, SLOTS, VOCAB)))
    ids = jnp.asarray(rng.integers(0, VOCAB, (ROWS, SLOTS)))
    mask = jnp.arange(SLOTS)[None] < jnp.asarray([5, 1, 3, 4, 2, 5])[:, None]
    logps = token_statistics(logits, ids, TEMPERATURE).logps
    old, ref = (logps + scale * rng.standard_normal((ROWS, SLOTS)) for scale in (0.3, 0.5))
    of_tokens = config.loss_type in ("ppo", "reinforce_plus_plus")
    advantages = jnp.asarray(rng.standard_normal((ROWS, SLOTS) if of_tokens else ROWS))
    return logits, ids, (old, ref, advantages, mask, normalizer_of(mask, 8))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_whole_losses_gradient(config, x64):
    logits, ids, rest = batch(config)
    beside = rest[0] + 0.3 * jnp.sin(jnp.arange(ROWS * SLOTS)).reshape(ROWS, SLOTS), ids % 2 == 0

    def loss(logits):
        found = token_statistics(logits, ids, TEMPERATURE)
        return policy_loss(config, found.logps, *rest, found.entropy, *beside)

    (_, metrics), expected = jax.value_and_grad(loss, has_aux=True)(logits)
    clips = [float(x) for name, x in metrics.items() if name.startswith("clip_ratio")]
    unclipped = config.loss_type == "cispo" or config.covariance.control == "kl"
    assert not clips or max(clips) > 0 or unclipped  # where it is capped, below
    found = token_statistics(logits, ids, TEMPERATURE)
    compact = logit_cotangents(config, found.logps, *rest, found.entropy, *beside)
    whole = compact.whole(logits, ids, TEMPERATURE)
    np.testing.assert_allclose(whole, expected, rtol=1e-10, atol=1e-15)
    mask = np.asarray(rest[3])
    assert not whole[~mask].any() and not compact.of_logp[~mask].any()
    assert np.abs(expected).max() > 1e-3
    assert bool(np.any(compact.of_entropy)) == bool(config.entropy_coefficient)


def test_clipped_tokens_and_no_entropy(x64):
    """By hand: GRPO's a is −A ρ / (length B), and 0 where the clip takes the ratio's place."""
    logits, ids, (old, _, advantages, mask, counts) = batch(LossConfig())
    logps = token_statistics(logits, ids, TEMPERATURE).logps
    found = logit_cotangents(LossConfig(), logps, old, None, advantages, mask, counts)
    ratio, a = np.exp(logps - old), np.asarray(advantages)[:, None]
    clipped = ((ratio > 1.2) & (a > 0)) | ((ratio < 0.8) & (a < 0))
    assert 2 < (clipped & mask).sum() < mask.sum() - 3
    lengths = np.asarray(mask.sum(axis=1, keepdims=True))
    expected = np.where(mask & ~clipped, -a * ratio / lengths / ROWS, 0)
    np.testing.assert_allclose(found.of_logp, expected, rtol=1e-12)
    assert not found.of_entropy.any()


def test_temperature_0_is_read_as_1(x64):
    logits, ids, rest = batch(LossConfig())
    logps = token_statistics(logits, ids).logps
    found = logit_cotangents(LossConfig(), logps, *rest)
    assert np.array_equal(found.whole(logits, ids, 0.0), found.whole(logits, ids, 1.0))
