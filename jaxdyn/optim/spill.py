r"""The spill budget: how much entropy a step may take, through W, from the batch's other prompts.

With H̄ the mean entropy at the batch's tokens and φ held fixed,

    c = ∂H̄/∂W = −(1/N) Σ_o q_o φ_oᵀ,    q = π ⊙ (log π + H),

a step ΔW = η P g of the optimizer changes H̄ by ⟨c, ΔW⟩ to first order. Applied is P (g + τ c), or

    ΔW + λ P c,    λ = η τ = max(0, −(⟨c, ΔW⟩ + ε) / ⟨c, P c⟩),

so that ⟨c, ·⟩ of it is at least −ε: the step that is nearest to ΔW in the metric P⁻¹ among those
that keep to the budget. It takes no backward pass. Of the tokens o all but those of a sample's own
prompt are of other prompts, and all are of other prompts than what momentum brings along. What the
body does to the entropy is not in it. (Ours; for a Lagrange multiplier of a first-order constraint
see gradient projection, Rosen 1960.)
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxdyn.optim.optimizer import OptimConfig
from jaxdyn.types import Params


def entropy_pull(log_probs: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """∂H/∂f = −q of H = −Σ π log π."""
    probs = jnp.exp(log_probs)
    weighted = jnp.where(probs > 0, probs * log_probs, 0)
    return -weighted + probs * jnp.sum(weighted, axis=-1, keepdims=True)


def metric_times(config: OptimConfig, moments, tree: Params) -> Params:
    """P x of the optimizer whose `moments` are those of the same leaves after its step."""
    if config.optimizer == "sgd":
        return tree
    correction = 1 - config.b2**moments.count
    return {
        name: x / (jnp.sqrt(moments.nu[name] / correction) + config.eps) for name, x in tree.items()
    }


def repayment(
    change: Float[Array, ""], curvature: Float[Array, ""], budget: ArrayLike
) -> Float[Array, ""]:
    """λ, of a step that changes H̄ by `change` nats, with `curvature` ⟨c, P c⟩ and ε = `budget`."""
    owed = jnp.maximum(0, -(change + budget))
    return jnp.where(curvature > 0, owed / jnp.where(curvature > 0, curvature, 1), 0)
