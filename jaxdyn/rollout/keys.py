"""Random keys as a pure function of (seed, stream, step): no two steps or purposes draw alike."""

from typing import Literal, get_args

import jax
from jaxtyping import PRNGKeyArray

from jaxdyn.types import JaxdynError

Stream = Literal["rollout", "probe", "evaluation", "adapters", "redraw", "covariance"]


def step_key(seed: int, stream: Stream, step: int) -> PRNGKeyArray:
    """The key of one step of one stream. Step -1 is the state before training.

    Raises `JaxdynError` for an unknown stream or a step below -1.
    """
    if stream not in get_args(Stream):
        raise JaxdynError(f"stream must be one of {get_args(Stream)}, got {stream!r}")
    if step < -1:
        raise JaxdynError(f"step must be -1 or more, got {step}")
    key = jax.random.fold_in(jax.random.key(seed), get_args(Stream).index(stream))
    return jax.random.fold_in(key, step + 1)
