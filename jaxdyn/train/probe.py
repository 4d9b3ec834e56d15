"""The probe of a run: its fixed sites, and what is measured there."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.config import RunConfig
from jaxdyn.dynamics import measure_state, measure_update, site_state, sites_from_rollout
from jaxdyn.rollout import step_key
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.task import Task, gather_experience
from jaxdyn.train.update import TrainState
from jaxdyn.types import Params

Measured = tuple[dict[str, float], dict[str, np.ndarray]]


class Probe:
    """Held-out prompts and completions that the policy before training (the reference) sampled."""

    def __init__(self, task: Task, config: RunConfig, reference: Params):
        self.model, self.config = task.model, config.probe
        experience = gather_experience(
            task,
            reference,
            task.test[: config.probe.num_prompts],
            step_key(config.seed, "probe", 0),
            config,
            1,
            config.train.max_prompt_length,
        )
        per_completion = config.probe.sites_per_completion
        sites = sites_from_rollout(experience.rollout, per_completion, config.seed)
        self.sites = task.layout.rows(sites)
        self.reference = reference
        self.start = site_state(self.model, reference, self.sites)

    def due(self, step: int) -> bool:
        """Whether the update of `step` is to be measured."""
        return self.config.every > 0 and (step + 1) % self.config.every == 0

    def remember(self, state: TrainState) -> Params:
        """A copy of the parameters that survives the update's donation."""
        return jax.tree.map(jnp.copy, state.params)

    def measure_state(self, view: Params) -> Measured:
        """The policy at the sites."""
        return measure_state(self.model, view, self.sites, self.start, self.start)

    def measure(self, before: Params, state: TrainState) -> Measured:
        """What the update from `before` to `state` did, and the state it led to."""
        view = self.model.view(state.params)
        after = site_state(self.model, view, self.sites)
        scalars, arrays = measure_state(self.model, view, self.sites, self.start, self.start, after)
        moved, per_site = measure_update(
            self.model, self.model.view(before), view, self.sites, state.head_share, after
        )
        return {**scalars, **moved}, {**arrays, **per_site}

    def record_start(self, directory: RunDirectory) -> None:
        """Write the state before training, as step -1."""
        scalars, arrays = self.measure_state(self.reference)
        directory.log("dynamics.jsonl", {"step": -1, **scalars})
        directory.save_arrays(-1, arrays)
