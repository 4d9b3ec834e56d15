"""How a claim about many trainings is ruled, and figures taken from their rows."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from frame import Ruling, Verdict
from inference import bootstrap, sign_flip


def above(
    claim: str,
    statistic: str,
    values: Sequence[float],
    threshold: float = 0.0,
    note: str = "",
    over: str = "trainings",
) -> Verdict:
    """Whether the mean over seeds lies above a threshold.

    Supported if the 95 % interval of the mean (bootstrap over seeds) lies above it, not supported
    if below, both only if the exact sign flip of value − threshold has p < 0.05; else undecided.
    """
    found = np.asarray([x for x in values if x is not None], np.float64)
    if len(found) == 0:
        raise ValueError(f"no training says anything of: {claim}")
    mean, p = float(found.mean()), sign_flip(found - threshold)
    low, high = bootstrap(found) if len(found) > 1 else (mean, mean)
    ruling: Ruling = "undecided"
    if p < 0.05 and low > threshold:
        ruling = "supported"
    if p < 0.05 and high < threshold:
        ruling = "not supported"
    seeds = len(found)
    return Verdict(claim, ruling, statistic, mean, low, high, f"{seeds} {over}", seeds, p, note)


def column(rows: dict[str, Any], *path: str) -> list[float]:
    """One figure of every training."""
    found = []
    for row in rows.values():
        for name in path:
            row = row[name]
        found.append(row)
    return found


def mean_of(trees: Sequence[Any]) -> Any:
    """The mean of figures in nested dictionaries of the same names."""
    return jax.tree.map(lambda *x: float(np.mean(x)), *trees)
