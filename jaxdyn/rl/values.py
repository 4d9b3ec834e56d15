"""Token by token: returns, generalised advantages and the loss of a value head.

r_t is the reward of token t, v_t the value of the state in which it was sampled, R_t the return.
The episode ends with the completion: what follows its last token is worth 0, also when it was cut
off. Masked slots may hold anything, wherever they lie.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdyn.rl.aggregation import Normalizer, aggregate, normalizer_of
from jaxdyn.rl.losses import LossConfig


def token_rewards(
    rewards: Float[Array, " B"], completion_mask: Bool[Array, "B C"]
) -> Float[Array, "B C"]:
    """r_bt = R_b at a completion's last token, 0 before it."""
    remaining = jnp.cumsum(completion_mask[:, ::-1], axis=1)[:, ::-1]
    return jnp.where(completion_mask & (remaining == 1), rewards[:, None], 0)


def generalized_advantages(
    rewards: Float[Array, "B C"],
    values: Float[Array, "B C"],
    completion_mask: Bool[Array, "B C"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Advantages A and returns A + v, both 0 at masked slots.

        δ_t = r_t + γ v_{t+1} - v_t        A_t = δ_t + γ λ A_{t+1}

    With v = 0 and λ = 1 both are the discounted rewards to go.
    Source: Schulman et al. 2016 (GAE), eq. 16.
    """
    values = jnp.where(completion_mask, values, 0)

    def backwards(later, slot):
        reward, value, here = slot
        advantage, next_value = later
        advantage = reward + gamma * next_value - value + gamma * lam * advantage
        # A masked slot hands on what came after it.
        now = jax.tree.map(lambda x, y: jnp.where(here, x, y), (advantage, value), later)
        return now, jnp.where(here, advantage, 0)

    slots = jax.tree.map(jnp.transpose, (rewards, values, completion_mask))
    end = jnp.zeros(values.shape[0], jnp.result_type(rewards, values))
    _, advantages = jax.lax.scan(backwards, (end, end), slots, reverse=True)
    advantages = advantages.T
    return advantages, advantages + values


def whiten(
    x: Float[Array, "B C"], mask: Bool[Array, "B C"], epsilon: float = 1e-8
) -> Float[Array, "B C"]:
    """(x - mean) / √(variance + ε) over the unmasked slots, the variance divided by n - 1; else 0.

    Fewer than two slots have no spread and give 0, as equal ones do: the smallest is subtracted
    before the mean is taken, so that its rounding is not whitened to something.
    """
    count = mask.sum()
    above = jnp.where(mask, x - jnp.min(x, where=mask, initial=jnp.inf), 0)
    centred = jnp.where(mask, above - above.sum() / jnp.maximum(count, 1), 0)
    variance = jnp.sum(centred**2) / jnp.maximum(count - 1, 1)
    return centred / jnp.sqrt(variance + epsilon)


def value_loss(
    config: LossConfig,
    values: Float[Array, "B C"],
    old_values: Float[Array, "B C"],
    returns: Float[Array, "B C"],
    completion_mask: Bool[Array, "B C"],
    normalizer: Normalizer | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """c_v times the value loss, to be added to the policy's, and metrics that add up over parts.

        token mean of ½ max((v - R)², (vᵒ + clip(v - vᵒ, -ε_v, ε_v) - R)²)

    `value_loss` is without c_v; `clip_ratio/value_mean` is the share of tokens where the clipped
    square is the larger. Source: Schulman et al. 2017 (PPO) and its published code for the clip.
    """
    normalizer = normalizer_of(completion_mask) if normalizer is None else normalizer
    values = jnp.where(completion_mask, values, 0)
    old, goal = (
        jax.lax.stop_gradient(jnp.where(completion_mask, x, 0)) for x in (old_values, returns)
    )
    mean = lambda x: aggregate("token-mean", x, completion_mask, normalizer)
    squares, metrics = (values - goal) ** 2, {}
    if config.value_clip is not None:
        near = old + jnp.clip(values - old, -config.value_clip, config.value_clip)
        clipped = (near - goal) ** 2
        metrics["clip_ratio/value_mean"] = mean((clipped > squares).astype(values.dtype))
        squares = jnp.maximum(squares, clipped)
    metrics["value_loss"] = mean(0.5 * squares)
    return config.value_coefficient * metrics["value_loss"], metrics


def explained_variance(
    values: Float[Array, "B C"], returns: Float[Array, "B C"], completion_mask: Bool[Array, "B C"]
) -> Float[Array, ""]:
    """1 - Var(R - v) / Var(R) over completion tokens: 1 foresees every return, 0 none of them.

    Of a whole batch: its parts' do not add up. 0 where all returns are equal.
    """
    count = jnp.maximum(completion_mask.sum(), 1)
    mean = lambda x: jnp.sum(jnp.where(completion_mask, x, 0)) / count
    spread = lambda x: jnp.sum(jnp.where(completion_mask, x - mean(x), 0) ** 2)
    total = spread(returns)
    return jnp.where(total > 0, 1 - spread(returns - values) / jnp.where(total > 0, total, 1), 0)
