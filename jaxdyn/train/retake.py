"""A step's updates, taken as training takes them, each with all that it is the sum of.

`jaxdyn.dynamics.influence` says from these who moved whom. A step with several inner epochs is
several updates by one batch.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.config import RunConfig
from jaxdyn.dynamics import Change
from jaxdyn.hosts import fetch, whole
from jaxdyn.models import state_values
from jaxdyn.optim import Stage, applied_parts, merge
from jaxdyn.rl import LossConfig, logit_cotangents, normalizer_of, value_loss
from jaxdyn.train.policy import UpdateBatch, completion_statistics
from jaxdyn.train.probe import policy_of
from jaxdyn.train.sharing import batch_features, completion_features, rollout_of
from jaxdyn.train.state import TrainState
from jaxdyn.train.step import Prepared, split_state, take_epoch
from jaxdyn.train.task import Task
from jaxdyn.train.update import accumulate
from jaxdyn.types import JaxdynError, Model, Params, Rollout


class UpdateTaken(NamedTuple):
    """One update by a step's batch: the policy before it, the state after it, and its parts.

    `weights` [B, C, 2] are ∂loss/∂ log π and ∂loss/∂H of the batch's tokens before it, of π at the
    sampler's `temperature`; `metric` and the `others` are shaped as the policy's parameters
    (`jaxdyn.dynamics.influence`).
    """

    before: Params
    state: TrainState
    weights: np.ndarray
    temperature: float
    metric: Params
    clip: float
    others: dict[str, Change]

    @property
    def after(self) -> Params:
        """The policy after it."""
        return policy_of(self.state.params)


def batch_rollout(prepared: Prepared) -> Rollout:
    """The step's completions, in the slots of its batch."""
    return rollout_of(whole(prepared.batch))


def take_updates(
    task: Task[RunConfig], state: TrainState, stage: Stage, prepared: Prepared
) -> Iterator[UpdateTaken]:
    """The step's updates, one an inner epoch, taken as training takes them."""
    config = task.config
    if stage.name == "classifier" and config.optim.whitened:
        raise JaxdynError(
            "a whitened step is no sum over completions in a diagonal metric: influence has no "
            f"columns of it; take a step of joint training, none before {stage.end}"
        )
    if config.optim.spills:
        raise JaxdynError(
            f"a step of optim.schedule {config.optim.schedule} gives back entropy that no "
            "completion took: influence has no columns of it"
        )
    moving, frozen = split_state(task, state, stage)
    still = jax.tree.map(jnp.zeros_like, frozen)
    all_of = lambda parts: policy_of(merge(parts, still))
    for _ in range(config.train.num_iterations):
        before, copied = moving, jax.tree.map(jnp.copy, moving)
        moving, metrics = take_epoch(task, copied, frozen, prepared)
        parts = applied_parts(
            config.optim,
            before.params,
            before.opt_state,
            moving.opt_state,
            float(np.float32(prepared.rate)),  # as the update gets it
            float(fetch(metrics["grad_norm"])),
            before.head_moment,
        )
        params, metric = merge(before.params, frozen), all_of(parts.metric)
        others = {"momentum": Change(all_of(parts.momentum), parts.momentum_head)}
        if parts.decay is not None:
            others["decay"] = Change(all_of(parts.decay))
        if prepared.batch.values is not None and prepared.features is None:
            others["critic"] = critic_change(task, params, prepared.batch, metric, parts.clip)
        yield UpdateTaken(
            before=policy_of(params),
            state=moving.replace(params=merge(moving.params, frozen)),
            weights=fetch(loss_weights(task, params, prepared)),
            temperature=float(np.float32(config.sampling.temperature)),
            metric=metric,
            clip=parts.clip,
            others=others,
        )


def loss_weights(task: Task[RunConfig], params: Params, prepared: Prepared) -> jax.Array:
    """∂loss/∂ log π and ∂loss/∂H of the batch's tokens, [B, C, 2]."""
    config, batch, features = task.config, prepared.batch, prepared.features
    if features is None:
        features = batch_features(task.model, params["backbone"], batch)
    return _loss_weights(
        task.model,
        config.loss,
        params,
        batch,
        features,
        np.float32(config.sampling.temperature),
        config.sampling.max_completion_length,
    )


def critic_change(
    task: Task[RunConfig], params: Params, batch: UpdateBatch, metric: Params, clip: float
) -> Change:
    """What the value loss, whose head reads the policy's features, adds to the backbone."""
    config = task.config
    gradient = _value_gradient(
        task.model,
        config.loss,
        params,
        batch,
        config.sampling.max_completion_length,
        config.train.microbatches,
    )
    body = jax.tree.map(lambda m, g: -clip * m * g, metric["backbone"], gradient)
    head = jax.tree.map(jnp.zeros_like, metric["classifier"])
    return Change({"backbone": body, "classifier": head})


@functools.partial(jax.jit, static_argnames=("model", "loss", "max_completion_length"))
def _loss_weights(
    model: Model,
    loss: LossConfig,
    params: Params,
    batch: UpdateBatch,
    features: jax.Array,
    temperature: jax.Array,
    max_completion_length: int | None,
) -> jax.Array:
    classifier = model.view(params)["classifier"]
    found = completion_statistics(model, classifier, features, batch.completion_ids, temperature)
    cotangents = logit_cotangents(
        loss,
        found.logps,
        batch.old_per_token_logps,
        batch.ref_per_token_logps,
        batch.advantages,
        batch.completion_mask,
        normalizer_of(batch.completion_mask, max_completion_length),
        found.entropy,
        batch.sampler_per_token_logps,
        batch.held_back,
    )
    return jnp.stack([cotangents.of_logp, cotangents.of_entropy], axis=-1)


@functools.partial(
    jax.jit, static_argnames=("model", "loss", "max_completion_length", "microbatches")
)
def _value_gradient(
    model: Model,
    loss: LossConfig,
    params: Params,
    batch: UpdateBatch,
    max_completion_length: int | None,
    microbatches: int,
) -> Params:
    normalizer = normalizer_of(batch.completion_mask, max_completion_length)

    def of_part(part):
        def value(backbone):
            estimates = state_values(params["value"], completion_features(model, backbone, part))
            goals, mask = part.values, part.completion_mask
            return value_loss(loss, estimates, goals.old, goals.returns, mask, normalizer)[0]

        return jax.grad(value)(params["backbone"])

    return accumulate(of_part, batch, microbatches)
