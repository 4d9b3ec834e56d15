"""How well scores foresee preferences: accuracy, likelihood, calibration, and what length alone
does.

A margin is m = r(chosen) − r(rejected), and σ(m) the model's probability of what was preferred. Of
each pair it prefers one answer with the confidence σ(|m|), and is right where m > 0; a tie counts
half.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtri

from jaxdyn.dynamics.sampling import LEVEL, Estimate, mean_with_interval

NORMAL = float(ndtri((1 + LEVEL) / 2))
"""Standard deviations of a normal distribution within which the level of an interval lies."""

BINS = 10
"""Bins of confidence, of equal width over [0.5, 1]."""


class Bin(NamedTuple):
    """Pairs whose confidence lies in [low, high): how many, how sure, how often right."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


def correct(margins: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """1 where the margin is positive, 1/2 where it is 0, else 0."""
    return (1 + np.sign(margins)) / 2


def reliability(margins: Float[np.ndarray, " N"], bins: int = BINS) -> list[Bin]:
    """The bins that hold a pair."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    right = correct(margins)
    found = []
    for i, (low, high) in enumerate(itertools.pairwise(edges.tolist())):
        if (x := place == i).any():
            sure, often = float(confidence[x].mean()), float(right[x].mean())
            found.append(Bin(low, high, int(x.sum()), sure, often))
    return found


def calibration_error(found: list[Bin]) -> float:
    """ECE = Σ_b n_b / N |accuracy_b − confidence_b| (Guo et al. 2017, arXiv 1706.04599)."""
    total = sum(b.pairs for b in found)
    return sum(b.pairs / total * abs(b.accuracy - b.confidence) for b in found)


def proportion(right: Float[np.ndarray, " N"]) -> Estimate:
    """The share of N that are right with Wilson's interval (1927), which has a width at 0 and 1."""
    count, mean, z = len(right), float(np.mean(right)), NORMAL
    middle = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(mean * (1 - mean) / count + (z / (2 * count)) ** 2)
    return Estimate(mean, middle - half, middle + half)


def preference_measures(
    margins: Float[np.ndarray, " N"], longer: Int[np.ndarray, " N"]
) -> dict[str, float]:
    """What N held-out pairs say, with intervals over pairs under `_ci_low` and `_ci_high`.

    `accuracy`; `nll`, the mean of −log σ(m), in nats; `ece`; `margin`; `length_accuracy`, of
    preferring the longer answer, by how many tokens the chosen one is `longer`; and
    `accuracy_over_length`, the difference pair by pair.
    """
    right, by_length = correct(margins), correct(longer.astype(float))
    means = {
        "nll": np.logaddexp(0, -margins),
        "margin": margins,
        "accuracy_over_length": right - by_length,
    }
    found: dict[str, Estimate] = {name: mean_with_interval(x) for name, x in means.items()}
    found |= {"accuracy": proportion(right), "length_accuracy": proportion(by_length)}
    measured = {
        key: float(value)
        for name, (mean, low, high) in found.items()
        for key, value in ((name, mean), (f"{name}_ci_low", low), (f"{name}_ci_high", high))
        if np.isfinite(value)
    }
    return measured | {"ece": float(calibration_error(reliability(margins)))}
