"""Accuracy, likelihood and calibration of margins, against sums over single pairs."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from jaxdyn.dynamics.calibration import (
    calibration_error,
    preference_measures,
    proportion,
    reliability,
)

MARGINS = np.array([2.0, -0.5, 0.0, 0.3, 5.0, -3.0, 0.1, 1.0])
LONGER = np.array([3, 2, 0, -1, 4, -2, 1, 5])


def test_the_measures_of_a_few_pairs():
    found = preference_measures(MARGINS, LONGER)
    assert found["accuracy"] == (5 + 0.5) / 8 and found["length_accuracy"] == (5 + 0.5) / 8
    nll = [math.log(1 + math.exp(-m)) for m in MARGINS]
    assert found["nll"] == pytest.approx(sum(nll) / 8)
    assert found["margin"] == pytest.approx(MARGINS.mean())
    # They differ on the second pair and the fourth, one each way.
    assert found["accuracy_over_length"] == 0
    assert found["accuracy_over_length_ci_low"] == -found["accuracy_over_length_ci_high"] < 0


def test_the_calibration_error_bin_by_bin():
    bins = {}
    for m in MARGINS:
        sure = 1 / (1 + math.exp(-abs(m)))
        right = 0.5 if m == 0 else float(m > 0)
        bins.setdefault(min(int((sure - 0.5) / 0.05), 9), []).append((sure, right))
    error = sum(abs(sum(right - sure for sure, right in pairs)) for pairs in bins.values()) / 8
    found = reliability(MARGINS)
    assert [b.pairs for b in found] == [len(bins[i]) for i in sorted(bins)]
    assert all(b.low <= b.confidence <= b.high for b in found)
    assert calibration_error(found) == pytest.approx(error)
    assert preference_measures(MARGINS, LONGER)["ece"] == pytest.approx(error)


def test_margins_drawn_as_they_say_are_calibrated():
    rng = np.random.default_rng(0)
    margins = rng.standard_normal(200_000)
    margins = np.where(
        rng.uniform(size=len(margins)) < 1 / (1 + np.exp(-margins)), margins, -margins
    )
    # The standard error of a bin's share, and a little for the width of bins.
    assert calibration_error(reliability(margins)) < 0.01
    assert calibration_error(reliability(3 * margins)) > 0.1


@pytest.mark.parametrize("right, count", [(0, 5), (5, 5), (13, 20)])
def test_the_interval_of_a_proportion_is_wilsons(right, count):
    found = proportion(np.array([1.0] * right + [0.0] * (count - right)))
    other = binomtest(right, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(found, (right / count, other.low, other.high), atol=1e-9)
