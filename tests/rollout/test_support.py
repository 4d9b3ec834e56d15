"""The tokens that top-k, top-p and min-p left, and policies renormalised to them, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from jaxdyn.rl import support_log_mass
from jaxdyn.rollout import generate, trim
from jaxdyn.train.policy import support_correction
from jaxdyn.train.sharing import batch_features
from jaxdyn.types import PromptBatch

TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.75, 9, 0.9, 0.05


def left(logits):
    """The tokens that the filters keep of one slot's scaled logits, from the likeliest on."""
    order = np.argsort(-logits)[:TOP_K]
    probs = np.exp(logits[order] - logits[order[0]])
    count = 1 + int(np.searchsorted(np.cumsum(probs / probs.sum()), TOP_P))
    kept = np.zeros(len(logits), bool)
    kept[order[:count][probs[:count] >= MIN_P]] = True
    return kept


def logsumexp(x):
    return np.log(np.exp(x - x.max()).sum()) + x.max()


def test_the_support_and_the_ratio_on_it(x64):
    model, params = oracles.tiny_model("gpt_neox-untied")
    ids = jnp.asarray([[0, 3, 1], [4, 1, 5]], jnp.int32)
    prompts = PromptBatch(ids, jnp.asarray([[False, True, True], [True, True, True]]))
    settings = {"top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P, "temperature": TEMPERATURE}

    def draw(**more):
        sizes = {"num_generations": 2, "max_completion_length": 9, "stop_ids": (2,)}
        return generate(model, params, prompts, jax.random.key(1), **sizes, **settings, **more)

    rollout, plain = trim(draw(support=True)), trim(draw())
    assert plain.support is None
    assert np.array_equal(plain.completion_ids, rollout.completion_ids)

    # The trainer: the same model, moved a little.
    move = lambda x: x + 0.01 * jnp.sin(100 * x)
    policies = params, jax.tree.map(move, params)
    features = [batch_features(model, p["backbone"], rollout) for p in policies]
    logits = [
        np.asarray(model.logits(p["classifier"], f)) / TEMPERATURE
        for p, f in zip(policies, features, strict=True)
    ]
    mask, vocab = np.asarray(rollout.completion_mask), logits[0].shape[-1]
    bits = np.asarray(rollout.support.bits)
    found = np.unpackbits(bits, axis=-1, count=vocab, bitorder="little").astype(bool)
    correction = support_correction(model, policies[1], features[1], rollout.support, TEMPERATURE)
    given = model.logits, policies[1]["classifier"], features[1], rollout.support.bits, TEMPERATURE
    masses = [support_log_mass(*given, chunk=chunk) for chunk in (3, 7, vocab)]
    sizes = set()
    for place in np.argwhere(mask):
        z, moved = (x[*place] for x in logits)
        kept = left(z)
        assert np.array_equal(found[*place], kept)
        assert kept[rollout.completion_ids[*place]]
        sampler, policy = (logsumexp(x[kept]) - logsumexp(x) for x in (z, moved))
        np.testing.assert_allclose(rollout.support.log_mass[*place], sampler, atol=1e-12)
        np.testing.assert_allclose(correction[*place], policy - sampler, atol=1e-12)
        for mass in masses:
            np.testing.assert_allclose(mass[*place], policy, atol=1e-12)
        # So that the ratio of ℓ and the corrected ℓˢ is that of both on the support.
        token = rollout.completion_ids[*place]
        on_support = (moved[token] - logsumexp(moved[kept])) - (z[token] - logsumexp(z[kept]))
        ratio = moved[token] - logsumexp(moved) - (rollout.per_token_logps + correction)[*place]
        np.testing.assert_allclose(ratio, on_support, atol=1e-12)
        sizes.add(kept.sum())
    assert len(sizes) > 1 and max(sizes) < TOP_K
    assert np.abs(correction)[mask].max() > 1e-4 and np.isfinite(np.asarray(correction)).all()
