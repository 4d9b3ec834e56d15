"""What is said of a few seeds, against SciPy, all draws listed one by one, and known values."""

import itertools

import numpy as np
import pytest
from inference import bootstrap, holm, sign_flip
from scipy.stats import permutation_test


def test_the_sign_flip_is_the_exact_permutation_test():
    rng = np.random.default_rng(0)
    for pairs in (3, 5, 9):
        values = rng.normal(0.4, 1, pairs)
        wanted = permutation_test((values,), np.mean, permutation_type="samples")
        assert sign_flip(values) == pytest.approx(wanted.pvalue, abs=1e-12)


def test_the_smallest_p_that_pairs_can_give():
    for pairs in (1, 5, 12):
        assert sign_flip([0.3] * pairs) == 2 / 2**pairs
    assert sign_flip([0.3, -0.3]) == 1


@pytest.mark.parametrize("values", [[], [1.0] * 21, [1.0, np.nan]])
def test_what_it_refuses(values):
    with pytest.raises(ValueError, match="1 to 20 finite differences"):
        sign_flip(values)


def test_the_bootstrap_is_that_of_all_draws():
    values = np.array([0.0, 1.0, 3.0, 7.0, 2.5])
    for statistic in (np.mean, np.max):
        draws = itertools.product(values, repeat=len(values))
        every = [statistic(np.array(draw)) for draw in draws]
        wanted = np.quantile(every, [0.025, 0.975])
        # The quantile's standard error is √(0.025 · 0.975 / 10⁴) / density: a step of the means.
        np.testing.assert_allclose(bootstrap(values, statistic), wanted, atol=0.2)
    assert bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0)
    pairs = np.array([[1.0, 2.0], [2.0, 4.0], [5.0, 10.0]])
    np.testing.assert_allclose(bootstrap(pairs, lambda x: (x[:, 1] / x[:, 0]).mean()), 2)


def test_holm_raises_as_in_the_textbook():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"one": 0.9, "two": 0.8}) == {"one": 1.0, "two": 1.0}
    assert holm({}) == {}
