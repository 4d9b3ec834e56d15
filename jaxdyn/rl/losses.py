"""Policy-gradient losses: pure functions of per-token log-probabilities.

ℓ, ℓᵒ, ℓʳ are the new, old and reference log-probabilities of the sampled tokens, m the completion
mask (up to and including the stop token), A the advantage, ρ = exp(ℓ - ℓᵒ). Every loss is

    loss = aggregate(surrogate) + β aggregate(kl) - c token_mean(entropy)

and a row of `LOSSES`: its surrogate, how it averages, the advantages it takes, how it clips. The
surrogate may be weighed for a sampler that differs (`importance`) and held back at single tokens
for the entropy's sake (`covariance`).

Deviations from the papers: an omitted ℓᵒ means ℓᵒ = stop_gradient(ℓ), so ρ = 1; RLOO's sequence
ratio is clipped, which changes nothing on the first pass over a batch; REINFORCE uses no ℓᵒ; GSPO's
is its token form, the same number and gradient for one advantage a sequence; CISPO caps ρ at
epsilon_high itself, as TRL does, not at 1 + epsilon_high.

Deviations from TRL 1.16: the KL's correction by ρ (`use_bias_correction_kl`) takes a token's own
ratio under every loss, where TRL takes GSPO's of the sequence, for an estimate at a token is one of
the KL there; `bnpo` counts the tokens of the whole batch (`aggregation`); CISPO's clip ratio counts
what was capped at either sign of A; a completion that any function with a weight could not score is
unscorable, where TRL adds up the others' (`rewards`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdyn.grammar import above, at_least, between, one_of
from jaxdyn.rl.aggregation import (
    Aggregation,
    AggregationAlias,
    Normalizer,
    aggregate,
    canonical,
    normalizer_of,
)
from jaxdyn.rl.covariance import CovarianceConfig
from jaxdyn.rl.importance import ImportanceConfig, importance_weights, sampler_difference
from jaxdyn.rl.kl import Estimator, per_token_kl
from jaxdyn.rl.surrogates import (
    Surrogate,
    capped_weight,
    log_prob,
    mean_ratio,
    product_ratio,
    token_ratio,
)
from jaxdyn.types import JaxdynError

LossType = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "bnpo",
    "gspo",
    "cispo",
    "rloo",
    "reinforce",
    "reinforce_plus_plus",
    "ppo",
]
Scale = Literal["group", "batch", "none"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which loss, how it is clipped, and how it is kept near the reference.

    Attributes:
      loss_type: one of `LOSSES`.
      beta: weight β of the KL to the reference, in the loss or in the reward; 0 leaves it out.
      epsilon: the ratio is clipped below at 1 - ε; the loss's own (mostly 0.2) when not given.
      epsilon_high: and above at 1 + ε_high; the loss's own, or ε, when not given. For cispo the cap
        of the ratio itself.
      delta: dual clip: the unclipped ratio is capped here, so that a negative advantage weighs at
        most δ; above 1 + ε_high it changes nothing else.
      aggregation: how tokens and sequences are averaged; the loss's own way when not given.
      kl_estimator: k1, k2 or k3; when not given, k3 in the loss and k1 in the reward.
      kl_placement: where the KL goes. PPO, RLOO and REINFORCE++ were published with "reward".
      use_bias_correction_kl: multiply the KL in the loss by the ratio ρ.
      mask_truncated: completions cut off before a stop token take no part in the loss.
      entropy_coefficient: weight c of the entropy bonus, the mean over tokens under every loss.
      value_clip: PPO's values may leave the old ones by this much before the loss is clipped.
      value_coefficient: weight of PPO's value loss.
      importance: weights for a sampler that is not quite the policy.
      covariance: control of the entropy by Clip-Cov or KL-Cov.
    """

    loss_type: LossType = "grpo"
    beta: float = 0.0
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    aggregation: Literal[Aggregation, AggregationAlias] | None = None
    kl_estimator: Estimator | None = None
    kl_placement: Literal["loss", "reward"] = "loss"
    use_bias_correction_kl: bool = False
    mask_truncated: bool = False
    entropy_coefficient: float = 0.0
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    importance: ImportanceConfig = ImportanceConfig()
    covariance: CovarianceConfig = CovarianceConfig()

    def __post_init__(self):
        for name, kind in _CHOICES.items():
            one_of(get_args(kind), self, "loss", name)
        at_least(0, self, "loss", "beta", "entropy_coefficient", "value_coefficient")
        between(0, 1, self, "loss", "epsilon", ends="()")
        above(0, self, "loss", "epsilon_high", "value_clip")
        above(1, self, "loss", "delta")
        own = LOSSES[self.loss_type]
        for field in dataclasses.fields(self):
            value, optional = getattr(self, field.name), field.name in _CLIP | _VALUE
            if optional and field.name not in own.options and value != field.default:
                raise JaxdynError(
                    f"loss.{field.name} is of no use to {self.loss_type}, got {value}"
                )
        if self.loss_type == "cispo" and self.resolved_epsilon_high < 1:
            raise JaxdynError(
                "loss.epsilon_high must be at least 1 for cispo, which caps the ratio itself at "
                f"it, got {self.epsilon_high}"
            )
        if self.beta == 0 and self.kl_placement == "reward":
            raise JaxdynError("loss.kl_placement is 'reward' but loss.beta is 0: there is no KL")
        if self.use_bias_correction_kl and (self.beta == 0 or self.kl_placement == "reward"):
            raise JaxdynError(
                "loss.use_bias_correction_kl needs a KL in the loss, got beta "
                f"{self.beta} and kl_placement {self.kl_placement!r}"
            )
        if own.of_sequences and self.resolved_aggregation != own.aggregation:
            raise JaxdynError(
                f"loss.aggregation must be {own.aggregation!r} for {self.loss_type}, which weighs "
                f"whole sequences, got {self.aggregation!r}"
            )
        if own.of_sequences and self.importance.cap and self.importance.level == "token":
            raise JaxdynError(
                f"loss.importance.level must be 'sequence' for {self.loss_type}, which weighs "
                "whole sequences, got 'token'"
            )
        control = self.covariance.control
        if control and own.surrogate is not token_ratio:
            raise JaxdynError(
                f"loss.covariance.control is of no use to {self.loss_type}, which has no ratio of "
                f"each token, got {control!r}"
            )
        if control == "kl":
            for name in sorted(_CLIP):
                if (value := getattr(self, name)) is not None:
                    raise JaxdynError(
                        f"loss.{name} is of no use with loss.covariance.control kl, whose penalty "
                        f"takes the clip's place, got {value}"
                    )

    @property
    def resolved_epsilon(self) -> float:
        return LOSSES[self.loss_type].epsilon if self.epsilon is None else self.epsilon

    @property
    def resolved_epsilon_high(self) -> float:
        own = LOSSES[self.loss_type].epsilon_high
        high = own if self.epsilon_high is None else self.epsilon_high
        return self.resolved_epsilon if high is None else high

    @property
    def critic(self) -> bool:
        """Whether a value head learns beside the policy."""
        return LOSSES[self.loss_type].critic

    @property
    def clip_range(self) -> tuple[float, float]:
        """[1 - ε, 1 + ε_high]; everything under KL-Cov."""
        if self.covariance.control == "kl":
            return 0.0, float("inf")
        return 1 - self.resolved_epsilon, 1 + self.resolved_epsilon_high

    @property
    def resolved_aggregation(self) -> Aggregation:
        return canonical(self.aggregation or LOSSES[self.loss_type].aggregation)

    @property
    def resolved_kl_estimator(self) -> Estimator:
        return self.kl_estimator or ("k3" if self.kl_placement == "loss" else "k1")


_CHOICES: dict[str, Any] = {
    "loss_type": LossType,
    "aggregation": Literal[Aggregation, AggregationAlias, None],
    "kl_estimator": Literal[Estimator, None],
    "kl_placement": Literal["loss", "reward"],
}


def policy_loss(
    config: LossConfig,
    per_token_logps: Float[Array, "B C"],
    old_per_token_logps: Float[Array, "B C"] | None,
    ref_per_token_logps: Float[Array, "B C"] | None,
    advantages: Float[Array, " B"] | Float[Array, "B C"],
    completion_mask: Bool[Array, "B C"],
    normalizer: Normalizer | None = None,
    entropy: Float[Array, "B C"] | None = None,
    sampler_per_token_logps: Float[Array, "B C"] | None = None,
    held_back: Bool[Array, "B C"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss to minimise and its metrics: `policy_loss`, with a reference `kl`, and for clipped
    losses `clip_ratio/low_mean` and `clip_ratio/high_mean`; with the sampler's log-probs how far
    ℓᵒ is from them (`sampling/…`). All but a maximum add up over the parts of a batch.

    `normalizer` counts the whole batch when these rows are a part of it; by default they are all.
    `entropy` is the policy's at every slot, in nats, for the bonus. `kl` is the mean over tokens.
    `held_back` are the tokens of `loss.covariance` (`jaxdyn.rl.held_back`). Masked slots may hold
    anything, and get gradient 0.
    Raises `JaxdynError` when β asks for a reference, c for an entropy, a cap for the sampler's
    log-probs, or a control for its tokens, that are not there.
    """
    if config.beta and ref_per_token_logps is None:
        raise JaxdynError(f"loss.beta is {config.beta} but there are no reference log-probs")
    if config.entropy_coefficient and entropy is None:
        raise JaxdynError(
            f"loss.entropy_coefficient is {config.entropy_coefficient} but there is no entropy"
        )
    control, cap = config.covariance.control, config.importance.cap
    if control and (held_back is None or old_per_token_logps is None):
        raise JaxdynError(
            f"loss.covariance.control is {control} but there are no old log-probs or no tokens "
            "held back"
        )
    if cap and sampler_per_token_logps is None:
        raise JaxdynError(f"loss.importance.cap is {cap} but there are no log-probs of the sampler")
    normalizer = normalizer_of(completion_mask) if normalizer is None else normalizer
    mask, aggregation = completion_mask, config.resolved_aggregation
    new = jnp.where(mask, per_token_logps, 0)
    old = jax.lax.stop_gradient(new if old_per_token_logps is None else old_per_token_logps)
    old = jnp.where(mask, old, 0)
    weights = advantages[:, None] if advantages.ndim == 1 else jnp.where(mask, advantages, 0)

    own = LOSSES[config.loss_type]
    surrogate = own.surrogate(config, new, old, weights, mask)
    of_tokens, beside = surrogate.loss, {}
    if control and held_back is not None:
        if control == "clip":
            of_tokens = jnp.where(held_back, 0, of_tokens)
        else:
            penalty = config.covariance.beta * per_token_kl("k3", old, new)
            of_tokens = of_tokens + jnp.where(held_back, penalty, 0)
        held = held_back.astype(new.dtype)
        beside["covariance/held_back"] = aggregate("token-mean", held, mask, normalizer)
    if sampler_per_token_logps is not None:
        sampler = jnp.where(mask, sampler_per_token_logps, 0)
        beside |= sampler_difference(old, sampler, mask, normalizer)
        if cap:
            ratios, of_ratios = importance_weights(
                config.importance, old, sampler, mask, normalizer
            )
            of_tokens, beside = ratios * of_tokens, beside | of_ratios
    mean = lambda x: aggregate(aggregation, x, surrogate.mask, normalizer)
    loss = mean(of_tokens)
    share = lambda x: aggregate(
        "sequence-mean-token-mean" if own.of_sequences else "token-mean",
        x,
        surrogate.mask,
        normalizer,
    )
    metrics = {"policy_loss": loss} | {name: share(x) for name, x in surrogate.metrics.items()}
    metrics |= beside
    if ref_per_token_logps is not None:
        ref = jax.lax.stop_gradient(jnp.where(mask, ref_per_token_logps, 0))
        kl = per_token_kl(config.resolved_kl_estimator, new, ref)
        metrics["kl"] = aggregate("token-mean", kl, mask, normalizer)
        if config.beta and config.kl_placement == "loss":
            if config.use_bias_correction_kl:
                kl = jnp.exp(new - old) * kl
            loss = loss + config.beta * aggregate(aggregation, kl, mask, normalizer)
    if config.entropy_coefficient and entropy is not None:
        bonus = aggregate("token-mean", entropy, mask, normalizer)
        loss = loss - config.entropy_coefficient * bonus
    return loss, metrics


# -- the losses -------------------------------------------------------------------------------

_CLIP = frozenset({"epsilon", "epsilon_high", "delta"})
_VALUE = frozenset({"value_clip", "value_coefficient"})
_GROUP = ("group_relative", "leave_one_out", "plain")
_GLOBAL = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")


class Loss(NamedTuple):
    """A row of the table.

    `surrogate(config, ℓ, ℓᵒ, A [B, 1] or [B, C], m)`; its usual `aggregation`; the kinds of
    `advantages` that it takes, its own first, and by what they are scaled; ε and ε_high (ε when
    None); which optional fields of `LossConfig` it reads; whether it weighs whole sequences, so
    that no other aggregation makes sense; and whether it learns a value head.
    """

    surrogate: Callable[..., Surrogate]
    aggregation: Aggregation
    advantages: tuple[str, ...] = _GROUP
    scale: Scale = "group"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    options: frozenset[str] = _CLIP
    of_sequences: bool = False
    critic: bool = False


LOSSES: dict[str, Loss] = {
    "grpo": Loss(token_ratio, "sequence-mean-token-mean"),
    "dr_grpo": Loss(token_ratio, "sequence-mean-token-sum-norm", scale="none"),
    "dapo": Loss(token_ratio, "token-mean", epsilon_high=0.28),
    "bnpo": Loss(token_ratio, "token-mean"),
    "gspo": Loss(
        mean_ratio, "sequence-mean-token-mean", epsilon=3e-4, epsilon_high=4e-4, of_sequences=True
    ),
    "cispo": Loss(
        capped_weight, "token-mean", epsilon_high=5.0, options=frozenset({"epsilon_high"})
    ),
    "rloo": Loss(
        product_ratio,
        "sequence-mean-token-sum",
        ("leave_one_out", "group_relative", "plain"),
        of_sequences=True,
    ),
    "reinforce": Loss(
        log_prob,
        "sequence-mean-token-sum",
        ("plain", "leave_one_out", "group_relative", *_GLOBAL),
        options=frozenset(),
    ),
    "reinforce_plus_plus": Loss(token_ratio, "token-mean", _GLOBAL),
    "ppo": Loss(token_ratio, "token-mean", ("gae",), options=_CLIP | _VALUE, critic=True),
}
"""Every loss by its `loss_type`; another loss is another row."""
