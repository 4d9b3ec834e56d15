"""What a claim may say of a few seeds: exact sign flips, intervals over seeds, Holm over claims.

Pairs are runs that differ in one thing and share all else: base model, data order, sampling. The
exact test asks how often signs given at random make a mean as far from 0 as the one that was seen;
with n pairs its p is at least 2 / 2ⁿ, so five pairs cannot fall below 0.05 and twelve can.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

Interval = tuple[float, float]


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p of a mean of 0 under signs that are given at random, all 2ⁿ of them.

    Raises:
      ValueError: for no pair, one that is not finite, or more than 20 of them.
    """
    values = np.asarray(differences, np.float64)
    if not 0 < len(values) <= 20 or not np.isfinite(values).all():
        raise ValueError(f"wants 1 to 20 finite differences, got {values}")
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    sums, seen = np.abs(signs @ values), abs(values.sum())
    return float(np.mean(sums >= seen * (1 - 1e-12)))


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], float] = np.mean,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of a statistic over the first axis of `values` drawn again."""
    values = np.asarray(values, np.float64)
    places = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    found = np.array([statistic(values[chosen]) for chosen in places])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Each claim's p, raised so that the chance of any false rejection is that of one (Holm)."""
    raised, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        raised[name] = largest
    return {name: raised[name] for name in p_values}
