"""The probe of a run: its fixed sites, and what is measured there."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.dynamics import measure_state, measure_update, site_state, sites_from_rollout
from jaxdyn.rollout import step_key
from jaxdyn.train.experience import gather_experience
from jaxdyn.train.state import TrainState
from jaxdyn.train.task import Task
from jaxdyn.types import Params

Measured = tuple[dict[str, float], dict[str, np.ndarray]]


class Probe:
    """Held-out prompts, and the completions that the policy before training sampled of them."""

    def __init__(self, task: Task):
        self.model, self.config = task.model, task.config.probe
        prompts = task.test[: self.config.num_prompts]
        key = step_key(task.config.seed, "probe", 0)
        rollout = gather_experience(task, task.params, prompts, key, 1).rollout
        sites = sites_from_rollout(rollout, self.config.sites_per_completion, task.config.seed)
        self.sites = task.layout.rows(sites)
        self.start = site_state(self.model, policy_of(task.params), self.sites)

    def due(self, step: int) -> bool:
        """Whether the update of `step` is to be measured."""
        return self.config.every > 0 and (step + 1) % self.config.every == 0

    def measure_state(self, params: Params) -> Measured:
        """The policy at the sites."""
        found = measure_state(self.model, policy_of(params), self.sites, self.start, self.start)
        return found.scalars, found.arrays

    def measure(self, before: Params, state: TrainState) -> Measured:
        """What the update from `before` to `state` did, and the state it led to."""
        old, new = policy_of(before), policy_of(state.params)
        after = site_state(self.model, new, self.sites)
        there = measure_state(self.model, new, self.sites, self.start, self.start, after)
        moved = measure_update(self.model, old, new, self.sites, state.head_share, after)
        return {**there.scalars, **moved.scalars}, {**there.arrays, **moved.arrays}


def remember(state: TrainState) -> Params:
    """A copy of the parameters that survives the update's donation."""
    return jax.tree.map(jnp.copy, state.params)


def policy_of(params: Params) -> Params:
    """The parameters without a value head."""
    return {part: params[part] for part in ("backbone", "classifier")}
