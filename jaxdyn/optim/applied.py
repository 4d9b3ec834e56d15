r"""What an applied update is the sum of: the fresh gradient, momentum, weight decay.

With g the gradient, c g the clipped one and t the part's step count, `make_optimizer` applies

    Δθ = −(M ⊙ c g) + momentum + decay,

    adamw   M = η s P,  P = 1 / (√ν̂ + ε),  s = (1 − b1) / (1 − b1ᵗ),   momentum = −η s' P ⊙ m,
            s' = b1 / (1 − b1ᵗ),  m the first moment before, ν̂ the second after, bias-corrected
    sgd     M = η,   momentum = −η μ m
    both    decay = −η λ θ

with η μ in the place of η for the classifier (`optim.classifier_multiplier`).
Each is linear in what it is made of once P is fixed, so that a completion's share of the fresh
gradient is its share of the update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdyn.optim.optimizer import OptimConfig
from jaxdyn.types import Params


class Applied(NamedTuple):
    """M, momentum and decay (None where λ is 0), shaped as the leaves that moved.

    `clip` is c. Of a tied matrix `momentum_head` is the head path's part of the momentum, else None
    (`jaxdyn.optim.head_direction`).
    """

    metric: Params
    momentum: Params
    decay: Params | None
    clip: float
    momentum_head: Any = None


def applied_parts(
    config: OptimConfig,
    moving: Params,
    before: optax.OptState,
    after: optax.OptState,
    learning_rate: float,
    grad_norm: float,
    head_moment: jax.Array | None = None,
) -> Applied:
    """The parts of one update by `make_optimizer(config)`.

    Args:
      moving: the leaves that it moved, before it.
      before, after: the optimizer's states.
      learning_rate: η.
      grad_norm: of the whole gradient before it was clipped.
      head_moment: a tied model's, before the update (`TrainState.head_moment`).
    """
    limit = config.max_grad_norm
    clip = limit / grad_norm if limit and grad_norm >= limit else 1.0
    metric, momentum = {}, {}
    for part, tree in moving.items():
        old, new = (state[1][part][0] for state in (before, after))
        if config.optimizer == "adamw":
            seen = 1 - config.b1**new.count
            second = 1 - config.b2**new.count
            per_gradient = lambda nu, seen=seen, second=second: (
                learning_rate / seen / (jnp.sqrt(nu / second) + config.eps)
            )
            scale = jax.tree.map(per_gradient, new.nu)
            metric[part] = jax.tree.map(lambda x: (1 - config.b1) * x, scale)
            momentum[part] = jax.tree.map(lambda x, m: -config.b1 * x * m, scale, old.mu)
        else:
            metric[part] = jax.tree.map(lambda x: jnp.full_like(x, learning_rate), tree)
            past = old.trace if config.momentum else jax.tree.map(jnp.zeros_like, tree)
            momentum[part] = jax.tree.map(lambda m: -learning_rate * config.momentum * m, past)
    head = None
    if head_moment is not None and "embedding" in moving.get("backbone", {}).get("embed", {}):
        fresh = (1 - config.b1, config.b1) if config.optimizer == "adamw" else (1, config.momentum)
        scale = metric["backbone"]["embed"]["embedding"] / fresh[0]
        head = -fresh[1] * scale * head_moment
    shrunk = lambda x: -learning_rate * config.weight_decay * x
    decay = jax.tree.map(shrunk, moving) if config.weight_decay else None
    if decay is not None:
        decay = multiplied(config, decay)
    return Applied(multiplied(config, metric), multiplied(config, momentum), decay, clip, head)


def multiplied(config: OptimConfig, tree: Params) -> Params:
    """The same with the classifier's leaves times its multiplier μ."""
    head = {part: tree[part] for part in ("classifier",) if part in tree}
    return {**tree, **optax.tree.scale(config.classifier_multiplier, head)}
