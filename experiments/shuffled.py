"""Rewards handed out at random within a group: what is left is what RL does without a signal.

A group's rewards stay what they were, and so do their mean, the advantages' sizes, best-of-N and
pass@k; only whose they are is drawn. The draw follows from the texts, so that a step that is taken
again is the same. A reward is named like any other: `--reward.functions shuffled:anagram`.
"""

import hashlib
from collections.abc import Callable
from itertools import groupby

import numpy as np

from jaxdyn.rewards.verifiable import Anagram, ContainsWords, Finished, Length, NumericMatch

Scores = list[float]


def within_groups(prompts: list[str], completions: list[str], scores: Scores) -> Scores:
    """The scores of each run of equal prompts, permuted uniformly."""
    found = []
    for _, group in groupby(range(len(prompts)), key=prompts.__getitem__):
        rows = list(group)
        text = "\0".join([prompts[rows[0]], *(completions[row] for row in rows)])
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        order = np.random.default_rng(seed).permutation(rows)
        found += [scores[row] for row in order]
    return found


def shuffled(score: Callable[..., Scores]) -> Callable[..., Scores]:
    """`score` with each group's rewards permuted."""

    def permuted(prompts, completions, **columns):
        scores = score(prompts, completions, **columns)
        return within_groups(list(prompts), list(completions), list(scores))

    return permuted


def _story(prompts, completions, **columns):
    words = ContainsWords()(prompts, completions, **columns)
    ends = Finished()(prompts, completions, **columns)
    return [0.5 * a + 0.5 * b for a, b in zip(words, ends, strict=True)]


anagram = shuffled(Anagram())
story = shuffled(_story)
numeric_match = shuffled(NumericMatch())
length = shuffled(Length(maximum=0, slack=9))
