"""Policy-gradient losses: pure functions of per-token log-probabilities.

ℓ, ℓᵒ, ℓʳ are the new, old and reference log-probabilities of the sampled tokens, m the completion
mask (up to and including the stop token), A the advantage, ρ = exp(ℓ - ℓᵒ). Every loss is

    loss = Σ_b reduce_t(surrogate_bt + β kl_bt) / n

where n counts the sequences or the tokens of the *whole* batch. Every metric is such a sum too.
So with the whole batch's `Normalizer` the losses, metrics and gradients of micro-batches add up to
the batch's: gradient accumulation changes nothing.

Deviations from the papers: an omitted ℓᵒ means ℓᵒ = stop_gradient(ℓ), so ρ = 1; RLOO's sequence
ratio is clipped, which changes nothing on the first pass over a batch; REINFORCE uses no ℓᵒ.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxdyn.rl.kl import Estimator, per_token_kl
from jaxdyn.types import JaxdynError

LossType = Literal["grpo", "rloo", "reinforce"]
Aggregation = Literal["sequence-mean-token-mean", "sequence-mean-token-sum", "token-mean"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which loss, how it is clipped, and how it is kept near the reference.

    Attributes:
      loss_type: grpo, rloo or reinforce (`LOSSES`).
      beta: weight β of the KL to the reference, in the loss or in the reward; 0 leaves it out.
      epsilon: the ratio is clipped below at 1 - ε.
      epsilon_high: and above at 1 + ε_high; ε when not given.
      aggregation: how tokens and sequences are averaged; the loss's own way when not given.
      kl_estimator: k1, k2 or k3; when not given, k3 in the loss and k1 in the reward.
      kl_placement: where the KL goes.
      use_bias_correction_kl: multiply the KL in the loss by the ratio ρ.
    """

    loss_type: LossType = "grpo"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    aggregation: Aggregation | None = None
    kl_estimator: Estimator | None = None
    kl_placement: Literal["loss", "reward"] = "loss"
    use_bias_correction_kl: bool = False

    def __post_init__(self):
        if not 0 <= self.beta < float("inf"):
            raise JaxdynError(f"beta must be 0 or more, got {self.beta}")
        if not 0 < self.epsilon < 1:
            raise JaxdynError(f"epsilon must lie between 0 and 1, got {self.epsilon}")
        if self.epsilon_high is not None and not 0 < self.epsilon_high < float("inf"):
            raise JaxdynError(f"epsilon_high must be above 0, got {self.epsilon_high}")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                choices = [choice for choice in get_args(kind) if choice is not None]
                raise JaxdynError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.kl_placement == "reward" and self.beta == 0:
            raise JaxdynError("kl_placement is 'reward' but beta is 0: there is no KL to place")
        if self.use_bias_correction_kl and self.kl_placement == "reward":
            raise JaxdynError("use_bias_correction_kl needs kl_placement 'loss', got 'reward'")
        if self.loss_type == "rloo" and self.aggregation not in (None, LOSSES["rloo"].aggregation):
            raise JaxdynError(
                f"rloo weighs whole sequences: aggregation must be {LOSSES['rloo'].aggregation!r}, "
                f"got {self.aggregation!r}"
            )

    @property
    def clip_range(self) -> tuple[float, float]:
        """[1 - ε, 1 + ε_high]."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + high

    @property
    def resolved_aggregation(self) -> Aggregation:
        return self.aggregation or LOSSES[self.loss_type].aggregation

    @property
    def resolved_kl_estimator(self) -> Estimator:
        return self.kl_estimator or ("k3" if self.kl_placement == "loss" else "k1")


_CHOICES = {
    "loss_type": LossType,
    "aggregation": Literal[Aggregation, None],
    "kl_estimator": Literal[Estimator, None],
    "kl_placement": Literal["loss", "reward"],
}


@struct.dataclass
class Normalizer:
    """What the whole batch's sums are divided by: its sequences, and its completion tokens."""

    sequences: Float[Array, ""]
    tokens: Float[Array, ""]


def normalizer_of(completion_mask: Bool[Array, "B C"]) -> Normalizer:
    """The counts of a batch; of an accumulated batch, those of all its micro-batches together."""
    sequences = jnp.asarray(completion_mask.shape[0], jnp.float32)
    return Normalizer(sequences, jnp.maximum(completion_mask.sum(), 1).astype(jnp.float32))


def policy_loss(
    config: LossConfig,
    per_token_logps: Float[Array, "B C"],
    old_per_token_logps: Float[Array, "B C"] | None,
    ref_per_token_logps: Float[Array, "B C"] | None,
    advantages: Float[Array, " B"],
    completion_mask: Bool[Array, "B C"],
    normalizer: Normalizer | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss to minimise and its metrics: `policy_loss`, with a reference `kl`, and for clipped
    losses `clip_ratio/low_mean` and `clip_ratio/high_mean`.

    `normalizer` counts the whole batch when these rows are a part of it; by default they are all.
    `kl` is the mean over tokens. Masked slots may hold anything, and get gradient 0.
    Raises `JaxdynError` when β asks for a reference that is not there.
    """
    if config.beta and ref_per_token_logps is None:
        raise JaxdynError(f"beta is {config.beta} but there are no reference log-probabilities")
    normalizer = normalizer_of(completion_mask) if normalizer is None else normalizer
    mask = completion_mask
    new = jnp.where(mask, per_token_logps, 0)
    old = jax.lax.stop_gradient(new if old_per_token_logps is None else old_per_token_logps)
    old = jnp.where(mask, old, 0)

    surrogate = LOSSES[config.loss_type].surrogate(config, new, old, advantages[:, None], mask)
    mean = lambda x: aggregate(config.resolved_aggregation, x, surrogate.mask, normalizer)
    loss = mean(surrogate.loss)
    metrics = {"policy_loss": loss} | {name: mean(x) for name, x in surrogate.metrics.items()}
    if ref_per_token_logps is not None:
        ref = jax.lax.stop_gradient(jnp.where(mask, ref_per_token_logps, 0))
        kl = per_token_kl(config.resolved_kl_estimator, new, ref)
        metrics["kl"] = aggregate("token-mean", kl, mask, normalizer)
        if config.beta and config.kl_placement == "loss":
            if config.use_bias_correction_kl:
                kl = jnp.exp(new - old) * kl
            penalty = aggregate(config.resolved_aggregation, kl, mask, normalizer)
            loss = loss + config.beta * penalty
    return loss, metrics


def aggregate(
    aggregation: Aggregation,
    x: Float[Array, "B C"],
    mask: Bool[Array, "B C"],
    normalizer: Normalizer,
) -> Float[Array, ""]:
    """Σ_b reduce_t x_bt / n: these rows' share of the whole batch's aggregate.

    sequence-mean-token-mean   Σ_b (Σ_t m x / Σ_t m) / sequences
    sequence-mean-token-sum    Σ_b  Σ_t m x          / sequences
    token-mean                 Σ_b  Σ_t m x          / tokens
    """
    per_sequence = jnp.sum(jnp.where(mask, x, 0), axis=1)
    if aggregation == "sequence-mean-token-mean":
        per_sequence = per_sequence / jnp.maximum(mask.sum(axis=1), 1)
    whole = normalizer.tokens if aggregation == "token-mean" else normalizer.sequences
    return per_sequence.sum() / whole


# -- the losses -------------------------------------------------------------------------------


class Surrogate(NamedTuple):
    """A loss before aggregation, over the C tokens or, as one column, over whole sequences."""

    loss: jax.Array
    metrics: dict[str, jax.Array]
    mask: jax.Array


class Loss(NamedTuple):
    """A surrogate `(config, ℓ, ℓᵒ, A [B, 1], m) -> Surrogate` and how it is usually aggregated."""

    surrogate: Callable[..., Surrogate]
    aggregation: Aggregation


def clipped(config: LossConfig, ratio: jax.Array, advantages: jax.Array, mask: jax.Array):
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε_high) A), and where each bound took effect.

    Source: Schulman et al. 2017 (PPO), eq. 7.
    """
    low, high = config.clip_range
    loss = -jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
    metrics = {
        "clip_ratio/low_mean": ((ratio < low) & (advantages < 0)).astype(loss.dtype),
        "clip_ratio/high_mean": ((ratio > high) & (advantages > 0)).astype(loss.dtype),
    }
    return Surrogate(loss, metrics, mask)


def grpo(config, new, old, advantages, mask) -> Surrogate:
    """ρ of every token, clipped. Source: Shao et al. 2024, eq. 3."""
    return clipped(config, jnp.exp(new - old), advantages, mask)


def rloo(config, new, old, advantages, mask) -> Surrogate:
    """ρ of the whole sequence, exp(Σ_t (ℓ - ℓᵒ)), clipped. Source: Ahmadian et al. 2024."""
    ratio = jnp.exp(jnp.sum(new - old, axis=1, keepdims=True))
    return clipped(config, ratio, advantages, mask.any(axis=1, keepdims=True))


def reinforce(config, new, old, advantages, mask) -> Surrogate:
    """-A ℓ, whose gradient is the policy gradient at the sampled tokens. Source: Williams 1992."""
    return Surrogate(-advantages * new, {}, mask)


LOSSES: dict[str, Loss] = {
    "grpo": Loss(grpo, "sequence-mean-token-mean"),
    "rloo": Loss(rloo, "sequence-mean-token-sum"),
    "reinforce": Loss(reinforce, "sequence-mean-token-sum"),
}
"""Every loss by its `loss_type`; another loss is another row."""
