"""pass@k and best-of-N against every subset, and the interval's coverage by simulation."""

from itertools import combinations
from math import comb, sqrt

import numpy as np
import pytest
from scipy import stats

from jaxdyn.dynamics.sampling import (
    best_of_n,
    mean_with_interval,
    pass_at_k,
    powers_of_two,
    prompt_means,
)


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_completion(k):
    n = 6
    for c in range(n + 1):
        outcomes = [1] * c + [0] * (n - c)
        subsets = list(combinations(outcomes, k))
        expected = sum(map(max, subsets)) / len(subsets)
        found = pass_at_k(np.array([c]), np.array([n]), k)
        np.testing.assert_allclose(found, [expected], rtol=1e-14, atol=1e-15)


def test_pass_at_k_takes_each_prompts_own_count():
    found = pass_at_k(np.array([1, 1, 0, 2]), np.array([4, 3, 1, 2]), 2)
    np.testing.assert_allclose(found, [1 / 2, 2 / 3, np.nan, 1], rtol=1e-15)
    # Many completions: the two binomials have hundreds of digits.
    exact = 1 - comb(1990, 1000) / comb(2000, 1000)
    np.testing.assert_allclose(
        pass_at_k(np.array([10]), np.array([2000]), 1000), [exact], rtol=1e-12
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_is_the_mean_of_the_subsets_maxima(n):
    rewards = np.random.default_rng(0).normal(size=(5, 7))
    rewards[2, 3:] = rewards[2, 0]  # ties
    expected = [np.mean([max(s) for s in combinations(row, n)]) for row in rewards]
    np.testing.assert_allclose(best_of_n(rewards, n), expected, rtol=1e-13)


def test_best_of_n_leaves_out_what_was_not_scored():
    rewards = np.random.default_rng(1).normal(size=(3, 6))
    rewards[1, [0, 4]] = np.nan
    rewards[2] = np.nan
    for n in range(1, 7):
        kept = [row[~np.isnan(row)] for row in rewards]
        expected = [
            np.mean([max(s) for s in combinations(row, n)]) if len(row) >= n else np.nan
            for row in kept
        ]
        np.testing.assert_allclose(best_of_n(rewards, n), expected, rtol=1e-13)


def test_best_of_n_of_many_completions():
    """Ranks as rewards have a closed form: the largest of n of 1..M is n (M + 1) / (n + 1)."""
    m = 3000
    rewards = np.random.default_rng(2).permutation(np.arange(1.0, m + 1))[None]
    for n in (1, 2, 100, 1500, 2999, 3000):
        np.testing.assert_allclose(best_of_n(rewards, n), [n * (m + 1) / (n + 1)], rtol=1e-12)


def test_of_correct_or_not_the_best_of_n_is_pass_at_n():
    outcomes = (np.random.default_rng(3).random((20, 9)) < 0.3).astype(float)
    correct, scored = outcomes.sum(axis=1).astype(int), np.full(20, 9)
    for n in range(1, 10):
        passed = pass_at_k(correct, scored, n)
        np.testing.assert_allclose(best_of_n(outcomes, n), passed, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("function", [best_of_n, lambda x, n: pass_at_k(x, x, n)])
def test_at_least_one_completion_is_drawn(function):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        function(np.ones((2, 3)) if function is best_of_n else np.ones(2, int), 0)


def test_the_interval_is_students():
    values = np.random.default_rng(4).normal(size=12)
    found = mean_with_interval(np.append(values, np.nan), 0.9)
    low, high = stats.t.interval(0.9, 11, values.mean(), stats.sem(values))
    np.testing.assert_allclose(found, (values.mean(), low, high), rtol=1e-12)
    np.testing.assert_equal(mean_with_interval(np.array([2.0, np.nan])), (2.0, np.nan, np.nan))
    np.testing.assert_equal(mean_with_interval(np.array([np.nan])), (np.nan,) * 3)


@pytest.mark.parametrize("estimator", ["pass@4", "best of 4"])
def test_the_interval_covers_the_truth_as_often_as_it_says(estimator):
    """2000 evaluations of 64 prompts with 8 completions each.

    pass@4: a prompt's chance of success is uniform, so the truth is 1 - E[(1 - p)^4] = 4/5. Best
    of 4: rewards are normal about a prompt's normal mean, and the truth is the expected largest
    of four normal draws. Both are nearly normal over prompts: 95 % up to four binomial standard
    errors of the simulation, and half a point of bias for the skewness of pass@4.
    """
    rng = np.random.default_rng(5)
    trials, prompts, samples = 2000, 64, 8
    if estimator == "pass@4":
        correct = rng.binomial(samples, rng.random(trials * prompts))
        values, truth = pass_at_k(correct, np.full(len(correct), samples), 4), 4 / 5
    else:
        rewards = rng.normal(size=(trials * prompts, 1)) + rng.normal(
            size=(trials * prompts, samples)
        )
        x = np.linspace(-9, 9, 20001)
        density = 4 * stats.norm.pdf(x) * stats.norm.cdf(x) ** 3
        values, truth = best_of_n(rewards, 4), np.trapezoid(x * density, x)
    intervals = [mean_with_interval(row) for row in values.reshape(trials, prompts)]
    covered = np.mean([e.low <= truth <= e.high for e in intervals])
    assert abs(covered - 0.95) < 4 * sqrt(0.95 * 0.05 / trials) + 0.005


def test_means_over_what_was_scored():
    values = np.array([[1.0, np.nan, 2.0], [np.nan] * 3, [0.0, 0.0, 3.0]])
    np.testing.assert_equal(prompt_means(values), [1.5, np.nan, 1.0])


@pytest.mark.parametrize(
    "largest, expected", [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_powers_of_two(largest, expected):
    assert powers_of_two(largest) == expected
