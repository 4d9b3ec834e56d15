"""Estimators of KL(π ‖ π_ref) from the sampled token's log-probabilities ℓ and ℓʳ.

    k1 = ℓ - ℓʳ        k2 = ½ (ℓ - ℓʳ)²        k3 = exp(ℓʳ - ℓ) - (ℓʳ - ℓ) - 1

For samples of π, k1 and k3 have the KL as expectation, k2 only to second order. Their gradients at
fixed samples are another matter: in a loss, k2's has the gradient of KL(π ‖ π_ref) as expectation,
k3's that of KL(π_ref ‖ π), k3 times the ratio ρ again that of KL(π ‖ π_ref), and k1's is 0, so that
k1 in a loss regularises nothing. k1 in the reward gives the gradient of KL(π ‖ π_ref).
Source: Schulman 2020, "Approximating KL divergence".
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Estimator = Literal["k1", "k2", "k3"]

_ESTIMATORS = {
    "k1": lambda excess: excess,
    "k2": lambda excess: 0.5 * excess**2,
    "k3": lambda excess: jnp.expm1(-excess) + excess,
}


def per_token_kl(
    estimator: Estimator,
    per_token_logps: Float[Array, "*B"],
    ref_per_token_logps: Float[Array, "*B"],
) -> Float[Array, "*B"]:
    """The estimate at every token, in nats."""
    return _ESTIMATORS[estimator](per_token_logps - ref_per_token_logps)


def kl_penalty(
    beta: float,
    estimator: Estimator,
    old_per_token_logps: Float[Array, "B C"],
    ref_per_token_logps: Float[Array, "B C"],
    completion_mask: Bool[Array, "B C"],
) -> Float[Array, "B C"]:
    """β k(ℓᵒ_bt, ℓʳ_bt): what every token's reward loses to the KL; 0 at masked slots."""
    kl = per_token_kl(estimator, old_per_token_logps, ref_per_token_logps)
    return jnp.where(completion_mask, beta * kl, 0)


def penalised_rewards(
    rewards: Float[Array, " B"],
    beta: float,
    estimator: Estimator,
    old_per_token_logps: Float[Array, "B C"],
    ref_per_token_logps: Float[Array, "B C"],
    completion_mask: Bool[Array, "B C"],
) -> Float[Array, " B"]:
    """R'_b = R_b - β Σ_t k(ℓᵒ_bt, ℓʳ_bt): the KL placed in the reward (a NaN reward stays NaN)."""
    penalty = kl_penalty(beta, estimator, old_per_token_logps, ref_per_token_logps, completion_mask)
    return rewards - penalty.sum(axis=1)
