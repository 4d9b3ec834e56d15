"""A reward's change by token, against the change itself, every completion listed."""

import itertools

import numpy as np
import pytest

from jaxdyn.dynamics import reward_weights
from jaxdyn.types import JaxdynError


def test_the_weights_give_the_whole_change_however_far_apart_the_policies():
    """Three tokens a completion of a policy that depends on the token before: all 27, each as often
    as the first policy says it."""
    rng = np.random.default_rng(0)
    first, second = (np.log(rng.dirichlet(np.ones(3), size=4)) for _ in range(2))
    every = np.array(list(itertools.product(range(3), repeat=3)))
    before = np.concatenate([np.full((27, 1), 3), every[:, :-1]], axis=1)
    by_token = lambda policy: policy[before, every]
    of_a, of_b = by_token(first), by_token(second)
    rewards = rng.normal(size=27)
    chance = np.exp(of_a.sum(axis=1))
    change = np.exp(of_b.sum(axis=1)) @ rewards - chance @ rewards

    # A pair of completions a prompt, independent: every pair as often as it is sampled.
    pairs = np.array(list(itertools.product(range(27), repeat=2)))
    moved = of_b - of_a
    weights = reward_weights(rewards[pairs], moved.sum(axis=1)[pairs]) * len(pairs)
    each = np.einsum("pg,pgt->p", weights, moved[pairs])
    np.testing.assert_allclose(chance[pairs].prod(axis=1) @ each, change, rtol=1e-12)


def test_to_first_order_it_is_the_policy_gradient():
    rewards = np.array([[1.0, 0.0, 0.0, 0.0]])
    weights = reward_weights(rewards, np.zeros((1, 4)))
    np.testing.assert_allclose(weights, [[1 / 4, -1 / 12, -1 / 12, -1 / 12]], rtol=1e-12)
    near = reward_weights(rewards, np.full((1, 4), 1e-9))
    np.testing.assert_allclose(near, weights, rtol=1e-8)


def test_without_others_of_a_prompt_there_is_no_baseline():
    with pytest.raises(JaxdynError, match="at least 2"):
        reward_weights(np.zeros((3, 1)), np.zeros((3, 1)))
