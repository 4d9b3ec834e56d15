"""The probe of a run: its fixed sites, and what is measured there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.dynamics import (
    SiteState,
    measure_state,
    measure_update,
    site_state,
    sites_from_rollout,
)
from jaxdyn.dynamics.ledger_path import feature_account
from jaxdyn.dynamics.observables import QUANTITIES, At
from jaxdyn.dynamics.precision import in_float32
from jaxdyn.hosts import fetch
from jaxdyn.rollout import step_key
from jaxdyn.train.experience import gather_experience
from jaxdyn.train.state import TrainState
from jaxdyn.train.task import Task
from jaxdyn.types import COMPONENTS, Params

LEDGER_QUANTITIES = ("log_prob", "entropy")

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
        self.start = self.look(task.params)

    def due(self, step: int) -> bool:
        """Whether the update of `step` is to be measured."""
        return self.config.every > 0 and (step + 1) % self.config.every == 0

    @functools.partial(jax.profiler.annotate_function, name="probe")
    def measure_state(self, params: Params) -> Measured:
        """The policy at the sites."""
        found = measure_state(self.model, policy_of(params), self.sites, self.start, self.start)
        return found.scalars, found.arrays

    @functools.partial(jax.profiler.annotate_function, name="probe")
    def look(self, params: Params) -> SiteState:
        """Features and log-probs at the sites."""
        return site_state(self.model, policy_of(params), self.sites)

    @functools.partial(jax.profiler.annotate_function, name="probe")
    def measure(
        self, before: Params, state: TrainState, after: SiteState | None = None
    ) -> Measured:
        """What the update from `before` to `state` did, and the state it led to; `after` is what is
        seen there, if it is known already."""
        old, new = policy_of(before), policy_of(state.params)
        after = self.look(state.params) if after is None else after
        there = measure_state(self.model, new, self.sites, self.start, self.start, after)
        moved = measure_update(self.model, old, new, self.sites, state.head_share, after)
        return {**there.scalars, **moved.scalars}, {**there.arrays, **moved.arrays}


class RunLedger:
    """What a run's updates together have done at the probe sites, segment by segment.

    A segment leads from one measurement, or checkpoint, to the next: from there a run that was
    killed goes on. On it W and the features move straight, so that the account is exact, by
    component, and takes no pass of its own (`feature_account`). The probe's prompts are held out:
    whatever moves their sites comes from other prompts.

    Args:
      probe: the run's probe.
      params: those with which the first segment begins.
      step: the number of the step that begins there.
      kept: the segments so far, as `close` gave them.
    """

    def __init__(self, probe: Probe, params: Params, step: int, kept: list[dict[str, Any]]):
        self._probe, self.step, self._kept = probe, step, kept
        self._model = in_float32(probe.model)  # as the probe measures
        self._last = self._look(params)

    @functools.partial(jax.profiler.annotate_function, name="ledger")
    def close(self, params: Params, step: int, state: SiteState | None = None) -> dict[str, Any]:
        """The segment up to the parameters with which `step` begins; the next begins there.

        Returns what `ledger.jsonl` holds: of Δ log π of the sites' tokens and of ΔH, both in nats,
        each component and the whole `change`, over the N sites.
        """
        sites = self._probe.sites
        now = self._look(params, state)
        nothing = jnp.zeros((len(sites.targets), 0), jnp.int32)
        at = At(sites.targets, nothing, self._probe.start.log_probs)
        parts, change = fetch(feature_account(self._model, self._last, now, at))
        line: dict[str, Any] = {"step": step - 1, "from": self.step}
        for name in LEDGER_QUANTITIES:
            row = QUANTITIES.index(name)
            line[name] = {
                part: x.quantities[row].astype(float).tolist()
                for part, x in {**parts, "change": change}.items()
            }
        self._last, self.step = now, step
        self._kept.append(line)
        return line

    def totals(self) -> dict[str, float]:
        """All segments together.

        Keys: `ledger/{quantity}/{part}/{kind}`, the mean over a kind's sites; and a component's
        `ledger/{quantity}/share/{component}`, Σ part · change / Σ change² over all sites.
        """
        is_prompt = fetch(self._probe.sites.is_prompt)
        kinds = {"prompt": is_prompt, "completion": ~is_prompt}
        totals: dict[str, float] = {}
        for name in LEDGER_QUANTITIES:
            sums = {
                part: np.sum([line[name][part] for line in self._kept], axis=0)
                for part in (*COMPONENTS[:2], "change")
            }
            for part, whole in sums.items():
                of_kind = {kind: whole[which] for kind, which in kinds.items() if which.any()}
                means = {kind: float(x.mean()) for kind, x in of_kind.items()}
                totals |= {f"ledger/{name}/{part}/{kind}": x for kind, x in means.items()}
            change = sums["change"]
            if squares := float(change @ change):
                for part in COMPONENTS[:2]:
                    totals[f"ledger/{name}/share/{part}"] = float(sums[part] @ change) / squares
        return totals

    def _look(self, params: Params, state: SiteState | None = None) -> tuple[Params, jax.Array]:
        state = self._probe.look(params) if state is None else state
        head = self._probe.model.view(policy_of(params))["classifier"]
        return jax.tree.map(jnp.copy, head), state.features


def remember(state: TrainState) -> Params:
    """A copy of the parameters that survives the update's donation."""
    return jax.tree.map(jnp.copy, state.params)


def policy_of(params: Params) -> Params:
    """The parameters without a value head."""
    return {part: params[part] for part in ("backbone", "classifier")}
