"""Advantages: how much better a completion was than what one would have expected of its prompt.

Rewards come as [B] with the G generations of a prompt side by side (row p * G + g). A NaN reward
is unscorable: its advantage is 0, and no mean or standard deviation counts it.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdyn.types import JaxdynError


def group_relative(
    rewards: Float[Array, " B"],
    num_generations: int,
    scale: Literal["group", "batch", "none"] = "group",
    epsilon: float = 1e-4,
) -> Float[Array, " B"]:
    """A_i = (R_i - mean of its group) / (σ + ε), σ of its group, of the batch, or 1 without ε.

    σ is the sample standard deviation (divided by n - 1). Equal rewards in a group give 0.
    Source: Shao et al. 2024 (GRPO), eq. 3; without scaling Liu et al. 2025 (Dr. GRPO).
    Raises `JaxdynError` for fewer than 2 generations, whose advantages would all be 0.
    """
    groups, scored = _groups(rewards, num_generations)
    centred = jnp.where(scored, groups - _mean(groups, scored, axis=1), 0)
    if scale == "group":
        centred = centred / (_std(groups, scored, axis=1) + epsilon)
    elif scale == "batch":
        centred = centred / (_std(groups, scored, axis=(0, 1)) + epsilon)
    elif scale != "none":
        raise JaxdynError(f"scale must be 'group', 'batch' or 'none', got {scale!r}")
    return centred.reshape(-1)


def leave_one_out(rewards: Float[Array, " B"], num_generations: int) -> Float[Array, " B"]:
    """A_i = R_i - mean of the other rewards of its group, n / (n - 1) times R_i - group mean.

    A completion alone with a score in its group has nothing to be compared with and gets 0.
    Source: Ahmadian et al. 2024 (RLOO). Raises `JaxdynError` for fewer than 2 generations.
    """
    groups, scored = _groups(rewards, num_generations)
    count = scored.sum(axis=1, keepdims=True)
    centred = jnp.where(scored, groups - _mean(groups, scored, axis=1), 0)
    return (centred * count / jnp.maximum(count - 1, 1)).reshape(-1)


def plain(
    rewards: Float[Array, " B"], baseline: Literal["batch", "none"] = "batch"
) -> Float[Array, " B"]:
    """A_i = R_i - mean of the batch, or R_i itself. Source: Williams 1992 (REINFORCE)."""
    scored = ~jnp.isnan(rewards)
    if baseline == "batch":
        rewards = rewards - _mean(rewards, scored, axis=0)
    elif baseline != "none":
        raise JaxdynError(f"baseline must be 'batch' or 'none', got {baseline!r}")
    return jnp.where(scored, rewards, 0)


def _groups(
    rewards: Float[Array, " B"], num_generations: int
) -> tuple[Float[Array, "P G"], Bool[Array, "P G"]]:
    """Rewards as [P, G] and which of them are scored."""
    if num_generations < 2:
        raise JaxdynError(
            f"num_generations must be at least 2 to compare generations, got {num_generations}"
        )
    if rewards.shape[0] % num_generations:
        raise JaxdynError(
            f"{rewards.shape[0]} rewards do not divide into groups of {num_generations} generations"
        )
    groups = rewards.reshape(-1, num_generations)
    return groups, ~jnp.isnan(groups)


def _mean(x, scored, axis):
    total = jnp.sum(jnp.where(scored, x, 0), axis=axis, keepdims=True)
    return total / jnp.maximum(scored.sum(axis=axis, keepdims=True), 1)


def _std(x, scored, axis):
    """Sample standard deviation; 0 where fewer than two are scored."""
    squares = jnp.where(scored, (x - _mean(x, scored, axis)) ** 2, 0)
    degrees = jnp.maximum(scored.sum(axis=axis, keepdims=True) - 1, 1)
    return jnp.sqrt(squares.sum(axis=axis, keepdims=True) / degrees)
