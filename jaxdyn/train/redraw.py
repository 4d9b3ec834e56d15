"""Dynamic sampling: a group whose completions all score alike gives its place to another prompt's.

Such a group has advantages of 0 and moves nothing. A round samples a whole batch of other prompts,
[P, G] as ever so that nothing compiles again, and its groups with signal take the places of those
without, in order; rounds go on until none is left, or `train.redraw_rounds` are done. Then what is
left stays, its advantages 0: the batch keeps its size, and the loss still counts its tokens.
`frac_reward_zero_std` says how many those are.

Rewards are compared before a penalty on length or a KL in the reward. Prompts and keys are
functions of (seed, step, round), so that a step taken again redraws the same. Afterwards `reward`
is that of a chosen batch: `redraw/first_reward` is the policy's own.

Source: Yu et al. 2025 (DAPO, arXiv 2503.14476), eq. 11, which samples without a bound.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.config import RunConfig
from jaxdyn.rewards import RewardOutput
from jaxdyn.rollout import step_key
from jaxdyn.train.experience import Experience, examples_of, gather_experience, spread
from jaxdyn.train.task import Task
from jaxdyn.types import Params, Rollout


def draw_experience(
    task: Task[RunConfig], params: Params, step: int, harvest: bool = False
) -> Experience:
    """The step's batch: of its own prompts, those without signal drawn again if that is wanted."""
    config = task.config
    own = step_key(config.seed, "rollout", step)
    groups, keep = config.train.num_generations, (harvest, config.loss.importance.support)
    drawn = gather_experience(task, params, examples_of(task, step), own, groups, *keep)
    most = config.train.redraw_rounds
    if not most:
        return drawn
    scored = drawn.rewards.total[~np.isnan(drawn.rewards.total)]
    first = {"redraw/first_reward": float(scored.mean())} if len(scored) else {}
    redrawn, rounds, seconds = 0, 0, drawn.reward_seconds
    vacant = np.flatnonzero(~with_signal(drawn))
    again = step_key(config.seed, "redraw", step)
    while len(vacant) and rounds < most:
        rounds += 1
        key = jax.random.fold_in(again, rounds)
        others = examples_of(task, step, rounds)
        other = gather_experience(task, params, others, key, groups, *keep)
        seconds += other.reward_seconds
        found = np.flatnonzero(with_signal(other))[: len(vacant)]
        drawn = replace_groups(drawn, other, vacant[: len(found)], found, task.tokenizer.pad_id)
        vacant, redrawn = vacant[len(found) :], redrawn + len(found)
    counts = {"redraw/groups": redrawn, "redraw/rounds": rounds}
    return dataclasses.replace(drawn, reward_seconds=seconds, redrawn={**counts, **first})


def with_signal(experience: Experience) -> np.ndarray:
    """Which groups have scores that differ, [P]."""
    groups = experience.rewards.total.reshape(-1, experience.num_generations)
    return np.array([spread(group) >= 1e-8 for group in groups])


def replace_groups(
    experience: Experience, other: Experience, places: np.ndarray, sources: np.ndarray, pad_id: int
) -> Experience:
    """The first with the second's groups `sources` in its `places`."""
    rows, each = len(experience.completions), experience.num_generations
    groups = np.arange(rows).reshape(-1, each)
    groups[places] = rows + groups[sources]
    index = groups.ravel()
    pick = lambda a, b: [(a + b)[i] for i in index]
    join = lambda a, b: np.concatenate([a, b])[index]
    one, two = experience.columns, other.columns
    absent = [None] * rows
    values, others = experience.rewards.values, other.rewards.values
    return dataclasses.replace(
        experience,
        rollout=_take_rows(*as_wide(experience.rollout, other.rollout, pad_id), index),
        prompts=pick(experience.prompts, other.prompts),
        completions=pick(experience.completions, other.completions),
        finished=pick(experience.finished, other.finished),
        completion_ids=pick(experience.completion_ids, other.completion_ids),
        columns={
            name: pick(one.get(name, absent), two.get(name, absent))
            for name in dict.fromkeys((*one, *two))
        },
        rewards=RewardOutput(
            join(experience.rewards.total, other.rewards.total),
            {name: join(value, others[name]) for name, value in values.items()},
        ),
    )


def as_wide(one: Rollout, two: Rollout, pad_id: int) -> tuple[Rollout, Rollout]:
    """Both with as many prompt slots as the one that has more."""
    slots = max(r.prompt_ids.shape[1] for r in (one, two))

    def widened(r: Rollout) -> Rollout:
        missing = slots - r.prompt_ids.shape[1]
        left = lambda x, value: jnp.pad(x, ((0, 0), (missing, 0)), constant_values=value)
        ids, mask = left(r.prompt_ids, pad_id), left(r.prompt_mask, False)
        return dataclasses.replace(r, prompt_ids=ids, prompt_mask=mask)

    return widened(one), widened(two)


@jax.jit
def _take_rows(one: Rollout, two: Rollout, index: jax.Array) -> Rollout:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[index], one, two)
