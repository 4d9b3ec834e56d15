"""Evaluation on held-out prompts: reward, task metrics, pass@k and best-of-N, by temperature.

The prompts and the key are the same at every evaluation, so that two policies differ by what they
are and not by their luck. Intervals are over prompts (`dynamics.sampling.mean_with_interval`).
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxdyn.dynamics.sampling import (
    Estimate,
    best_of_n,
    mean_with_interval,
    pass_at_k,
    powers_of_two,
    prompt_means,
)
from jaxdyn.hosts import fetch
from jaxdyn.rollout import step_key
from jaxdyn.sections import EvaluationConfig
from jaxdyn.train.experience import Experience, experience_metrics, gather_experience, score
from jaxdyn.train.policy import policy_certainty
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.sharing import sequences_of
from jaxdyn.train.task import Task
from jaxdyn.types import Params

SAMPLES = (8, 2)
"""Of how many prompts, and how many each, `temperatures.jsonl` keeps the completions."""


Sampled = tuple[Experience, dict[str, float]]
"""Completions of the held-out prompts, and what is measured of them."""


@functools.partial(jax.profiler.annotate_function, name="evaluation")
def evaluate(task: Task, params: Params, directory: RunDirectory, step: int) -> Sampled:
    """Sample the held-out prompts, keep the completions; what is measured of them."""
    experience, measured = sample_held_out(task, params)
    directory.log("samples.jsonl", *experience.records(step))
    return experience, measured


def sweep_temperatures(
    task: Task,
    params: Params,
    directory: RunDirectory,
    step: int,
    known: Sampled | tuple[None, dict[str, float]],
) -> None:
    """Sample the configured temperatures too, into `temperatures.jsonl`; the own one is `known`.

    A run that samples nothing has none configured.
    """
    own, asked = task.config.sampling.temperature, task.config.evaluation.temperatures
    for temperature in sorted({own, *asked}) if asked else ():
        other = task.at_temperature(temperature)
        experience, metrics = known if temperature == own else sample_held_out(other, params)
        assert experience is not None
        line = temperature_line(experience, metrics, temperature)
        directory.log("temperatures.jsonl", {"step": step, **line})


def sample_held_out(task: Task, params: Params) -> Sampled:
    """Completions of the held-out prompts, and all that is measured of them."""
    config = task.config
    evaluation = config.evaluation
    examples, key = task.test[: evaluation.num_prompts], step_key(config.seed, "evaluation", 0)
    experience = gather_experience(task, params, examples, key, evaluation.num_generations)
    temperature = np.float32(config.sampling.temperature)
    given = experience.rollout, evaluation.num_generations, task.model.row_shards
    batch = task.layout.rows(sequences_of(*given))
    certainty = fetch(policy_certainty(task.model, params, batch, temperature))
    grouped = lambda values: values.reshape(len(examples), -1).astype(np.float64)
    scores = {}
    if task.metrics is not None:
        texts = (experience.prompts, experience.completions, experience.columns)
        scored = score(task.metrics, *texts)
        scores = {name: grouped(values) for name, values in scored.values.items()}
    metrics = experience_metrics(experience, task.model.config.vocab_size)
    metrics |= utility(grouped(experience.rewards.total), scores, evaluation)
    return experience, metrics | {name: float(value) for name, value in certainty.items()}


def utility(
    rewards: Float[np.ndarray, "P M"],
    metrics: dict[str, Float[np.ndarray, "P M"]],
    config: EvaluationConfig,
) -> dict[str, float]:
    """What P prompts' M completions are worth: `reward`, `metrics/{name}`, `pass@k`, `best_of@n`.

    Each is a mean over prompts, with its interval's ends under `_ci_low` and `_ci_high`. A score
    is nan where there is none; what is then not defined, and an interval of one prompt, is left
    out.
    """
    judged = next(iter(metrics.values()), rewards)
    correct = np.sum(judged >= config.success_threshold, axis=1)  # nan is not
    drawn = np.sum(~np.isnan(judged), axis=1)

    found = {"reward": mean_with_interval(prompt_means(rewards))}
    for name, values in metrics.items():
        found[f"metrics/{name}"] = mean_with_interval(prompt_means(values))
    for k in config.pass_at or powers_of_two(config.num_generations):
        passed = mean_with_interval(pass_at_k(correct, drawn, k))
        bounded = np.clip(passed, 0, 1).tolist()  # it is a probability: nothing is lost
        found[f"pass@{k}"] = Estimate(*bounded)
        found[f"best_of@{k}"] = mean_with_interval(best_of_n(rewards, k))
    return {
        key: value
        for name, (mean, low, high) in found.items()
        for key, value in ((name, mean), (f"{name}_ci_low", low), (f"{name}_ci_high", high))
        if np.isfinite(value)
    }


def temperature_line(
    experience: Experience, metrics: dict[str, float], temperature: float
) -> dict[str, Any]:
    """A line of `temperatures.jsonl`: the measures, and some completions."""
    prompts, each = SAMPLES
    first = experience.records(limit=prompts * experience.num_generations)
    samples = [row for i, row in enumerate(first) if i % experience.num_generations < each]
    return {"temperature": temperature, **metrics, "samples": samples}
