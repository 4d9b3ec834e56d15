"""Diversity measures against direct counting with sets of tuples."""

import math

import numpy as np
import pytest

from jaxdyn.dynamics.diversity import (
    distinct_n,
    diversity_metrics,
    ead,
    one_per_prompt,
    unique_share,
)


def counted(sequences, n):
    """Distinct and drawn n-grams, the plain way."""
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)), len(grams)


def counted_ead(sequences, vocab_size):
    values = []
    for n in range(1, 6):
        distinct, drawn = counted(sequences, n)
        if drawn:
            values.append(distinct / (vocab_size * (1 - ((vocab_size - 1) / vocab_size) ** drawn)))
    return sum(values) / len(values)


def random_groups(seed=0, prompts=5, completions=4, vocab_size=7):
    rng = np.random.default_rng(seed)
    return [
        [
            [*rng.integers(0, vocab_size, rng.integers(0, 12)).tolist(), vocab_size]
            for _ in range(completions)
        ]
        for _ in range(prompts)
    ]


def test_hand_counted_values():
    completions = [[1, 2, 1, 2], [1, 2, 3]]
    # unigrams 1212123: 3 of 7; bigrams 12 21 12 | 12 23: 3 of 5; trigrams 121 212 | 123: 3 of 3.
    assert distinct_n(completions, 1) == 3 / 7
    assert distinct_n(completions, 2) == 3 / 5
    assert distinct_n(completions, 3) == 1.0
    # V = 2, one unigram drawn twice: 1 / (2 (1 - 1/4)) = 2/3; one bigram: 1 / (2 (1 - 1/2)) = 1.
    assert ead([[5, 5]], 2) == pytest.approx((2 / 3 + 1) / 2, rel=1e-14)
    assert unique_share([[1], [1], [2], [1, 2]]) == 3 / 4


def test_every_measure_equals_plain_counting_averaged_over_prompts():
    groups = random_groups()
    metrics = diversity_metrics(groups, vocab_size=8)
    for n in (1, 2, 3):
        shares = [d / c for d, c in (counted(group, n) for group in groups)]
        assert metrics[f"distinct_{n}"] == pytest.approx(np.mean(shares), rel=1e-14)
    assert metrics["ead"] == pytest.approx(np.mean([counted_ead(g, 8) for g in groups]), rel=1e-12)
    unique = [len({tuple(c) for c in group}) / len(group) for group in groups]
    assert metrics["unique"] == pytest.approx(np.mean(unique), rel=1e-14)
    assert set(metrics) == {"distinct_1", "distinct_2", "distinct_3", "ead", "unique"}


def test_ead_does_not_cancel_in_a_large_vocabulary():
    # One token of V = 10^9 is exactly as varied as expected.
    assert ead([[3]], 10**9) == pytest.approx(1.0, rel=1e-12)


def test_across_prompts_takes_one_completion_each():
    groups = [[[1, 2], [9]], [], [[1, 2]], [[3, 4], [8, 8]]]
    (group,) = one_per_prompt(groups)
    assert group == [[1, 2], [1, 2], [3, 4]]
    metrics = diversity_metrics(one_per_prompt(groups), vocab_size=10)
    assert metrics["unique"] == pytest.approx(2 / 3)
    assert metrics["distinct_2"] == pytest.approx(2 / 3)


def test_words_arrays_and_ids_count_alike():
    words = [["the", "cat", "the"], ["a", "cat"]]
    ids = [[0, 1, 0], [2, 1]]
    arrays = [np.array(c) for c in ids]
    assert diversity_metrics([words], 50) == diversity_metrics([ids], 50)
    assert diversity_metrics([arrays], 50) == diversity_metrics([ids], 50)


def test_n_grams_do_not_cross_completions_or_prompts():
    assert distinct_n([[1, 2], [3, 4]], 2) == 1.0
    assert diversity_metrics([[[1]], [[2]]], 9)["distinct_2"] == 0.0  # no bigram anywhere


def test_degenerate_groups_give_finite_values():
    assert diversity_metrics([], 10) == dict.fromkeys(
        ["distinct_1", "distinct_2", "distinct_3", "ead", "unique"], 0.0
    )
    empties = diversity_metrics([[[], []], [[]]], 10)
    assert empties["distinct_1"] == 0.0
    assert empties["unique"] == (1 / 2 + 1) / 2
    # An empty completion adds no n-gram; its prompt's other completion still counts.
    assert diversity_metrics([[[], [4, 4]]], 10)["distinct_1"] == 1 / 2
    # A prompt without n-grams stays out of the mean.
    assert diversity_metrics([[[]], [[4, 4]]], 10)["distinct_1"] == 1 / 2
    assert diversity_metrics([[[4, 5]], [[6, 7]]], 10)["unique"] == 1.0
    assert all(math.isfinite(v) for v in diversity_metrics([[[]], [[1]]], 10).values())


def test_a_vocabulary_too_small_is_named():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ead([[0]], 1)
