"""One RL step, as a function of the state and the step's number alone.

    prompts -> completions -> rewards -> advantages -> update

Every random draw is a function of (seed, step) and every batch too. So the training loop, a resumed
run and a later analysis of a checkpoint all take exactly the same step.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.config import RunConfig
from jaxdyn.data import batch_indices
from jaxdyn.distributed import Layout
from jaxdyn.hosts import fetch, whole
from jaxdyn.optim import Stage, enter_stage, learning_rate, make_optimizer, merge, trainable
from jaxdyn.rl import ScoredBatch, drop_truncated, estimate_advantages
from jaxdyn.rollout import step_key, trim
from jaxdyn.train.pmap import pmap_update
from jaxdyn.train.task import Experience, Task, experience_metrics, gather_experience
from jaxdyn.train.update import (
    TrainState,
    UpdateBatch,
    ValueTargets,
    batch_features,
    batch_values,
    classifier_logps,
    policy_logps,
    update,
)
from jaxdyn.types import Params


def take_step(
    task: Task,
    config: RunConfig,
    reference: Params,
    state: TrainState,
    stage: Stage,
    step: int,
) -> tuple[TrainState, Experience, dict[str, Any]]:
    """Sample, score and update; returns the new state, the experience, and the step's metrics.

    `state`'s buffers are donated to the update: copy what is needed of it first. `reference` is
    the view of the policy that the KL penalty refers to.
    """
    began = time.perf_counter()
    experience = gather_experience(
        task,
        task.model.view(state.params),
        prompts_of_step(task, config, step),
        step_key(config.seed, "rollout", step),
        config,
        config.train.num_generations,
        config.train.max_prompt_length,
        harvest=stage.name == "classifier",
    )
    sampled = time.perf_counter()
    batch, features = make_batch(task, config, state, stage, reference, experience)
    jax.block_until_ready(batch)
    prepared = time.perf_counter()
    rate = learning_rate(config.optim, stage.name, step - stage.start, stage.end - stage.start)
    state, measured = run_epochs(task, config, state, stage, batch, features, rate)
    metrics = {name: float(value) for name, value in fetch(measured).items()}
    updated = time.perf_counter()
    metrics = {
        **experience_metrics(experience, task.model.config.vocab_size),
        **metrics,
        "learning_rate": rate,
        "epoch": (step + 1) * config.train.num_prompts / len(task.train),
        "cfrl/stage": stage.number,
        "time/rollout": sampled - began - experience.reward_seconds,
        "time/reward": experience.reward_seconds,
        "time/reference": prepared - sampled,
        "time/update": updated - prepared,
        "step_time": updated - began,
    }
    return state, experience, metrics


def prompts_of_step(task: Task, config: RunConfig, step: int) -> list[dict[str, Any]]:
    """The step's examples: a function of the seed and the step alone."""
    indices = batch_indices(config.seed, step, config.train.num_prompts, len(task.train))
    return [task.train[int(i)] for i in indices]


def begin_stage(layout: Layout, config: RunConfig, stage: Stage, state: TrainState) -> TrainState:
    """Give the parts that begin to move an optimizer state."""
    moving, _ = trainable(config.optim, stage.name, state.params)
    reset = config.optim.reset_classifier_state
    opt_state = enter_stage(make_optimizer(config.optim), moving, state.opt_state, reset)
    return layout.place(state.replace(opt_state=opt_state))


def make_batch(
    task: Task,
    config: RunConfig,
    state: TrainState,
    stage: Stage,
    reference: Params,
    experience: Experience,
) -> tuple[UpdateBatch, jax.Array | None]:
    """The update's arrays; in the classifier stage also the features, harvested in decoding.

    Completions are cut to the bucket of the longest, so that an update pays for what was sampled.
    """
    loss, rollout = config.loss, trim(experience.rollout)
    temperature = np.float32(config.sampling.temperature)
    finished = jnp.asarray(experience.finished)
    mask = rollout.completion_mask
    batch = UpdateBatch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        completion_ids=rollout.completion_ids,
        completion_mask=drop_truncated(mask, finished) if loss.mask_truncated else mask,
        advantages=jnp.zeros(len(rollout.tokens)),
    )
    batch = task.layout.rows(batch)
    ids = batch.completion_ids
    view = task.model.view(state.params)
    features = rollout.features
    if features is not None:
        features = task.layout.rows(features)
    elif loss.critic:
        features = batch_features(task.model, view["backbone"], batch)

    def logps(policy: Params) -> jax.Array:
        if features is None or (policy is reference and stage.name == "joint"):
            return policy_logps(task.model, policy, batch, temperature)
        # While only the classifier has moved, the reference has the policy's features.
        return classifier_logps(task.model, policy["classifier"], features, ids, temperature)

    values = None
    if loss.critic:
        values = batch_values(state.params["value"], features)
    in_reward = loss.kl_placement == "reward"
    old = logps(view) if config.train.num_iterations > 1 or in_reward else None
    ref = logps(reference) if loss.beta else None
    old_here, ref_here, values_here = whole((old, ref, values))
    advantages, returns = estimate_advantages(
        config.advantage,
        loss,
        ScoredBatch(
            jnp.asarray(experience.rewards.total, jnp.float32),
            finished,
            mask,
            old_here,
            ref_here,
            values_here,
        ),
        config.train.num_generations,
        config.sampling.max_completion_length,
    )
    targets = None if values is None else ValueTargets(values, task.layout.rows(returns))
    batch = batch.replace(
        advantages=task.layout.rows(advantages),
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        values=targets,
    )
    return batch, features if stage.name == "classifier" else None


def run_epochs(
    task: Task,
    config: RunConfig,
    state: TrainState,
    stage: Stage,
    batch: UpdateBatch,
    features: jax.Array | None,
    rate: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """All inner epochs of one step; the metrics are the last one's."""
    moving, frozen = trainable(config.optim, stage.name, state.params)
    of_loss = frozen.keys() if features is None else frozen.keys() - {"backbone"}
    needed = {part: frozen[part] for part in of_loss}
    if state.head_share is not None:
        state = state.replace(head_share=jnp.zeros_like(state.head_share))
    state = state.replace(params=moving)
    take: Any = update
    if config.train.update == "pmap":
        take = functools.partial(pmap_update, task.layout)
    for _ in range(config.train.num_iterations):
        state, metrics = take(
            state,
            needed,
            batch,
            features,
            np.float32(rate),
            np.float32(config.sampling.temperature),
            model=task.model,
            loss=config.loss,
            optim=config.optim.rule,
            microbatches=config.train.microbatches,
            max_completion_length=config.sampling.max_completion_length,
        )
    return state.replace(params=merge(state.params, frozen)), metrics
