"""The update with a budget of entropy: the plain one, then what W has to give back."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdyn.optim import OptimConfig, merge
from jaxdyn.optim.spill import entropy_pull, metric_times, repayment
from jaxdyn.rl import LossConfig
from jaxdyn.train.policy import UpdateBatch
from jaxdyn.train.sharing import completion_features
from jaxdyn.train.state import TrainState
from jaxdyn.train.update import Metrics, take_update
from jaxdyn.types import Model, Params


@functools.partial(
    jax.jit,
    static_argnames=("model", "loss", "optim", "microbatches", "max_completion_length"),
    donate_argnames="state",
)
def spill_update(
    state: TrainState,
    frozen: Params,
    batch: UpdateBatch,
    features: Float[Array, "B C D"] | None,
    learning_rate: jax.Array,
    temperature: jax.Array,
    budget: jax.Array,
    *,
    model: Model,
    loss: LossConfig,
    optim: OptimConfig,
    microbatches: int = 1,
    max_completion_length: int | None = None,
) -> tuple[TrainState, Metrics]:
    """`take_update`, then W ← W + λ P c (`jaxdyn.optim.spill`), of features before it.

    Args:
      budget: ε, in nats a token, of π at `temperature`.

    For the other arguments see `take_update`. `spill/entropy` is the change that the plain update
    makes through W, to first order, `spill/repaid` what it is given back.
    """
    before = merge(state.params, frozen)
    new, metrics = take_update(
        state,
        frozen,
        batch,
        features,
        learning_rate,
        temperature,
        model=model,
        loss=loss,
        optim=optim,
        microbatches=microbatches,
        max_completion_length=max_completion_length,
    )
    if features is None:
        features = completion_features(model, model.view(before)["backbone"], batch)
    old, moved = before["classifier"], new.params["classifier"]
    pull = entropy_gradient(model, old, features, batch.completion_mask, temperature)
    scaled = metric_times(optim, new.opt_state[1]["classifier"][0], {"weight": pull})["weight"]
    inner = lambda x, y: jnp.sum(x * y)
    change = inner(pull, moved["weight"] - old["weight"])
    curvature = inner(pull, scaled)
    factor = repayment(change, curvature, budget)
    weight = (moved["weight"] + factor * scaled).astype(moved["weight"].dtype)
    metrics |= {"spill/entropy": change, "spill/repaid": factor * curvature}
    return new.replace(params={**new.params, "classifier": {**moved, "weight": weight}}), metrics


@jax.named_scope("spill")
def entropy_gradient(
    model: Model,
    head: Params,
    features: Float[Array, "B C D"],
    mask: Array,
    temperature: jax.Array,
) -> Float[Array, "V D"]:
    """c, the gradient of the mean entropy at the tokens in W, a row of the batch at a time."""
    seen = jnp.where(temperature > 0, temperature, 1)
    weight = head["weight"]
    wide = jnp.promote_types(weight.dtype, jnp.float32)

    def add(total, row):
        phi, counted = row
        log_probs = jax.nn.log_softmax(model.logits(head, phi).astype(wide) / seen)
        of_tokens = jnp.where(counted[:, None], entropy_pull(log_probs) / seen, 0)
        own = jnp.einsum("cv,cd->vd", of_tokens, phi.astype(wide), precision="highest")
        return total + own, None

    total, _ = jax.lax.scan(add, jnp.zeros(weight.shape, wide), (features, mask))
    return total / jnp.maximum(jnp.sum(mask), 1)
