"""How varied a set of completions is: n-grams, unique completions, Vendi score, self-BLEU.

Every measure takes K token-id (or word) sequences. `diversity_metrics` takes a set per prompt and
averages over prompts; `one_per_prompt` makes the set that measures variety across prompts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

Completions = Sequence[Any]
"""K sequences of token ids or words: lists, tuples or one-dimensional arrays."""

EAD_ORDERS = 5
BLEU_ORDERS = 4


def diversity_metrics(
    completions_by_prompt: Sequence[Completions], vocab_size: int
) -> dict[str, float]:
    """Mean over prompts of each measure over a prompt's K completions.

    Keys: `distinct_1`, `distinct_2`, `distinct_3` (`distinct_n`), `ead` (V = `vocab_size`),
    `unique` (`unique_share`), `vendi` (`vendi_score`) and, if some prompt has two completions to
    compare, `self_bleu` (`self_bleu`). A prompt enters a mean only if it has something to count (an
    n-gram of that length, a completion); a measure with nothing to count at any prompt is 0, so
    that no metric is ever NaN. Groups of different sizes weigh the same.
    """
    grams = ngrams(completions_by_prompt, EAD_ORDERS)
    shares = _ratio(grams.distinct, grams.drawn)
    metrics = {f"distinct_{n}": _mean(shares[:, n - 1]) for n in (1, 2, 3)}
    metrics["ead"] = _mean(_ead(grams, vocab_size))
    metrics["unique"] = _mean(np.array([_unique(group) for group in completions_by_prompt]))
    metrics["vendi"] = _mean(_vendi(grams))
    bleu = _self_bleu(grams)
    return metrics | ({"self_bleu": _mean(bleu)} if np.isfinite(bleu).any() else {})


def one_per_prompt(completions_by_prompt: Sequence[Completions]) -> list[Completions]:
    """Each prompt's first completion as one single group, for variety across prompts."""
    return [[group[0] for group in completions_by_prompt if len(group)]]


def distinct_n(completions: Completions, n: int) -> float:
    """Distinct n-grams over all n-grams of K sequences, N_n / C_n; 0 without an n-gram."""
    grams = ngrams([completions], n)
    return _mean(_ratio(grams.distinct, grams.drawn)[:, n - 1])


def ead(completions: Completions, vocab_size: int) -> float:
    """Expectation-adjusted distinct n-grams, averaged over the n = 1..5 that occur.

    EAD_n = N / (V (1 - ((V - 1) / V)^C)): N distinct n-grams of C drawn, over the number expected
    from C uniform draws out of V. 0 without tokens.

    It means something only where V is well above C. There are V^n n-grams, not V: at n > 1 the
    number expected stays at V while N grows with what was written, so that uniform random text
    of a small vocabulary gets about C / V. Reports show `vendi_score` instead.

    Source: Liu et al., Rethinking and Refining the Distinct Metric, ACL 2022, with the same V at
    every n.
    """
    return _mean(_ead(ngrams([completions], EAD_ORDERS), vocab_size))


def unique_share(completions: Completions) -> float:
    """Different completions over all K of them: 1 if no two are equal, 1/K if all are; K = 0: 0."""
    return _mean(np.array([_unique(completions)]))


def vendi_score(completions: Completions) -> float:
    """The effective number of different completions: K if they share no token, 1 if all are equal.

        exp(-Σ λ_i log λ_i),   λ the eigenvalues of k(a, b) / K

    where k(a, b) is the cosine of the counts of a's and b's n-grams, n = 1..4; completions without
    a token are like each other alone. 0 for no completions.

    Source: Friedman and Dieng, The Vendi Score, TMLR 2023; the kernel is our choice.
    """
    return _mean(_vendi(ngrams([completions], BLEU_ORDERS)))


def self_bleu(completions: Completions) -> float:
    """How like the others a completion is: its BLEU-4 against them, averaged; 1 if all are equal.

        BLEU = min(1, exp(1 - r / c)) (p_1 p_2 p_3 p_4)^(1/4)
        p_1 = m_1 / c_1,   p_n = (m_n + 1) / (c_n + 1) for n > 1

    c_n counts the completion's n-grams and m_n those that are in the other that has most of them,
    c is its length and r the nearest length of another (of two, the shorter). So completions that
    share no token have 0. One without a token takes no part; 0 where fewer than two are left.

    Sources: Zhu et al., Texygen, SIGIR 2018; the smoothing of Lin and Och, ORANGE, COLING 2004.
    """
    return _mean(_self_bleu(ngrams([completions], BLEU_ORDERS)))


class NGrams(NamedTuple):
    """The n-grams of S sequences in P groups, for n = 1, 2, ....

    Attributes:
      sizes: how many sequences each group has, one group after another.
      lengths: how many tokens each sequence has.
      distinct: how many different n-grams of each n each group has.
      entries: for each n, the E cases of an n-gram in a sequence: the n-gram's number (groups share
        none), the sequence's, and how often it is there; in the order of the numbers.
    """

    sizes: Int[np.ndarray, " P"]
    lengths: Int[np.ndarray, " S"]
    distinct: Int[np.ndarray, "P n"]
    entries: list[tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"], Int[np.ndarray, " E"]]]

    def written(self, n: int) -> Int[np.ndarray, " S"]:
        """How many n-grams each sequence has."""
        return np.maximum(self.lengths - n + 1, 0)

    @property
    def drawn(self) -> Int[np.ndarray, "P n"]:
        """How many n-grams of each n each group has."""
        orders = range(1, len(self.entries) + 1)
        return np.stack([self.by_group(self.written(n)).sum(axis=1) for n in orders], axis=1)

    @property
    def places(self) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
        """The group of each sequence, and its place among the group's."""
        before = np.cumsum(self.sizes) - self.sizes
        group = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return group, np.arange(len(group)) - before[group]

    def by_group(self, of_sequences: np.ndarray) -> np.ndarray:
        """An array over sequences as [P, K], 0 where a group has fewer than K."""
        table = np.zeros((len(self.sizes), max(self.sizes, default=0)), of_sequences.dtype)
        table[self.places] = of_sequences
        return table


def ngrams(groups: Sequence[Completions], orders: int) -> NGrams:
    """The n-grams of each of P groups, for n = 1..orders.

    An n-gram's number is the rank of the pair (number of its first n - 1 tokens, last token) among
    those that occur, starting from the group's index; so numbers stay small for any n and
    vocabulary, and one sort an order serves all groups.
    """
    sizes = np.array([len(group) for group in groups], np.int64)
    sequences = [np.asarray(c) for group in groups for c in group]
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    filled = [sequence for sequence in sequences if len(sequence)]
    tokens = np.concatenate(filled) if filled else np.zeros(0, np.int64)
    vocabulary, tokens = np.unique(tokens, return_inverse=True)
    sequence = np.repeat(np.arange(len(sequences)), lengths)
    owner = np.repeat(np.repeat(np.arange(len(groups)), sizes), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))  # tokens to the end
    starts, numbers = np.arange(len(tokens)), owner
    distinct, entries = np.zeros((len(groups), orders), np.int64), []
    for n in range(1, orders + 1):
        kept = left[starts] >= n
        starts = starts[kept]
        pairs = numbers[kept] * len(vocabulary) + tokens[starts + n - 1]
        _, first, numbers = np.unique(pairs, return_index=True, return_inverse=True)
        distinct[:, n - 1] = np.bincount(owner[starts[first]], minlength=len(groups))
        cases = numbers * len(sequences) + sequence[starts]
        cases, times = np.unique(cases, return_counts=True)
        entries.append((*np.divmod(cases, max(len(sequences), 1)), times))
    return NGrams(sizes, lengths, distinct, entries)


def _ead(grams: NGrams, vocab_size: int) -> Float[np.ndarray, " P"]:
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
    expected = -vocab_size * np.expm1(grams.drawn * np.log1p(-1.0 / vocab_size))
    per_order = _ratio(grams.distinct, expected)
    present = np.isfinite(per_order)
    return _ratio(np.where(present, per_order, 0.0).sum(axis=1), present.sum(axis=1))


def _vendi(grams: NGrams) -> Float[np.ndarray, " P"]:
    count = len(grams.lengths)
    products = sparse.csr_array((count, count))
    for n, (numbers, sequences, times) in enumerate(grams.entries[:BLEU_ORDERS]):
        shape = (grams.distinct[:, n].sum(), count)
        counts = sparse.csr_array((times.astype(float), (numbers, sequences)), shape)
        products = products + counts.T @ counts
    products = products.tocoo()
    group, place = grams.places
    i, j = products.row, products.col
    kernel = np.zeros((len(grams.sizes), *2 * (max(grams.sizes, default=0),)))
    kernel[group[i], place[i], place[j]] = products.data
    empty = grams.by_group(grams.lengths == 0)
    kernel += empty[:, :, None] & empty[:, None, :]
    norms = np.sqrt(np.einsum("pkk->pk", kernel))
    norms = np.where(norms > 0, norms, 1)
    kernel /= norms[:, :, None] * norms[:, None, :]
    shares = np.linalg.eigvalsh(kernel) / np.maximum(grams.sizes, 1)[:, None]
    shares = np.where(shares > 0, shares, 1.0)  # 0 log 0 = 0 = 1 log 1
    effective = np.exp(-np.sum(shares * np.log(shares), axis=1))
    return np.where(grams.sizes > 0, effective, np.nan)


def _self_bleu(grams: NGrams) -> Float[np.ndarray, " P"]:
    logs = np.zeros(len(grams.lengths))
    for n, (numbers, sequences, times) in enumerate(grams.entries[:BLEU_ORDERS], 1):
        if not len(numbers):  # whoever has no n-gram loses nothing by it
            continue
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        most = np.maximum.reduceat(times, starts)[numbers]
        alone = np.add.reduceat(times == most, starts)[numbers] == 1
        rest = np.maximum.reduceat(np.where(times < most, times, 0), starts)[numbers]
        # Whoever alone has most of an n-gram is met by the next; of all others' each has its like.
        matched = np.where((times == most) & alone, rest, times)
        spare = 1 if n > 1 else 0
        matches = np.bincount(sequences, matched, len(logs)) + spare
        with np.errstate(divide="ignore"):
            logs += np.log(matches / np.maximum(grams.written(n) + spare, 1))
    lengths = grams.by_group(grams.lengths)
    if lengths.shape[1] < 2:
        return np.full(len(lengths), np.nan)
    written = lengths > 0
    others = written[:, None, :] & ~np.eye(lengths.shape[1], dtype=bool)
    apart = 2 * np.abs(lengths[:, None, :] - lengths[:, :, None])
    apart += lengths[:, None, :] > lengths[:, :, None]  # of two as near, the shorter
    apart = np.where(others, apart, np.iinfo(np.int64).max)
    reference = np.take_along_axis(lengths, np.argmin(apart, axis=2), axis=1)
    brief = np.minimum(0, 1 - reference / np.maximum(lengths, 1))
    scores = np.where(written, np.exp(brief + grams.by_group(logs) / BLEU_ORDERS), 0)
    count = written.sum(axis=1)
    return _ratio(np.where(count > 1, scores.sum(axis=1), 0), np.where(count > 1, count, 0))


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
