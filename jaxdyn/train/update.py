"""The jitted update of training: of every parameter, or of the classifier alone.

Both minimise the same objective of the same arrays; they differ in where the features come from.
Joint training differentiates through the backbone. A classifier stage of RL receives the features
as data, so that no backward pass through the body exists in its program, and one pass over a
rollout batch serves all its inner epochs. Only the leaves that move are differentiated; the others
are data.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxdyn.models import state_values
from jaxdyn.optim import OptimConfig, head_direction, make_optimizer, merge
from jaxdyn.rl import (
    LossConfig,
    Normalizer,
    explained_variance,
    normalizer_of,
    policy_loss,
    value_loss,
)
from jaxdyn.train.policy import UpdateBatch, certainty, completion_statistics
from jaxdyn.train.sharing import of_completions, slot_features, slot_ids
from jaxdyn.train.state import TrainState
from jaxdyn.types import Model, Params, View

Metrics = dict[str, jax.Array]


def descend(
    state: TrainState,
    frozen: Params,
    objective: Callable[[View, Any], tuple[jax.Array, Metrics]],
    batch: Any,
    learning_rate: jax.Array,
    *,
    model: Model,
    optim: OptimConfig,
    microbatches: int = 1,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """θ ← θ − η (P m + λ θ) of the parameters in `state`, for the gradient of an objective.

    Args:
      state: the parameters that move, with their optimizer's state.
      frozen: the rest of the model, as far as the objective needs it.
      objective: of a view and a part of the batch: its share of the loss and metrics, sums.
      batch: a tree of arrays [B, ...].
      learning_rate: η.
      model: whose parameters they are.
      optim: the direction P m + λ θ.
      microbatches: parts in which the gradient is accumulated.
      axis: under `jax.pmap`, its axis, over whose devices the batch is divided.
    """
    moving = state.params
    # A shared matrix that moves is differentiated by path, the head's apart from the embedding's.
    shared = model.config.tied and "embedding" in moving.get("backbone", {}).get("embed", {})

    def gradient_of(part):
        def value(moving):
            whole = merge(moving, frozen)
            return objective(View(whole) if shared else model.view(whole), part)

        return jax.grad(value, has_aux=True)(model.view(moving) if shared else moving)

    by_path, metrics = accumulate(gradient_of, batch, microbatches)
    if axis is not None:
        by_path, metrics = over_devices((by_path, metrics), axis)
    gradient = model.fold(by_path) if shared else by_path
    direction, opt_state = make_optimizer(optim).update(gradient, state.opt_state, moving)
    step = lambda p, d: (p - learning_rate * d).astype(p.dtype)
    new = state.replace(params=jax.tree.map(step, moving, direction), opt_state=opt_state)
    if shared:
        head = by_path["classifier"]["weight"]
        norm, moments = optax.tree.norm(gradient), opt_state[1]["backbone"][0]
        moment, share = head_direction(optim, state.head_moment, head, norm, moments)
        head_share = state.head_share - learning_rate * share
        new = new.replace(head_moment=moment, head_share=head_share)
    # Of the gradient before clipping, and of the applied update η (P m + λ θ).
    norms = {
        "grad_norm": optax.tree.norm(gradient),
        "update_norm": learning_rate * optax.tree.norm(direction),
    }
    return new, {**metrics, **norms}


def accumulate(function: Callable[[Any], Any], batch: Any, microbatches: int) -> Any:
    """Σ `function(part)` over `microbatches` equal parts of the batch, one part in memory; of
    metrics that are a maximum the largest.

    A part has every so-manieth row, and so an equal share of every device's. Of arrays that are a
    multiple as long as the shortest it has what belongs to these rows.
    """
    if microbatches == 1:
        return function(batch)
    leaves, structure = jax.tree.flatten(batch)
    shortest = min(map(len, leaves))

    def divided(x):
        rows = x.reshape(-1, microbatches, len(x) // shortest, *x.shape[1:]).swapaxes(0, 1)
        return rows.reshape(microbatches, -1, *x.shape[1:])

    parts = [divided(x) for x in leaves]
    of_part = lambda part: function(jax.tree.unflatten(structure, part))
    shapes = jax.eval_shape(of_part, [x[0] for x in parts])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    join = lambda path, x, y: jnp.maximum(x, y) if is_maximum(path) else x + y
    add = lambda total, part: (jax.tree.map_with_path(join, total, of_part(part)), None)
    return jax.lax.scan(add, zeros, parts)[0]


def over_devices(tree: Any, axis: str) -> Any:
    """Σ of the parts of all devices under `jax.pmap`."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    largest = [x for path, x in leaves if is_maximum(path)]
    summed = [x for path, x in leaves if not is_maximum(path)]
    joined = iter(jax.lax.psum(summed, axis)), iter(jax.lax.pmax(largest, axis))
    return jax.tree.unflatten(structure, [next(joined[is_maximum(path)]) for path, _ in leaves])


def is_maximum(path: tuple) -> bool:
    """Whether a metric is a maximum, ≥ 0, which parts do not add up to."""
    return getattr(path[-1], "key", "").endswith("/max")


# -- RL -------------------------------------------------------------------------------------------


def policy_objective(
    model: Model,
    loss: LossConfig,
    view: Params,
    features: Float[Array, "B C D"],
    batch: UpdateBatch,
    temperature: jax.Array,
    normalizer: Normalizer,
    as_they_lie: bool = False,
) -> tuple[jax.Array, Metrics]:
    """The RL loss of classifier (and value head) on features, with its metrics, as sums.

    The features are by completion or, `as_they_lie`, those of `slot_features`.
    """
    mask = batch.completion_mask
    old, ref = batch.old_per_token_logps, batch.ref_per_token_logps
    ids = slot_ids(batch) if as_they_lie else batch.completion_ids
    place = functools.partial(of_completions, batch) if as_they_lie else lambda x: x
    found = completion_statistics(model, view["classifier"], features, ids, temperature)
    policy = jax.tree.map(place, found)
    beside = policy.entropy, batch.sampler_per_token_logps, batch.held_back
    value, metrics = policy_loss(
        loss, policy.logps, old, ref, batch.advantages, mask, normalizer, *beside
    )
    if batch.values is not None:
        estimates, goal = place(state_values(view["value"], features)), batch.values
        fit, of_values = value_loss(loss, estimates, goal.old, goal.returns, mask, normalizer)
        value, metrics = value + fit, {**metrics, **of_values}
    sure = certainty(policy, mask, normalizer)
    metrics = {**metrics, "loss": value, **sure}
    return value, jax.tree.map(jax.lax.stop_gradient, metrics)


@jax.named_scope("update")
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
) -> tuple[TrainState, Metrics]:
    """One policy-gradient update of the parameters in `state`; see `descend`.

    Args:
      frozen: the rest of the model, as far as the loss needs it: with features, no backbone.
      batch: the rollout batch with its advantages.
      features: φ at the completions' slots as data; None computes them, and moves the backbone.
      temperature: the sampler's.
      loss: the objective.
      max_completion_length: the sampler's limit, by which some losses divide; C when not given.
    """
    rows = lambda x: x if axis is None else jax.lax.all_gather(x, axis, tiled=True)
    normalizer = normalizer_of(rows(batch.completion_mask), max_completion_length)

    def objective(view, part):
        batch, phi = part
        given = phi is not None
        if not given:
            phi = slot_features(model, view["backbone"], batch)
        about = batch, temperature, normalizer
        return policy_objective(model, loss, view, phi, *about, as_they_lie=not given)

    new, metrics = descend(
        state,
        frozen,
        objective,
        (batch, features),
        learning_rate,
        model=model,
        optim=optim,
        microbatches=microbatches,
        axis=axis,
    )
    if batch.values is not None:
        old, returns = batch.values.old, batch.values.returns
        foreseen = explained_variance(rows(old), rows(returns), rows(batch.completion_mask))
        metrics["value/explained_variance"] = foreseen
    return new, metrics


update = jax.jit(
    take_update,
    static_argnames=("model", "loss", "optim", "microbatches", "max_completion_length"),
    donate_argnames="state",
)
"""`take_update`, jitted, for arguments on one device or on a mesh. Donates `state`."""
