"""A batch of experience: completions that the policy sampled, their texts, and their rewards."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxdyn.data import batch_indices, columns, decode_completions, encode_prompts, stop_at_strings
from jaxdyn.dynamics.diversity import diversity_metrics
from jaxdyn.hosts import gather, share_of, whole
from jaxdyn.rewards import RewardOutput
from jaxdyn.rollout import generate
from jaxdyn.train.task import Task
from jaxdyn.types import Params, Rollout


@dataclasses.dataclass(frozen=True)
class Experience:
    """A rollout with its texts and rewards: B = P * G rows, a prompt's generations together.

    `redrawn` are the metrics of a batch of which groups were drawn again (`jaxdyn.train.redraw`).
    """

    rollout: Rollout
    prompts: list[str]
    completions: list[str]
    finished: list[bool]
    completion_ids: list[list[int]]
    columns: dict[str, list]
    rewards: RewardOutput
    num_generations: int
    reward_seconds: float
    redrawn: dict[str, int | float] = dataclasses.field(default_factory=dict)

    def groups(self) -> list[list[list[int]]]:
        """Completion token ids by prompt and generation."""
        rows, g = self.completion_ids, self.num_generations
        return [rows[i : i + g] for i in range(0, len(rows), g)]

    def records(self, step: int | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """The completions in readable form; `reward` is None where there is no score."""
        about = {} if step is None else {"step": step}
        rewards = [None if np.isnan(total) else float(total) for total in self.rewards.total]
        rows = range(len(self.completions))[:limit]
        return [
            {
                **about,
                "prompt_index": row // self.num_generations,
                "prompt": self.prompts[row],
                "completion": self.completions[row],
                "reward": rewards[row],
                "finished": bool(self.finished[row]),
            }
            for row in rows
        ]


def examples_of(task: Task, step: int, round: int = 0) -> list[dict[str, Any]]:
    """The prompts of a step's round: a function of the seed, the step and the round alone."""
    config = task.config
    indices = batch_indices(config.seed, step, config.train.num_prompts, len(task.train), round)
    return [task.train[int(i)] for i in indices]


@functools.partial(jax.profiler.annotate_function, name="rollout")
def gather_experience(
    task: Task,
    params: Params,
    examples: Sequence[dict[str, Any]],
    key: jax.Array,
    num_generations: int,
    harvest: bool = False,
    support: bool = False,
) -> Experience:
    """Sample `num_generations` completions of each example's prompt and score them.

    `harvest` keeps the features that predicted the tokens, `support` those that the filters left
    (`Rollout`).
    """
    tokenizer, longest = task.tokenizer, task.config.train.max_prompt_length
    sampling = task.config.sampling
    prompts = encode_prompts(tokenizer, [e["prompt"] for e in examples], longest, task.cuts)
    rollout = generate(
        task.model,
        {part: params[part] for part in ("backbone", "classifier")},
        task.layout.rows(prompts),
        task.layout.everywhere(key),
        num_generations=num_generations,
        **sampling.drawing,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        harvest=harvest,
        support=support,
    )
    here = whole(dataclasses.replace(rollout, features=None, support=None))
    rollout = dataclasses.replace(here, features=rollout.features, support=rollout.support)
    rollout = stop_at_strings(tokenizer, rollout, sampling.stop)
    texts, finished, ids = decode_completions(
        tokenizer, rollout.completion_ids, rollout.completion_mask, sampling.stop
    )
    repeated = [example for example in examples for _ in range(num_generations)]
    table = columns(repeated)
    asked = table.pop("prompt")
    table.pop("completion", None)
    table |= {"finished": finished, "completion_ids": ids}
    began = time.perf_counter()
    rewards = score(task.reward, asked, texts, table)
    seconds = time.perf_counter() - began
    return Experience(
        rollout, asked, texts, finished, ids, table, rewards, num_generations, seconds
    )


@functools.partial(jax.profiler.annotate_function, name="reward")
def score(
    reward: Callable[..., RewardOutput],
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list],
) -> RewardOutput:
    """The rewards of all completions, of which each process scores its share."""
    if jax.process_count() == 1:
        return reward(prompts, completions, columns)
    mine = share_of(len(completions))
    part = {name: column[mine] for name, column in columns.items()}
    scored = reward(prompts[mine], completions[mine], part)
    values = {name: gather(value, len(completions)) for name, value in scored.values.items()}
    return RewardOutput(gather(scored.total, len(completions)), values)


def experience_metrics(experience: Experience, vocab_size: int) -> dict[str, float]:
    """Reward, length and diversity of a batch of experience, under the peers' names.

    What could not be scored is left out, and so is a mean over nothing. `reward_std` is over the
    whole batch; `frac_reward_zero_std` is the share of the groups whose scores do not differ.
    """
    total = experience.rewards.total
    groups = total.reshape(-1, experience.num_generations)
    means = {"reward": np.mean(total[~np.isnan(total)])} if not np.isnan(total).all() else {}
    means |= {f"rewards/{name}/mean": mean for name, mean in experience.rewards.means.items()}
    metrics = {name: float(mean) for name, mean in means.items() if not np.isnan(mean)}
    metrics["reward_std"] = spread(total)
    metrics["frac_reward_zero_std"] = float(np.mean([spread(group) < 1e-8 for group in groups]))
    lengths = np.array([len(ids) for ids in experience.completion_ids])
    metrics |= {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": 1 - float(np.mean(experience.finished)),
    }
    diversity = diversity_metrics(experience.groups(), vocab_size)
    return metrics | {f"diversity/{k}": v for k, v in diversity.items()}


def spread(rewards: Float[np.ndarray, " N"]) -> float:
    """Sample standard deviation of what was scored; 0 of fewer than two."""
    scored = rewards[~np.isnan(rewards)]
    return float(np.std(scored, ddof=1)) if len(scored) > 1 else 0.0
