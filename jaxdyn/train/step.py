"""One RL step, as a function of the state and the step's number alone.

    prompts -> completions -> rewards -> advantages -> update

Every random draw is a function of (seed, step) and every batch too. So the training loop, a resumed
run and a later analysis of a checkpoint all take exactly the same step.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.config import RunConfig
from jaxdyn.hosts import fetch, whole
from jaxdyn.optim import Stage, learning_rate, merge, trainable
from jaxdyn.rl import ScoredBatch, drop_truncated, estimate_advantages, held_back
from jaxdyn.rollout import step_key, trim
from jaxdyn.train.experience import Experience, experience_metrics
from jaxdyn.train.pmap import pmap_update
from jaxdyn.train.policy import (
    Policy,
    UpdateBatch,
    ValueTargets,
    batch_values,
    support_correction,
)
from jaxdyn.train.redraw import draw_experience
from jaxdyn.train.reference import reference_of, synchronised
from jaxdyn.train.sharing import batch_features, sequences_of
from jaxdyn.train.spill import spill_update
from jaxdyn.train.state import TrainState
from jaxdyn.train.task import Task
from jaxdyn.train.update import update
from jaxdyn.train.whitened import whitened_update
from jaxdyn.types import Params


class Taken(NamedTuple):
    """A step: the state it leads to, its metrics, its tokens, and completions worth keeping."""

    state: TrainState
    metrics: dict[str, Any]
    num_tokens: int
    completions: list[dict[str, Any]]


class Prepared(NamedTuple):
    """What a step's updates are made of: completions with their rewards, their arrays, and η.

    `features` are those of a classifier stage; `seconds` says what took how long.
    """

    experience: Experience
    batch: UpdateBatch
    features: jax.Array | None
    rate: float
    seconds: dict[str, float]


def take_step(task: Task[RunConfig], state: TrainState, stage: Stage, step: int) -> Taken:
    """Sample, score and update. `state`'s buffers are donated: copy what is needed of it first."""
    config = task.config
    began = time.perf_counter()
    prepared = prepare_step(task, state, stage, step)
    started = time.perf_counter()
    state, measured = run_epochs(task, state, stage, prepared)
    state = synchronised(state, config, step)
    metrics = {name: float(value) for name, value in fetch(measured).items()}
    updated = time.perf_counter()
    experience = prepared.experience
    metrics = {
        **experience_metrics(experience, task.model.config.vocab_size),
        **experience.redrawn,
        **metrics,
        **progress_of(task, stage, step, prepared.rate),
        **prepared.seconds,
        "time/update": updated - started,
        "step_time": updated - began,
    }
    num_tokens = int(np.sum(experience.rollout.mask))
    return Taken(
        state, metrics, num_tokens, experience.records(step, config.train.save_completions)
    )


def prepare_step(task: Task[RunConfig], state: TrainState, stage: Stage, step: int) -> Prepared:
    """Sample and score: all of a step but its updates."""
    began = time.perf_counter()
    experience = draw_experience(task, state.params, step, harvest=stage.name == "classifier")
    sampled = time.perf_counter()
    batch, features = make_batch(task, state, stage, experience, step)
    jax.block_until_ready(batch)
    seconds = {
        "time/rollout": sampled - began - experience.reward_seconds,
        "time/reward": experience.reward_seconds,
        "time/reference": time.perf_counter() - sampled,
    }
    return Prepared(experience, batch, features, rate_of(task, stage, step), seconds)


def rate_of(task: Task, stage: Stage, step: int) -> float:
    """The step's learning rate η; 0 where it has none."""
    if stage.name == "classifier" and task.config.optim.whitened:
        return 0.0
    return learning_rate(task.config.optim, stage.name, step - stage.start, stage.end - stage.start)


def progress_of(task: Task, stage: Stage, step: int, rate: float) -> dict[str, Any]:
    """Where in the run a step lies, and the learning rate of what it moves; the classifier's own
    beside the body's, where they differ."""
    own = rate * task.config.optim.classifier_multiplier
    rates = {"learning_rate": own if stage.name == "classifier" else rate}
    if stage.name != "classifier" and own != rate:
        rates["learning_rate/classifier"] = own
    return {
        **rates,
        "epoch": (step + 1) * task.config.train.num_prompts / len(task.train),
        "cfrl/stage": stage.number,
    }


@functools.partial(jax.profiler.annotate_function, name="reference")
def make_batch(
    task: Task[RunConfig], state: TrainState, stage: Stage, experience: Experience, step: int
) -> tuple[UpdateBatch, jax.Array | None]:
    """The update's arrays; in the classifier stage also the features, harvested in decoding.

    Completions are cut to the bucket of the longest, so that an update pays for what was sampled,
    and share a pass over their prompt where that saves time.
    """
    config, model, layout = task.config, task.model, task.layout
    loss, rollout = config.loss, trim(experience.rollout)
    temperature = np.float32(config.sampling.temperature)
    finished, mask = jnp.asarray(experience.finished), rollout.completion_mask
    parts = config.train.microbatches * model.row_shards
    sequences = layout.rows(sequences_of(rollout, config.train.num_generations, parts))

    features = layout.rows(rollout.features)
    if features is None and (loss.critic or loss.importance.support):
        features = batch_features(model, state.params["backbone"], sequences)
    policy = Policy(model, state.params, features)

    values = batch_values(state.params["value"], features) if loss.critic else None
    control = loss.covariance.control
    wants_old = config.train.num_iterations > 1 or loss.kl_placement == "reward" or control
    old = policy.logps(sequences, temperature) if wants_old else None
    ref, reference = None, state.reference or reference_of(task.params, config)
    if reference is not None:
        # In a classifier stage the body is still the reference's, and so are the features.
        known = features if stage.name == "classifier" else None
        ref = Policy(model, reference, known).logps(sequences, temperature)
    advantages, returns = estimate_advantages(
        config.advantage,
        loss,
        ScoredBatch(
            jnp.asarray(experience.rewards.total, jnp.float32),
            finished,
            mask,
            *whole((old, ref, values)),
        ),
        config.train.num_generations,
        config.sampling.max_completion_length,
    )
    counted = drop_truncated(mask, finished) if loss.mask_truncated else mask
    sampler = layout.rows(rollout.per_token_logps)
    if loss.importance.support:
        about = state.params, features, layout.rows(rollout.support), temperature
        sampler = sampler + support_correction(model, *about)
    held = None
    if control:
        key = step_key(config.seed, "covariance", step)
        held = layout.rows(held_back(loss.covariance, whole(old), advantages, counted, key))
    batch = UpdateBatch(
        tokens=sequences.tokens,
        mask=sequences.mask,
        completion_ids=sequences.completion_ids,
        completion_mask=layout.rows(counted),
        advantages=layout.rows(advantages),
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        values=None if values is None else ValueTargets(values, layout.rows(returns)),
        sampler_per_token_logps=sampler,
        held_back=held,
    )
    return batch, features if stage.name == "classifier" else None


@functools.partial(jax.profiler.annotate_function, name="update")
def run_epochs(
    task: Task[RunConfig], state: TrainState, stage: Stage, prepared: Prepared
) -> tuple[TrainState, dict[str, jax.Array]]:
    """All inner epochs of one step; the metrics are the last one's."""
    moving, frozen = split_state(task, state, stage)
    for _ in range(task.config.train.num_iterations):
        moving, metrics = take_epoch(task, moving, frozen, prepared)
    return state.replace(**vars(moving) | {"params": merge(moving.params, frozen)}), metrics


def take_epoch(
    task: Task[RunConfig], state: TrainState, frozen: Params, prepared: Prepared
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update by the step's whole batch, of the parameters in `state`, which is donated."""
    config, features = task.config, prepared.features
    needed = frozen if features is None else {k: v for k, v in frozen.items() if k != "backbone"}
    if features is not None and config.optim.whitened:
        return whitened_update(
            state,
            needed,
            prepared.batch,
            features,
            np.float32(config.optim.whitened_kl),
            np.float32(config.optim.whitened_ridge),
            np.float32(config.sampling.temperature),
            model=task.model,
            loss=config.loss,
            microbatches=config.train.microbatches,
            max_completion_length=config.sampling.max_completion_length,
        )
    take: Any = update
    if config.train.update == "pmap":
        take = functools.partial(pmap_update, task.layout)
    if config.optim.spills:
        take = functools.partial(spill_update, budget=np.float32(config.optim.spill_budget))
    return take(
        state,
        needed,
        prepared.batch,
        features,
        np.float32(prepared.rate),
        np.float32(config.sampling.temperature),
        model=task.model,
        loss=config.loss,
        optim=config.optim.rule,
        microbatches=config.train.microbatches,
        max_completion_length=config.sampling.max_completion_length,
    )


def split_state(task: Task, state: TrainState, stage: Stage) -> tuple[TrainState, dict[str, Any]]:
    """The state of the parameters that a stage moves, with nothing applied yet, and the others.

    A reference is none of what updates are given, and donate.
    """
    moving, frozen = trainable(task.config.optim, stage.name, state.params)
    share = state.head_share
    if share is not None:
        share = jnp.zeros_like(share)
    return TrainState(moving, state.opt_state, state.head_moment, share), frozen
