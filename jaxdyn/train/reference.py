"""The reference of the KL: where training started or, where it is synchronised, what follows it.

    π_ref ← (1 − α) π_ref + α π      every `train.reference_every` steps, of the parameters

(Gorbatovski et al. 2024, TR-DPO, arXiv 2404.09656, eq. 3 and 4; TRL's `sync_ref_model`). It is then
a part of the state, which checkpoints hold.
"""

import jax
import jax.numpy as jnp

from jaxdyn.config import Config, RunConfig
from jaxdyn.models.held import held
from jaxdyn.train.probe import policy_of
from jaxdyn.train.state import FollowedState, TrainState
from jaxdyn.types import Params


def follows(config: Config) -> bool:
    """Whether the reference follows the policy."""
    return isinstance(config, RunConfig) and config.train.reference_every > 0


def reference_of(params: Params, config: Config) -> Params | None:
    """A reference that stays, of the parameters with which a run starts; else None, as where β is
    0 and there is none."""
    if not isinstance(config, RunConfig) or not config.loss.beta or follows(config):
        return None
    return held(params, config.model.frozen_dtype)


def with_reference(state: TrainState, config: Config) -> TrainState:
    """The state in which a run starts, with a copy of its policy if the reference is to follow."""
    if not follows(config):
        return state
    return FollowedState(**vars(state), reference=jax.tree.map(jnp.copy, policy_of(state.params)))


def synchronised(state: TrainState, config: RunConfig, step: int) -> TrainState:
    """The state after `step`, whose reference has followed if it was due."""
    if not follows(config) or (step + 1) % config.train.reference_every:
        return state
    mix = config.train.reference_mixup
    return state.replace(reference=_mixed(state.reference, policy_of(state.params), mix))


@jax.jit
def _mixed(reference: Params, policy: Params, alpha: jax.Array) -> Params:
    # So written, what has not moved stays to the bit, and a classifier stage's features are both's.
    return jax.tree.map(lambda r, p: (r + alpha * (p - r)).astype(r.dtype), reference, policy)
