"""Influence by brute force: the step retrained without one completion, and its tokens apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn.dynamics import contributions, own_tokens, sites_from_rollout
from jaxdyn.rl import LossConfig, logit_cotangents, normalizer_of, policy_loss, token_statistics
from jaxdyn.types import Rollout

LOSS = LossConfig(loss_type="dapo", beta=0.3, entropy_coefficient=0.2)
TEMPERATURE = 0.7


def rollout():
    """Three completions of three prompt slots and three of their own, padded on both sides."""
    ids = np.random.default_rng(3).integers(0, oracles.VOCAB, (2, 3, 3))
    return Rollout(
        prompt_ids=jnp.asarray(ids[0], jnp.int32),
        prompt_mask=jnp.asarray([[1, 1, 1], [0, 1, 1], [0, 0, 1]], bool),
        completion_ids=jnp.asarray(ids[1], jnp.int32),
        completion_mask=jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool),
        per_token_logps=jnp.zeros((3, 3), jnp.float32),
    )


def metric(params):
    """P, some of it zero."""
    rng = np.random.default_rng(9)
    draw = lambda x: jnp.asarray(np.maximum(rng.uniform(-0.5, 2, x.shape), 0))
    return jax.tree.map(draw, params)


def completion_statistics(model, params, r):
    """log π of the completions' tokens and H at the sampler's temperature, straight."""
    view = model.view(params)
    phi = model.features(view["backbone"], r.tokens, r.mask)[:, 2:5]
    logits = model.logits(view["classifier"], phi)
    found = token_statistics(logits, r.completion_ids, TEMPERATURE)
    return found.logps, found.entropy


def batch_of(model, params, r):
    """Old and reference log-probs, and advantages, which clip some tokens."""
    rng = np.random.default_rng(2)
    logps, _ = completion_statistics(model, params, r)
    old, ref = (logps + scale * rng.standard_normal((3, 3)) for scale in (0.2, 0.5))
    return old, ref, jnp.asarray([1.0, -0.5, 0.7])


@functools.partial(jax.jit, static_argnums=0)
def gradient_without(model, params, r, given, kept):
    """∇ of the loss over the completions that are kept, of the whole batch's normalizer."""

    def loss(params):
        logps, entropy = completion_statistics(model, params, r)
        mask = r.completion_mask & kept[:, None]
        counts = normalizer_of(r.completion_mask)
        return policy_loss(LOSS, logps, *given, mask, counts, entropy)[0]

    return jax.grad(loss)(params)


@functools.partial(jax.jit, static_argnums=0)
def statistics_after(model, params, gradient, p, rate, sites):
    """log π of the sites' tokens and H after a step of the given metric."""
    moved = jax.tree.map(lambda x, g, p: x - rate * p * g, params, gradient, p)
    log_probs = jax.nn.log_softmax(oracles.site_logits(model, model.view(moved), sites))
    chosen = jnp.take_along_axis(log_probs, sites.targets[:, None], axis=1)[:, 0]
    return jnp.stack([chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1)])


def weights_of(model, params, r, given):
    logps, entropy = completion_statistics(model, params, r)
    counts = normalizer_of(r.completion_mask)
    found = logit_cotangents(LOSS, logps, *given, r.completion_mask, counts, entropy)
    return np.stack([found.of_logp, found.of_entropy], axis=-1)


@pytest.mark.parametrize("name", ["llama-tied", "gpt_neox-untied"])
def test_what_one_completion_less_would_have_changed(name, x64):
    """The difference and the column agree but for what falls as the square of the step."""
    model, params = oracles.tiny_model(name)
    r, p = rollout(), metric(params)
    sites, given = sites_from_rollout(r, 1, 0), batch_of(model, params, r)
    columns = contributions(
        model,
        params,
        sites,
        r,
        weights=weights_of(model, params, r, given),
        temperature=TEMPERATURE,
        metric=p,
    ).total
    after = lambda kept, rate: statistics_after(
        model, params, gradient_without(model, params, r, given, kept), p, rate, sites
    )
    everyone = jnp.ones(3, bool)
    for u in range(3):
        errors = []
        for rate in (1e-3, 5e-4, 2.5e-4):
            moved = after(everyone, rate) - after(everyone.at[u].set(False), rate)
            errors.append(np.abs(moved - rate * columns[..., u]).max())
        slopes = np.log2(np.divide(errors[:-1], errors[1:]))
        np.testing.assert_allclose(slopes, 2, atol=0.1)
        assert errors[-1] < 1e-2 * 2.5e-4 * np.abs(columns[..., u]).max()


def test_tokens_apart_are_a_completions_and_a_sites_own_is_one_of_them(x64):
    name = "gpt2-tied"
    model, params = oracles.tiny_model(name)
    r, p = rollout(), metric(params)
    sites, given = sites_from_rollout(r, 2, 0), batch_of(model, params, r)
    weights = weights_of(model, params, r, given)
    how = {"weights": weights, "temperature": TEMPERATURE, "metric": p}
    whole = contributions(model, params, sites, r, **how)
    places = np.argwhere(np.asarray(r.completion_mask))
    apart = contributions(model, params, sites, r, places=places, **how)
    row, slot = np.asarray(sites.rows), np.asarray(sites.positions) - 2
    own = own_tokens(model, params, sites, jnp.asarray(weights[row, slot]), TEMPERATURE, p)
    for part in ("representation", "gradient", "cross"):
        tokens, found = getattr(apart, part), getattr(whole, part)
        scale = float(np.abs(found).max())
        joined = jnp.stack([tokens[..., places[:, 0] == u].sum(axis=-1) for u in range(3)], -1)
        np.testing.assert_allclose(joined, found, rtol=0, atol=1e-12 * scale)
        which = [
            np.flatnonzero((places == at).all(axis=1))[0] for at in zip(row, slot, strict=True)
        ]
        expected = tokens[:, np.arange(len(row)), np.array(which)]
        np.testing.assert_allclose(getattr(own, part), expected, rtol=0, atol=1e-12 * scale)
        assert np.abs(expected).min() > 1e-6 * scale
