"""How varied a set of completions is: distinct n-grams, EAD and the share of unique ones.

Every measure takes K token-id (or word) sequences. `diversity_metrics` takes a set per prompt and
averages over prompts; `one_per_prompt` makes the set that measures variety across prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Completions = Sequence[Any]
"""K sequences of token ids or words: lists, tuples or one-dimensional arrays."""

EAD_ORDERS = 5


def diversity_metrics(
    completions_by_prompt: Sequence[Completions], vocab_size: int
) -> dict[str, float]:
    """Mean over prompts of each measure over a prompt's K completions.

    Keys: `distinct_1`, `distinct_2`, `distinct_3` (`distinct_n`), `ead` (V = `vocab_size`) and
    `unique` (`unique_share`). A prompt enters a mean only if it has something to count (an n-gram
    of that length, a completion); a measure with nothing to count at any prompt is 0, so that no
    metric is ever NaN. Groups of different sizes weigh the same.
    """
    distinct, drawn = ngram_counts(completions_by_prompt, EAD_ORDERS)
    shares = _ratio(distinct, drawn)
    metrics = {f"distinct_{n}": _mean(shares[:, n - 1]) for n in (1, 2, 3)}
    metrics["ead"] = _mean(_ead(distinct, drawn, vocab_size))
    metrics["unique"] = _mean(np.array([_unique(group) for group in completions_by_prompt]))
    return metrics


def one_per_prompt(completions_by_prompt: Sequence[Completions]) -> list[Completions]:
    """Each prompt's first completion as one single group, for variety across prompts."""
    return [[group[0] for group in completions_by_prompt if len(group)]]


def distinct_n(completions: Completions, n: int) -> float:
    """Distinct n-grams over all n-grams of K sequences, N_n / C_n; 0 without an n-gram."""
    distinct, drawn = ngram_counts([completions], n)
    return _mean(_ratio(distinct, drawn)[:, n - 1])


def ead(completions: Completions, vocab_size: int) -> float:
    """Expectation-adjusted distinct n-grams, averaged over the n = 1..5 that occur.

    EAD_n = N / (V (1 - ((V - 1) / V)^C)): N distinct n-grams of C drawn, over the number expected
    from C uniform draws out of V. Unlike distinct-n it does not fall merely because more was
    written. Its value means something only beside its V, and passes 1 where n-grams of n > 1, of
    which there are more than V, vary more than V would. 0 without tokens.

    Source: Liu et al., Rethinking and Refining the Distinct Metric, ACL 2022, with the same V at
    every n.
    """
    return _mean(_ead(*ngram_counts([completions], EAD_ORDERS), vocab_size))


def unique_share(completions: Completions) -> float:
    """Different completions over all K of them: 1 if no two are equal, 1/K if all are; K = 0: 0."""
    return _mean(np.array([_unique(completions)]))


def ngram_counts(groups: Sequence[Completions], orders: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct and drawn n-grams of each of P groups for n = 1..orders, both [P, orders].

    An n-gram's code is the rank of the pair (code of its first n - 1 tokens, last token) among
    those that occur, starting from the group's index; so codes stay small for any n and
    vocabulary, and one sort an order serves all groups.
    """
    distinct = np.zeros((len(groups), orders), dtype=np.int64)
    drawn = np.zeros_like(distinct)
    sequences = [np.asarray(c) for group in groups for c in group]
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    if lengths.sum() == 0:
        return distinct, drawn
    tokens = np.concatenate([sequence for sequence in sequences if len(sequence)])
    vocabulary, tokens = np.unique(tokens, return_inverse=True)
    group = np.repeat(np.repeat(np.arange(len(groups)), [len(g) for g in groups]), lengths)
    left = np.concatenate([np.arange(length, 0, -1) for length in lengths])  # tokens to the end
    starts, codes = np.arange(len(tokens)), group
    for n in range(1, orders + 1):
        kept = left[starts] >= n
        starts = starts[kept]
        pairs = codes[kept] * len(vocabulary) + tokens[starts + n - 1]
        _, first, codes = np.unique(pairs, return_index=True, return_inverse=True)
        distinct[:, n - 1] = np.bincount(group[starts[first]], minlength=len(groups))
        drawn[:, n - 1] = np.bincount(group[starts], minlength=len(groups))
    return distinct, drawn


def _ead(distinct: np.ndarray, drawn: np.ndarray, vocab_size: int) -> np.ndarray:
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
    expected = -vocab_size * np.expm1(drawn * np.log1p(-1.0 / vocab_size))
    per_order = _ratio(distinct, expected)
    present = np.isfinite(per_order)
    return _ratio(np.where(present, per_order, 0.0).sum(axis=1), present.sum(axis=1))


def _unique(group: Completions) -> float:
    if not len(group):
        return np.nan
    return len({tuple(np.asarray(completion).tolist()) for completion in group}) / len(group)


def _ratio(count: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.divide(count, total, out=np.full(count.shape, np.nan), where=total > 0)


def _mean(values: np.ndarray) -> float:
    """The mean of what is there; 0 if nothing is."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else 0.0
