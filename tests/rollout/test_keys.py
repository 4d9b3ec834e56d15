"""Keys: a pure function of (seed, stream, step), no two alike."""

import itertools
from typing import get_args

import jax
import jaxtyping
import numpy as np
import pytest

from jaxdyn.rollout import Stream, step_key
from jaxdyn.types import JaxdynError


def test_no_two_keys_are_alike():
    grid = itertools.product((0, 1, 2), get_args(Stream), (-1, 0, 1, 2, 3))
    keys = [tuple(np.asarray(jax.random.key_data(step_key(*place)))) for place in grid]
    assert len(set(keys)) == len(keys) == 3 * len(get_args(Stream)) * 5


def test_the_same_place_gives_the_same_key():
    assert step_key(3, "probe", 7) == step_key(3, "probe", 7)


@pytest.mark.parametrize(
    "stream, step, words",
    [("rollouts", 0, "stream must be one of .*'rollouts'"), ("probe", -2, "step must be -1 or")],
)
def test_nonsense_is_refused(stream, step, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(JaxdynError, match=words):
        step_key(0, stream, step)
