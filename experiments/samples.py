"""What claims about samples share: a run's policies before and after, and what they say."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from frame import trainings

from jaxdyn.dynamics.precision import in_float32
from jaxdyn.rollout import step_key
from jaxdyn.train import open_run
from jaxdyn.train.experience import Experience, gather_experience
from jaxdyn.train.policy import completion_statistics
from jaxdyn.train.probe import policy_of
from jaxdyn.train.sharing import completion_features
from jaxdyn.train.task import Task
from jaxdyn.types import Model, Params, Rollout

STREAM = 1
"""Of the evaluation's keys; a run's own evaluations take 0."""


class Trained(NamedTuple):
    """A run: its seed's and its base model's names, its task, and its policies."""

    seed: str
    base: str
    task: Task
    before: Params
    after: Params


def trained(runs: Path, arm: str) -> Iterator[Trained]:
    """Every run of an arm that has ended."""
    for path in trainings(runs, arm):
        if not (path / "done").exists():
            continue
        with open_run(path) as run:
            before, after = (policy_of(x) for x in (run.loaded.params, run.state().params))
            base = Path(run.config.model.path).name
            yield Trained(path.name, base, run.task, before, after)


def sampled(task: Task, params: Params, prompts: int, generations: int) -> Experience:
    """Completions of the first held-out prompts; the same prompts and keys for every policy."""
    key = step_key(task.config.seed, "evaluation", STREAM)
    return gather_experience(task, params, task.test[:prompts], key, generations)


@functools.partial(jax.jit, static_argnums=0)
def _certainty(model: Model, params: Params, rollout: Rollout) -> dict[str, jax.Array]:
    view = model.view(params)
    features = completion_features(model, view["backbone"], rollout)
    found = completion_statistics(model, view["classifier"], features, rollout.completion_ids, 1.0)
    return {"entropy": found.entropy, "confidence": found.max_prob}


def certainty(model: Any, params: Params, rollout: Rollout) -> dict[str, np.ndarray]:
    """Entropy (nats) and largest probability of π at temperature 1 at every slot, [B, C]."""
    found = _certainty(in_float32(model), params, rollout)
    return {name: np.asarray(value, np.float64) for name, value in found.items()}
