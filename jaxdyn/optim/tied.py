"""Which part of a tied matrix's update came through the classifier.

A shared matrix E gets one gradient g = g_head + g_emb and one optimizer state. Every optimizer here
is linear in the gradients it has seen once its preconditioner is fixed, so its update splits by
path: the head path's share uses the moments of g_head alone under the whole gradient's
preconditioner. Weight decay has no path; it stays with the embedding's share.
"""

import jax
import jax.numpy as jnp

from jaxdyn.optim.optimizer import OptimConfig


def head_direction(
    config: OptimConfig,
    head_moment: jax.Array,
    head_gradient: jax.Array,
    gradient_norm: jax.Array,
    moments_state,
) -> tuple[jax.Array, jax.Array]:
    """The head path's first moment, and its part of the optimizer's direction P m.

    Args:
      config: the optimizer's.
      head_moment: the moment before this update, [V, D]; zeros at the start.
      head_gradient: g_head [V, D], before clipping.
      gradient_norm: global norm of the whole gradient, for the clip.
      moments_state: the backbone's moments after this update (an optax Adam or trace state).
    """
    clip = config.max_grad_norm or jnp.inf
    gradient = head_gradient * jnp.minimum(1.0, clip / jnp.maximum(gradient_norm, 1e-30))
    if config.optimizer == "sgd":
        moment = config.momentum * head_moment + gradient
        return moment, moment
    moment = config.b1 * head_moment + (1 - config.b1) * gradient
    second = moments_state.nu["embed"]["embedding"] / (1 - config.b2**moments_state.count)
    mean = moment / (1 - config.b1**moments_state.count)
    return moment, mean / (jnp.sqrt(second) + config.eps)
