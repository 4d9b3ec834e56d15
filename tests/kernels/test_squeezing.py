"""The squeezing effect: where the mass goes when an unlikely token is pushed down.

With the features fixed the policy is a linear softmax f = W φ, whose kernel is the representation
component alone. A step against log π(y) at a site changes its logits by η ‖φ‖² (π − e_y): each
token's own share decides what it gets back, so a peaked policy gives it all to its argmax (Ren and
Sutherland 2025, *Learning dynamics of LLM finetuning*, the squeezing effect).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from kernel_oracles import all_sites, some, tiny_model

from jaxdyn import kernels
from jaxdyn.kernels.operator import apply_kernel

V = oracles.VOCAB
U = 2  # the site where the token is pushed down, among the eight that are observed


@pytest.fixture
def policy(x64):
    """A model and its parameters, with a classifier `sharpness` times as large."""
    model, params = tiny_model("gpt_neox-untied")

    def of(sharpness):
        weight = sharpness * params["classifier"]["weight"]
        return model, {**params, "classifier": {"weight": weight}}

    return of


@jax.jit
def log_probs(weight, phi):
    return jax.nn.log_softmax(phi @ weight.T)


def squeezed(policy, sharpness):
    """Log π before, its predicted change per unit step, and the actual change of a step η.

    The step is taken on W alone: W + η (π − e_y) φᵀ, with y the least likely token of site U.
    """
    model, params = policy(sharpness)
    sites = all_sites()
    phi = model.features(params["backbone"], sites.tokens, sites.mask)
    phi, weight = phi[sites.rows, sites.positions], params["classifier"]["weight"]
    before = log_probs(weight, phi)
    pi = jnp.exp(before)
    down = pi[U] - jax.nn.one_hot(jnp.argmin(pi[U]), V)
    moved = apply_kernel(model, params, sites, down[None], some(sites, np.array([U])))
    predicted = moved.representation - jnp.sum(pi * moved.representation, axis=1, keepdims=True)
    change = lambda eta: log_probs(weight + eta * jnp.outer(down, phi[U]), phi) - before
    return before, predicted, change


def test_the_prediction_of_a_classifier_step_misses_by_its_square(policy):
    """At the pushed site and at seven others: halving η quarters the residual."""
    _, predicted, change = squeezed(policy, 3.0)
    sizes = 1e-3 * 0.5 ** np.arange(4)
    residuals = [np.linalg.norm(change(eta) - eta * predicted, axis=1) for eta in sizes]
    slopes = np.polyfit(np.log(sizes), np.log(residuals), 1)[0]
    np.testing.assert_allclose(slopes, 2, atol=0.02)


def test_a_peaked_policy_gives_the_mass_to_its_argmax(policy):
    before, predicted, change = squeezed(policy, 3.0)
    pi, actual = jnp.exp(before[U]), change(0.01)[U]
    assert pi.max() > 0.7
    others = np.arange(V) != int(jnp.argmax(pi))
    for delta in (predicted[U], actual):
        assert delta[~others] > 0
        assert np.all(delta[others] < 0)


def test_a_uniform_policy_spreads_it_evenly(policy):
    """With π = 1/V every other token gains the same: ‖φ‖² / V per unit step."""
    before, predicted, change = squeezed(policy, 0.0)
    others = np.arange(V) != int(jnp.argmin(before[U]))
    for delta in (predicted[U], change(0.01)[U]):
        assert np.all(delta[others] > 0)
        np.testing.assert_allclose(delta[others], delta[others][0], rtol=1e-12)


def test_the_log_prob_kernel_says_the_same(policy):
    """−K(k, y) over all tokens k of site U is what pushing y down there does to log π(k)."""
    before, predicted, _ = squeezed(policy, 3.0)
    model, params = policy(3.0)
    every = some(all_sites(), np.full(V, U))
    every = dataclasses.replace(every, targets=jnp.arange(V, dtype=jnp.int32))
    lowest = some(every, np.array([int(jnp.argmin(before[U]))]))
    kernel = kernels.log_prob_kernel(model, params, every, lowest)
    scale = float(jnp.abs(predicted[U]).max())
    np.testing.assert_allclose(-kernel.representation[:, 0], predicted[U], atol=1e-12 * scale)
