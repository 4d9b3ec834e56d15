"""The two jitted update steps of CF-RL: all parameters, and the classifier alone.

Both minimise the same objective of the same arrays; they differ in where the features come from.
The joint update differentiates through the backbone. The classifier update receives the features
as data, so that no backward pass through the body exists in its program, and one pass over a
rollout batch serves all its inner epochs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.optim import OptimConfig, head_direction, make_optimizer
from jaxdyn.rl import (
    LossConfig,
    Normalizer,
    TokenStatistics,
    feature_statistics,
    normalizer_of,
    policy_loss,
)
from jaxdyn.types import Params, Rollout


class UpdateBatch(struct.PyTreeNode):
    """What a policy-gradient update needs of B sampled sequences of S + C slots."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    completion_ids: Int[Array, "B C"]
    completion_mask: Bool[Array, "B C"]
    advantages: Float[Array, " B"]
    old_per_token_logps: Float[Array, "B C"] | None = None
    ref_per_token_logps: Float[Array, "B C"] | None = None


class TrainState(struct.PyTreeNode):
    """Parameters as stored, and the optimizer's state of those that the stage moves.

    For tied models `head_moment` [V, D] follows the head path's part of the shared matrix's
    momentum and `head_share` [V, D] sums its part of the updates since it was last set to zero;
    else both are None. The leaves may also be shapes or anything else that checkpoints put there.
    """

    params: Params
    opt_state: Any
    head_moment: Any = None
    head_share: Any = None


def completion_features(
    model: Any, backbone: Params, batch: UpdateBatch | Rollout
) -> Float[Array, "B C D"]:
    """φ at the slots that predict each completion token."""
    slots = batch.completion_ids.shape[1]
    return model.features(backbone, batch.tokens, batch.mask)[:, -slots - 1 : -1]


batch_features = jax.jit(completion_features, static_argnums=0)
"""`completion_features`, jitted: the classifier stage's one pass over a rollout batch."""


@functools.partial(jax.jit, static_argnames="model")
def classifier_logps(
    model: Any, classifier: Params, features: jax.Array, ids: jax.Array, temperature: jax.Array
) -> Float[Array, "B C"]:
    """Per-token log-probs of `ids` from features."""
    return feature_statistics(model.logits, classifier, features, ids, temperature).logps


@functools.partial(jax.jit, static_argnames="model")
def policy_logps(
    model: Any, view: Params, batch: UpdateBatch, temperature: jax.Array
) -> Float[Array, "B C"]:
    """Teacher-forced per-token log-probs of the batch's completions."""
    features = completion_features(model, view["backbone"], batch)
    return classifier_logps(model, view["classifier"], features, batch.completion_ids, temperature)


@functools.partial(jax.jit, static_argnames="model")
def policy_certainty(
    model: Any, view: Params, rollout: Rollout, temperature: jax.Array
) -> dict[str, jax.Array]:
    """Means over a rollout's completion tokens: entropy, confidence, sampled log-prob."""
    features = completion_features(model, view["backbone"], rollout)
    statistics = feature_statistics(
        model.logits, view["classifier"], features, rollout.completion_ids, temperature
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
    }


def objective(
    model: Any,
    loss: LossConfig,
    classifier: Params,
    features: Float[Array, "B C D"],
    batch: UpdateBatch,
    temperature: jax.Array,
    normalizer: Normalizer,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The RL loss of a classifier on features, with its metrics; sums over micro-batches."""
    statistics = feature_statistics(
        model.logits, classifier, features, batch.completion_ids, temperature
    )
    value, metrics = policy_loss(
        loss,
        statistics.logps,
        batch.old_per_token_logps,
        batch.ref_per_token_logps,
        batch.advantages,
        batch.completion_mask,
        normalizer,
    )
    sure = certainty(statistics, batch.completion_mask, normalizer)
    metrics = {**metrics, "loss": value, **sure}
    return value, jax.tree.map(jax.lax.stop_gradient, metrics)


def accumulate(function: Callable[[Any], Any], batch: Any, microbatches: int) -> Any:
    """Σ `function(part)` over `microbatches` equal parts of the batch, one part in memory."""
    if microbatches == 1:
        return function(batch)
    leaves, structure = jax.tree.flatten(batch)
    parts = [x.reshape(microbatches, -1, *x.shape[1:]) for x in leaves]
    of_part = lambda part: function(jax.tree.unflatten(structure, part))
    shapes = jax.eval_shape(of_part, [x[0] for x in parts])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, of_part(part)), None)
    return jax.lax.scan(add, zeros, parts)[0]


_STATIC = ("model", "loss", "optim", "microbatches")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def joint_update(
    state: TrainState,
    batch: UpdateBatch,
    learning_rate: jax.Array,
    temperature: jax.Array,
    *,
    model: Any,
    loss: LossConfig,
    optim: OptimConfig,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of all parameters: θ ← θ − η (P m + λ θ). Donates `state`."""
    view = model.view(state.params)
    normalizer = normalizer_of(batch.completion_mask)

    def gradient_of(part: UpdateBatch):
        def value(view):
            features = completion_features(model, view["backbone"], part)
            return objective(
                model, loss, view["classifier"], features, part, temperature, normalizer
            )

        gradient, metrics = jax.grad(value, has_aux=True)(view)
        return gradient, metrics

    by_path, metrics = accumulate(gradient_of, batch, microbatches)
    gradient = model.fold(by_path)
    norm = optax.tree.norm(gradient)
    direction, opt_state = make_optimizer(optim).update(gradient, state.opt_state, state.params)
    new = state.replace(params=descend(state.params, direction, learning_rate), opt_state=opt_state)
    if model.config.tied:
        head = by_path["classifier"]["weight"]
        moments = opt_state[1]["backbone"][0]
        moment, share = head_direction(optim, state.head_moment, head, norm, moments)
        head_share = state.head_share - learning_rate * share
        new = new.replace(head_moment=moment, head_share=head_share)
    return new, {**metrics, **norms(gradient, direction, learning_rate)}


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("classifier", "opt_state"))
def classifier_update(
    classifier: Params,
    opt_state: Any,
    features: Float[Array, "B C D"],
    batch: UpdateBatch,
    learning_rate: jax.Array,
    temperature: jax.Array,
    *,
    model: Any,
    loss: LossConfig,
    optim: OptimConfig,
    microbatches: int = 1,
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """One update of W alone on precomputed features. Donates `classifier` and `opt_state`."""
    normalizer = normalizer_of(batch.completion_mask)

    def gradient_of(part):
        features, batch = part
        value = lambda classifier: objective(
            model, loss, classifier, features, batch, temperature, normalizer
        )
        return jax.grad(value, has_aux=True)(classifier)

    gradient, metrics = accumulate(gradient_of, (features, batch), microbatches)
    moving, gradient = {"classifier": classifier}, {"classifier": gradient}
    direction, opt_state = make_optimizer(optim).update(gradient, opt_state, moving)
    new = descend(moving, direction, learning_rate)["classifier"]
    return new, opt_state, {**metrics, **norms(gradient, direction, learning_rate)}


def norms(gradient: Params, direction: Params, learning_rate: jax.Array) -> dict[str, jax.Array]:
    """Global norms of the gradient, before clipping, and of the applied update η (P m + λ θ)."""
    update_norm = learning_rate * optax.tree.norm(direction)
    return {"grad_norm": optax.tree.norm(gradient), "update_norm": update_norm}


def descend(params: Params, direction: Params, learning_rate: jax.Array) -> Params:
    """θ − η · direction, in the parameters' own dtype."""
    step = lambda p, d: (p - learning_rate * d).astype(p.dtype)
    return jax.tree.map(step, params, direction)
