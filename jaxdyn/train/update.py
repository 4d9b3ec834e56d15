"""The jitted update of RL training: of every parameter, or of the classifier alone.

Both minimise the same objective of the same arrays; they differ in where the features come from.
Joint training differentiates through the backbone. A classifier stage receives the features as
data, so that no backward pass through the body exists in its program, and one pass over a rollout
batch serves all its inner epochs. Only the leaves that move are differentiated; the others are
data.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.models import state_values
from jaxdyn.optim import OptimConfig, head_direction, make_optimizer, merge
from jaxdyn.rl import (
    LossConfig,
    Normalizer,
    TokenStatistics,
    explained_variance,
    feature_statistics,
    normalizer_of,
    policy_loss,
    value_loss,
)
from jaxdyn.types import Model, Params, Rollout, View


class ValueTargets(struct.PyTreeNode):
    """What the value head is held to: its estimates before the update, and the returns."""

    old: Float[Array, "B C"]
    returns: Float[Array, "B C"]


class UpdateBatch(struct.PyTreeNode):
    """What a policy-gradient update needs of B sampled sequences of S + C slots."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    completion_ids: Int[Array, "B C"]
    completion_mask: Bool[Array, "B C"]
    advantages: Float[Array, " B"] | Float[Array, "B C"]
    old_per_token_logps: Float[Array, "B C"] | None = None
    ref_per_token_logps: Float[Array, "B C"] | None = None
    values: ValueTargets | None = None


class TrainState(struct.PyTreeNode):
    """Parameters as stored (an update is given those that move alone), and their optimizer's state.

    For tied models `head_moment` [V, D] follows the head path's part of the shared matrix's
    momentum and `head_share` [V, D] sums its part of the updates since it was last set to zero;
    else both are None. The leaves may also be shapes or anything else that checkpoints put there.
    """

    params: Params
    opt_state: Any
    head_moment: Any = None
    head_share: Any = None


def completion_features(
    model: Model, backbone: Params, batch: UpdateBatch | Rollout
) -> Float[Array, "B C D"]:
    """φ at the slots that predict each completion token."""
    slots = batch.completion_ids.shape[1]
    return model.features(backbone, batch.tokens, batch.mask)[:, -slots - 1 : -1]


batch_features = jax.jit(completion_features, static_argnums=0)
"""`completion_features`, jitted: one pass over a rollout batch for all its inner epochs."""

batch_values = jax.jit(state_values)
"""The value head's estimates from features, before an update."""


def completion_statistics(
    model: Model, classifier: Params, features: jax.Array, ids: jax.Array, temperature: jax.Array
) -> TokenStatistics:
    """`feature_statistics` of the model's policy."""
    return feature_statistics(
        model.logits, classifier, features, ids, temperature, shards=model.shards
    )


@functools.partial(jax.jit, static_argnames="model")
def classifier_logps(
    model: Model, classifier: Params, features: jax.Array, ids: jax.Array, temperature: jax.Array
) -> Float[Array, "B C"]:
    """Per-token log-probs of `ids` from features."""
    return completion_statistics(model, classifier, features, ids, temperature).logps


@functools.partial(jax.jit, static_argnames="model")
def policy_logps(
    model: Model, view: View, batch: UpdateBatch, temperature: jax.Array
) -> Float[Array, "B C"]:
    """Teacher-forced per-token log-probs of the batch's completions."""
    features = completion_features(model, view["backbone"], batch)
    return classifier_logps(model, view["classifier"], features, batch.completion_ids, temperature)


@functools.partial(jax.jit, static_argnames="model")
def policy_certainty(
    model: Model, view: View, rollout: Rollout, temperature: jax.Array
) -> dict[str, jax.Array]:
    """Means over a rollout's completion tokens: entropy, confidence, sampled log-prob."""
    features = completion_features(model, view["backbone"], rollout)
    statistics = completion_statistics(
        model, view["classifier"], features, rollout.completion_ids, temperature
    )
    return certainty(statistics, rollout.completion_mask, normalizer_of(rollout.completion_mask))


def certainty(
    statistics: TokenStatistics, mask: jax.Array, normalizer: Normalizer
) -> dict[str, jax.Array]:
    """Entropy (nats), largest probability and sampled log-prob, summed over tokens / all tokens."""
    token_mean = lambda x: jnp.sum(jnp.where(mask, x, 0)) / normalizer.tokens
    return {
        "entropy": token_mean(statistics.entropy),
        "confidence/max_prob": token_mean(statistics.max_prob),
        "confidence/sampled_logp": token_mean(statistics.logps),
        "confidence/margin": token_mean(statistics.margin),
    }


def objective(
    model: Model,
    loss: LossConfig,
    view: View,
    features: Float[Array, "B C D"],
    batch: UpdateBatch,
    temperature: jax.Array,
    normalizer: Normalizer,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The RL loss of classifier (and value head) on features, with its metrics, as sums."""
    statistics = completion_statistics(
        model, view["classifier"], features, batch.completion_ids, temperature
    )
    value, metrics = policy_loss(
        loss,
        statistics.logps,
        batch.old_per_token_logps,
        batch.ref_per_token_logps,
        batch.advantages,
        batch.completion_mask,
        normalizer,
        statistics.entropy,
    )
    if batch.values is not None:
        old, returns = batch.values.old, batch.values.returns
        estimates = state_values(view["value"], features)
        fit, of_values = value_loss(
            loss, estimates, old, returns, batch.completion_mask, normalizer
        )
        value, metrics = value + fit, {**metrics, **of_values}
    sure = certainty(statistics, batch.completion_mask, normalizer)
    metrics = {**metrics, "loss": value, **sure}
    return value, jax.tree.map(jax.lax.stop_gradient, metrics)


def accumulate(function: Callable[[Any], Any], batch: Any, microbatches: int) -> Any:
    """Σ `function(part)` over `microbatches` equal parts of the batch, one part in memory.

    A part has every so-manieth row, and so an equal share of every device's.
    """
    if microbatches == 1:
        return function(batch)
    leaves, structure = jax.tree.flatten(batch)
    parts = [x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1) for x in leaves]
    of_part = lambda part: function(jax.tree.unflatten(structure, part))
    shapes = jax.eval_shape(of_part, [x[0] for x in parts])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, of_part(part)), None)
    return jax.lax.scan(add, zeros, parts)[0]


def take_update(
    state: TrainState,
    frozen: Params,
    batch: UpdateBatch,
    features: Float[Array, "B C D"] | None,
    learning_rate: jax.Array,
    temperature: jax.Array,
    *,
    model: Model,
    loss: LossConfig,
    optim: OptimConfig,
    microbatches: int = 1,
    max_completion_length: int | None = None,
    axis: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the parameters in `state`: θ ← θ − η (P m + λ θ).

    Args:
      state: the parameters that move, with their optimizer's state.
      frozen: the rest of the model, as far as the loss needs it: with features, no backbone.
      batch: the rollout batch with its advantages.
      features: φ at the completions' slots as data; None computes them, and moves the backbone.
      learning_rate: η.
      temperature: the sampler's.
      model: a `LanguageModel`.
      loss: the objective.
      optim: the direction P m + λ θ.
      microbatches: parts in which the gradient is accumulated.
      max_completion_length: the sampler's limit, by which some losses divide; C when not given.
      axis: under `jax.pmap`, its axis, over whose devices the batch is divided.
    """
    rows = lambda x: x if axis is None else jax.lax.all_gather(x, axis, tiled=True)
    normalizer = normalizer_of(rows(batch.completion_mask), max_completion_length)
    moving = state.params
    # A shared matrix that moves is differentiated by path, the head's apart from the embedding's.
    shared = model.config.tied and "embedding" in moving.get("backbone", {}).get("embed", {})

    def gradient_of(part):
        batch, features = part

        def value(moving):
            whole = merge(moving, frozen)
            view = View(whole) if shared else model.view(whole)
            phi = features
            if phi is None:
                phi = completion_features(model, view["backbone"], batch)
            return objective(model, loss, view, phi, batch, temperature, normalizer)

        return jax.grad(value, has_aux=True)(model.view(moving) if shared else moving)

    by_path, metrics = accumulate(gradient_of, (batch, features), microbatches)
    if axis is not None:
        by_path, metrics = jax.lax.psum((by_path, metrics), axis)
    gradient = model.fold(by_path) if shared else by_path
    direction, opt_state = make_optimizer(optim).update(gradient, state.opt_state, moving)
    new = state.replace(params=descend(moving, direction, learning_rate), opt_state=opt_state)
    if shared:
        head = by_path["classifier"]["weight"]
        norm, moments = optax.tree.norm(gradient), opt_state[1]["backbone"][0]
        moment, share = head_direction(optim, state.head_moment, head, norm, moments)
        head_share = state.head_share - learning_rate * share
        new = new.replace(head_moment=moment, head_share=head_share)
    if batch.values is not None:
        old, returns = batch.values.old, batch.values.returns
        foreseen = explained_variance(rows(old), rows(returns), rows(batch.completion_mask))
        metrics["value/explained_variance"] = foreseen
    return new, {**metrics, **norms(gradient, direction, learning_rate)}


update = jax.jit(
    take_update,
    static_argnames=("model", "loss", "optim", "microbatches", "max_completion_length"),
    donate_argnames="state",
)
"""`take_update`, jitted, for arguments on one device or on a mesh. Donates `state`."""


def norms(gradient: Params, direction: Params, learning_rate: jax.Array) -> dict[str, jax.Array]:
    """Global norms of the gradient, before clipping, and of the applied update η (P m + λ θ)."""
    update_norm = learning_rate * optax.tree.norm(direction)
    return {"grad_norm": optax.tree.norm(gradient), "update_norm": update_norm}


def descend(params: Params, direction: Params, learning_rate: jax.Array) -> Params:
    """θ − η · direction, in the parameters' own dtype."""
    step = lambda p, d: (p - learning_rate * d).astype(p.dtype)
    return jax.tree.map(step, params, direction)
