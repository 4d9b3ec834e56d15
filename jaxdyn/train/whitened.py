"""The update of a whitened classifier stage: no backward pass, one solve, and a budget of KL."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxdyn.optim import merge
from jaxdyn.optim.whitened import curvature, second_moment, step_length, whitened_direction
from jaxdyn.rl import LossConfig, normalizer_of
from jaxdyn.train.policy import UpdateBatch
from jaxdyn.train.state import TrainState
from jaxdyn.train.update import Metrics, accumulate, policy_objective
from jaxdyn.types import Model, Params, View


@functools.partial(
    jax.jit,
    static_argnames=("model", "loss", "microbatches", "max_completion_length"),
    donate_argnames="state",
)
@jax.named_scope("update")
def whitened_update(
    state: TrainState,
    frozen: Params,
    batch: UpdateBatch,
    features: Float[Array, "B C D"],
    kl: jax.Array,
    ridge: jax.Array,
    temperature: jax.Array,
    *,
    model: Model,
    loss: LossConfig,
    microbatches: int = 1,
    max_completion_length: int | None = None,
) -> tuple[TrainState, Metrics]:
    """W ← W + √(2δ/κ) D for the gradient of the RL loss on features that are data.

    A bias of the classifier stays, and so does the optimizer's state.

    Args:
      kl: δ, in nats a token, of the sampler's policy at `temperature`.
      ridge: λ in units of the features' mean square.

    For the other arguments see `take_update`.
    """
    normalizer = normalizer_of(batch.completion_mask, max_completion_length)
    params = merge(state.params, frozen)
    head = params["classifier"]
    seen = jnp.where(temperature > 0, temperature, 1)

    def gradient_of(part):
        batch, phi = part
        value = lambda weight: policy_objective(
            model,
            loss,
            View({**params, "classifier": {**head, "weight": weight}}),
            phi,
            batch,
            temperature,
            normalizer,
        )
        return jax.grad(value, has_aux=True)(head["weight"])

    gradient, metrics = accumulate(gradient_of, (batch, features), microbatches)
    moment, count = second_moment(features, batch.completion_mask)
    direction = whitened_direction(gradient, moment / jnp.maximum(count, 1), ridge)

    def of_row(row):
        phi, mask = row
        log_probs = jax.nn.log_softmax(model.logits(head, phi) / seen)
        change = jnp.einsum("cd,vd->cv", phi.astype(direction.dtype), direction) / seen
        return jnp.sum(jnp.where(mask, curvature(change, log_probs), 0))

    kappa = jnp.sum(jax.lax.map(of_row, (features, batch.completion_mask)))
    length = step_length(kappa / jnp.maximum(count, 1), kl)
    moved = (head["weight"] + length * direction).astype(head["weight"].dtype)
    norms = {
        "grad_norm": optax.tree.norm(gradient),
        "update_norm": length * optax.tree.norm(direction),
    }
    old = state.params["classifier"]
    new = {**state.params, "classifier": {**old, "weight": moved}}
    return state.replace(params=new), {**metrics, **norms}
