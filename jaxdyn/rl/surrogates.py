"""What a loss is before it is averaged: surrogates of ℓ, ℓᵒ and A, of tokens or of sequences.

For the notation and the deviations from their sources see `jaxdyn.rl.losses`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdyn.types import JaxdynError


class Surrogate(NamedTuple):
    """A loss before aggregation, over the C tokens or, as one column, over whole sequences."""

    loss: jax.Array
    metrics: dict[str, jax.Array]
    mask: jax.Array


def clipped(config: Any, ratio: jax.Array, advantages: jax.Array, mask: jax.Array):
    """-min(min(ρ, δ) A, clip(ρ, 1 - ε, 1 + ε_high) A), and where each bound took effect.

    Sources: Schulman et al. 2017 (PPO), eq. 7; the dual clip δ, Ye et al. 2020, eq. 5.
    """
    low, high = config.clip_range
    capped = ratio if config.delta is None else jnp.minimum(ratio, config.delta)
    loss = -jnp.minimum(capped * advantages, jnp.clip(ratio, low, high) * advantages)
    metrics = {
        "clip_ratio/low_mean": ((ratio < low) & (advantages < 0)).astype(loss.dtype),
        "clip_ratio/high_mean": ((ratio > high) & (advantages > 0)).astype(loss.dtype),
    }
    return Surrogate(loss, metrics, mask)


def token_ratio(config, new, old, advantages, mask) -> Surrogate:
    """ρ of every token, clipped. Source: Shao et al. 2024 (GRPO), eq. 3."""
    return clipped(config, jnp.exp(new - old), advantages, mask)


def mean_ratio(config, new, old, advantages, mask) -> Surrogate:
    """ρ of the sequence, exp(mean_t (ℓ - ℓᵒ)), clipped; a token's gradient goes through its ℓ.

    Source: Zheng et al. 2025 (GSPO), eq. 7 and 14.
    """
    lengths = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    log_ratio = jnp.sum(new - old, axis=1, keepdims=True) / lengths
    held = jax.lax.stop_gradient
    return clipped(config, jnp.exp(held(log_ratio) + new - held(new)), advantages, mask)


def product_ratio(config, new, old, advantages, mask) -> Surrogate:
    """ρ of the whole sequence, exp(Σ_t (ℓ - ℓᵒ)), clipped. Source: Ahmadian et al. 2024 (RLOO)."""
    if advantages.shape[1] != 1:
        raise JaxdynError(f"rloo takes one advantage a sequence, got {advantages.shape}")
    ratio = jnp.exp(jnp.sum(new - old, axis=1, keepdims=True))
    return clipped(config, ratio, advantages, mask.any(axis=1, keepdims=True))


def capped_weight(config, new, old, advantages, mask) -> Surrogate:
    """-stop_gradient(min(ρ, ε_high)) A ℓ. Sources: MiniMax 2025 (CISPO), eq. 4; TRL for the cap."""
    ratio, cap = jax.lax.stop_gradient(jnp.exp(new - old)), config.resolved_epsilon_high
    metrics = {"clip_ratio/high_mean": (ratio > cap).astype(ratio.dtype)}
    return Surrogate(-jnp.minimum(ratio, cap) * advantages * new, metrics, mask)


def log_prob(config, new, old, advantages, mask) -> Surrogate:
    """-A ℓ, whose gradient is the policy gradient at the sampled tokens. Source: Williams 1992."""
    return Surrogate(-advantages * new, {}, mask)
