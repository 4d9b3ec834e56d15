"""Diversity measures against direct counting with sets and counters of tuples."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from jaxdyn.dynamics.diversity import (
    distinct_n,
    diversity_metrics,
    ead,
    one_per_prompt,
    self_bleu,
    unique_share,
    vendi_score,
)

KEYS = ["distinct_1", "distinct_2", "distinct_3", "ead", "unique", "vendi"]


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


def grams(sequence, n):
    return Counter(tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))


def counted_vendi(sequences):
    """The kernel pair by pair, its entropy by a matrix logarithm's eigenvalues."""

    def product(a, b):
        if not len(a) and not len(b):
            return 1.0
        return sum(c * grams(b, n)[g] for n in (1, 2, 3, 4) for g, c in grams(a, n).items())

    size = len(sequences)
    kernel = np.zeros((size, size))
    for i, j in itertools.product(range(size), repeat=2):
        a, b = sequences[i], sequences[j]
        kernel[i, j] = product(a, b) / math.sqrt(product(a, a) * product(b, b))
    values = np.linalg.eigvals(kernel / size).real
    return math.exp(-sum(v * math.log(v) for v in values if v > 1e-15))


def counted_bleu(sequences):
    """Each against the others, by counters; None where there is nothing to compare."""
    sequences = [s for s in sequences if len(s)]
    if len(sequences) < 2:
        return None
    scores = []
    for i, mine in enumerate(sequences):
        others = sequences[:i] + sequences[i + 1 :]
        score = 1.0
        for n in (1, 2, 3, 4):
            best = Counter()
            for other in others:
                best |= grams(other, n)
            matched, drawn = (grams(mine, n) & best).total(), grams(mine, n).total()
            score *= (matched + (n > 1)) / (drawn + (n > 1))
        nearest = min((abs(len(o) - len(mine)), len(o)) for o in others)[1]
        scores.append(min(1, math.exp(1 - nearest / len(mine))) * score**0.25)
    return sum(scores) / len(scores)


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
    vendi = [counted_vendi(group) for group in groups]
    assert metrics["vendi"] == pytest.approx(np.mean(vendi), rel=1e-12)
    bleu = [counted_bleu(group) for group in groups]
    assert metrics["self_bleu"] == pytest.approx(np.mean(bleu), rel=1e-12)
    assert set(metrics) == {*KEYS, "self_bleu"}
    assert len({*vendi, *bleu}) == 10


@pytest.mark.parametrize("seed", range(6))
def test_groups_of_every_size_and_sequences_of_every_length(seed):
    """One after another and all together: none sees its neighbours."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, 3, rng.integers(0, 7)).tolist()
    groups = [[draw() for _ in range(size)] for size in (0, 1, 2, 5, 3)]
    for group in groups[1:]:
        assert vendi_score(group) == pytest.approx(counted_vendi(group), rel=1e-9)
        assert self_bleu(group) == pytest.approx(counted_bleu(group) or 0, rel=1e-12)
    together = diversity_metrics(groups, 3)
    wanted = [counted_vendi(group) for group in groups[1:]]
    assert together["vendi"] == pytest.approx(np.mean(wanted), rel=1e-9)
    wanted = [b for b in map(counted_bleu, groups) if b is not None]
    assert together["self_bleu"] == pytest.approx(np.mean(wanted), rel=1e-12)


def test_the_ends_of_the_scales():
    same, apart = [[1, 2, 3]] * 4, [[1, 2], [3, 4, 5], [6], [7, 8]]
    assert vendi_score(same) == pytest.approx(1, rel=1e-7)
    assert vendi_score(apart) == pytest.approx(4, rel=1e-12)
    assert vendi_score([*same, *apart[1:2]]) < vendi_score(apart[:2]) + 1
    assert self_bleu(same) == pytest.approx(1, rel=1e-12) and self_bleu(apart) == 0
    # Two alike and two of their own: shares 1/2, 1/4, 1/4 of one half, one quarter, one quarter.
    assert vendi_score([[1], [1], [2], [3]]) == pytest.approx(2**1.5, rel=1e-7)


def test_self_bleu_by_hand():
    """1 2 3 and 1 2 4 4: precisions 2/3, 2/3, 1/2, 1 and 2/4, 2/4, 1/3, 1/2; the first is brief."""
    first = math.exp(1 - 4 / 3) * (2 / 3 * 2 / 3 * 1 / 2 * 1) ** 0.25
    second = (2 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25
    assert self_bleu([[1, 2, 3], [1, 2, 4, 4]]) == pytest.approx((first + second) / 2, rel=1e-14)


def test_the_diversity_of_random_text_does_not_grow_with_its_vocabularys_smallness():
    """Uniform text of a small vocabulary: EAD is C / V and more, the Vendi score at most K."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 11, (8, 160)).tolist()
    assert ead(text, 11) > 10
    assert 1 < vendi_score(text) < 8 and 0 < self_bleu(text) < 1


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
    assert diversity_metrics([], 10) == dict.fromkeys(KEYS, 0.0)
    empties = diversity_metrics([[[], []], [[]]], 10)
    assert empties["distinct_1"] == 0.0
    assert empties["unique"] == (1 / 2 + 1) / 2
    assert empties["vendi"] == 1.0
    # Nothing to compare a single completion with: not as if it were like no other.
    assert "self_bleu" not in empties
    assert "self_bleu" not in diversity_metrics([[[1, 2]]], 10)
    # An empty completion adds no n-gram; its prompt's other completion still counts.
    assert diversity_metrics([[[], [4, 4]]], 10)["distinct_1"] == 1 / 2
    # A prompt without n-grams stays out of the mean.
    assert diversity_metrics([[[]], [[4, 4]]], 10)["distinct_1"] == 1 / 2
    assert diversity_metrics([[[4, 5]], [[6, 7]]], 10)["unique"] == 1.0
    assert all(math.isfinite(v) for v in diversity_metrics([[[]], [[1]]], 10).values())


def test_a_vocabulary_too_small_is_named():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ead([[0]], 1)
