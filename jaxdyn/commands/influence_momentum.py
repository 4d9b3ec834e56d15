r"""Momentum traced back to the batches that it is made of.

What an update adds by momentum is what earlier gradients left in the optimizer. With β the decay
of the first moment (b1 of Adam, μ of SGD) and M the metric of the update itself, update f, n
updates before it, whose gradient at its own parameters was clipped to c_f of itself, has there

    −M ⊙ βⁿ c_f Σ_u ∇loss_u(θ_f),

so that K of the update before last is that of any completion but for where ∇loss_u is taken and
the factor βⁿ c_f.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.dynamics import contributions
from jaxdyn.hosts import fetch
from jaxdyn.optim import OptimConfig
from jaxdyn.train.retake import UpdateTaken, batch_rollout, take_updates
from jaxdyn.train.saved import SavedRun
from jaxdyn.train.step import Prepared, prepare_step
from jaxdyn.types import COMPONENTS, Components, JaxdynError, Model, Params, Rollout, Sites


class Earlier(NamedTuple):
    """An update before the one that is looked at: its step's number and completions, and ∇loss."""

    step: int
    rollout: Rollout
    params: Params
    weights: np.ndarray
    clip: float


def earlier_of(step: int, rollout: Rollout, update: UpdateTaken) -> Earlier:
    """What is kept of an update."""
    return Earlier(step, rollout, update.before, update.weights, update.clip)


def earlier_updates(
    saved: SavedRun, step: int, many: int
) -> tuple[list[Earlier], dict[int, Prepared]]:
    """Those of the `many` steps before `step`, taken again from a checkpoint, and their batches.

    They reach no further back than the stage's beginning, where moments begin too (or are kept of
    the classifier alone).

    Raises:
      JaxdynError: if no checkpoint is that far back.
    """
    task = saved.task
    stage, _ = saved.begin(step)
    first = max(step - many, stage.start)
    starts = [x for x in saved.steps if stage.start <= x <= first]
    if not starts:
        raise JaxdynError(
            f"--momentum {many} begins with step {first}, and no checkpoint of the "
            f"{stage.name} stage is there or before; got {list(saved.steps)}"
        )
    found: list[Earlier] = []
    batches: dict[int, Prepared] = {}
    if first == step:
        return found, batches
    _, state = saved.begin(starts[-1])
    for number in range(starts[-1], step):
        prepared = prepare_step(task, state, stage, number)
        for update in take_updates(task, state, stage, prepared):
            if number >= first:
                found.append(earlier_of(number, batch_rollout(prepared), update))
                batches[number] = prepared
            last = update.state
        state = last
    return found, batches


def decay_of(optim: OptimConfig) -> float:
    """β: what a step leaves of the momentum that it finds."""
    return optim.b1 if optim.optimizer == "adamw" else optim.momentum


class Momentum:
    """What the updates of a step did by momentum, by the batch that it came from.

    Args:
      many: how many steps before it are traced.
    """

    def __init__(self, saved: SavedRun, step: int, many: int, prepared: Prepared):
        self.saved, self.step = saved, step
        self.history, self.batches = earlier_updates(saved, step, many)
        self.batches[step] = prepared
        self.found: dict[int, np.ndarray] = {}

    def add(self, model: Model, update: UpdateTaken, sites: Sites, **execution: Any) -> None:
        """Count the step's next update."""
        beta = decay_of(self.saved.config.optim)
        for number, share in traced(model, update, sites, self.history, beta, **execution).items():
            self.found[number] = self.found.get(number, 0) + stacked(share)
        rollout = batch_rollout(self.batches[self.step])
        self.history.append(earlier_of(self.step, rollout, update))

    def arrays(self) -> dict[str, Any]:
        """Those of `SavedInfluence`, the oldest batch first; none where there was none."""
        if not self.found:
            return {}
        steps = sorted(self.found)
        told = [self.batches[number].experience for number in steps]
        return {
            "earlier": np.stack([self.found[number] for number in steps], axis=3),
            "earlier_steps": np.array(steps),
            "earlier_prompts": np.array([x.prompts for x in told], np.str_),
            "earlier_completions": np.array([x.completions for x in told], np.str_),
        }


def traced(
    model: Model,
    update: UpdateTaken,
    sites: Sites,
    earlier: list[Earlier],
    beta: float,
    **execution: Any,
) -> dict[int, Components]:
    """By step, what its completions did at the sites through the update's momentum, [2, O, U].

    Args:
      update: the one whose momentum it is.
      earlier: the updates before it, the nearest last.
      beta: β.
      execution: `memory_budget`.
    """
    found: dict[int, Components] = {}
    for lag, past in enumerate(reversed(earlier), start=1):
        share = contributions(
            model,
            update.before,
            sites,
            past.rollout,
            weights=beta**lag * past.clip * past.weights,
            temperature=update.temperature,
            metric=update.metric,
            rollout_params=past.params,
            **execution,
        )
        before = found.get(past.step)
        found[past.step] = share if before is None else jax.tree.map(jnp.add, before, share)
    return found


def stacked(x: Components) -> np.ndarray:
    """The components along a first axis, on the host."""
    return np.stack([fetch(getattr(x, name)) for name in COMPONENTS])
