"""Evaluation on held-out prompts: reward, task metrics, pass@k and best-of-N, by temperature.

The prompts and the key are the same at every evaluation, so that two policies differ by what they
are and not by their luck. Intervals are over prompts (`dynamics.sampling.mean_with_interval`).
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxdyn.config import EvaluationConfig, RunConfig, SFTConfig
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
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.task import Experience, Task, experience_metrics, gather_experience, score
from jaxdyn.train.update import policy_certainty
from jaxdyn.types import Params

SAMPLES = (8, 2)
"""Of how many prompts, and how many each, `temperatures.jsonl` keeps the completions."""


def evaluate(
    task: Task,
    view: Params,
    config: RunConfig,
    directory: RunDirectory,
    step: int,
    sweep: bool = False,
) -> dict[str, float]:
    """Sample the held-out prompts; keep the completions, and return the `eval_` metrics.

    With `sweep`, the configured temperatures are sampled too, into `temperatures.jsonl`.
    """
    experience, measured = sample_held_out(task, view, config)
    directory.log("samples.jsonl", *experience.records(step))
    metrics = {f"eval_{name}": value for name, value in measured.items()}
    if step < 0:
        directory.log("metrics.jsonl", {"step": step, **metrics})
    if sweep and config.evaluation.temperatures:
        own = config.sampling.temperature
        lines = {own: temperature_line(experience, measured, own)}
        for temperature in config.evaluation.temperatures:
            if temperature != own:
                found = sample_held_out(task, view, at_temperature(config, temperature))
                lines[temperature] = temperature_line(*found, temperature)
        ordered = (lines[temperature] for temperature in sorted(lines))
        directory.log("temperatures.jsonl", *({"step": step, **line} for line in ordered))
    return metrics


def sample_held_out(
    task: Task, view: Params, config: RunConfig | SFTConfig
) -> tuple[Experience, dict[str, float]]:
    """Completions of the held-out prompts, and all that is measured of them."""
    evaluation = config.evaluation
    count = min(evaluation.num_prompts, len(task.test))
    shape = config.train if isinstance(config, RunConfig) else config
    experience = gather_experience(
        task,
        view,
        [task.test[i] for i in range(count)],
        step_key(config.seed, "evaluation", 0),
        config,
        evaluation.num_generations,
        shape.max_prompt_length,
    )
    temperature = np.float32(config.sampling.temperature)
    rollout = task.layout.rows(experience.rollout)
    certainty = fetch(policy_certainty(task.model, view, rollout, temperature))
    grouped = lambda values: values.reshape(count, -1).astype(np.float64)
    scores = {}
    if task.metrics is not None:
        texts = (experience.prompts, experience.completions, experience.columns)
        scored = score(task.metrics, *texts)
        scores = {name: grouped(values) for name, values in scored.values.items()}
    metrics = utility(grouped(experience.rewards.total), scores, evaluation)
    metrics |= experience_metrics(experience, task.model.config.vocab_size)
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
    rows = experience.records(0)
    kept = [row for i, row in enumerate(rows) if i % experience.num_generations < each]
    samples = [
        {key: value for key, value in row.items() if key != "step"}
        for row in kept
        if row["prompt_index"] < prompts
    ]
    return {"temperature": temperature, **metrics, "samples": samples}


def at_temperature(config: Any, temperature: float) -> Any:
    """The configuration, sampling at another temperature."""
    sampling = dataclasses.replace(config.sampling, temperature=temperature)
    return dataclasses.replace(config, sampling=sampling)
