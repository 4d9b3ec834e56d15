"""The policy that is trained against the one that sampled: how far apart, and weights for it.

With the same parameters the sampler's log-probs ℓˢ are not the trainer's ℓᵒ: it has a cache,
another order of sums, perhaps another precision. Truncated importance sampling weighs the loss by

    token       w_bt = min(exp(ℓᵒ_bt − ℓˢ_bt), C)
    sequence    w_b  = min(exp(Σ_t (ℓᵒ_bt − ℓˢ_bt)), C)

a constant under differentiation (Ionides 2008, "Truncated importance sampling"; Yao et al. 2025 for
samplers that differ from their trainers). It weighs the surrogate, not a KL or an entropy.

A sampler with top-k, top-p or min-p draws from π renormalised to the tokens K that it kept. The
ratio on that support is of both policies renormalised to the same K, ℓ − log Σ_{v∈K} π(v).
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdyn.grammar import above, one_of
from jaxdyn.rl.aggregation import Normalizer, aggregate
from jaxdyn.types import JaxdynError

Level = Literal["token", "sequence"]


@dataclasses.dataclass(frozen=True)
class ImportanceConfig:
    """Truncated importance sampling for a sampler that is not quite the policy.

    Attributes:
      cap: C, which no weight exceeds (2 is usual); no weights when not given.
      level: a weight a token, or one a sequence.
      support: take the ratio on the support that top-k, top-p or min-p left. Costs a pass before
        the update, and a bit a token of the vocabulary and slot.
    """

    cap: float | None = None
    level: Level = "token"
    support: bool = False

    def __post_init__(self):
        one_of(get_args(Level), self, "loss.importance", "level")
        above(0, self, "loss.importance", "cap")
        for name in ("level", "support"):
            value = getattr(self, name)
            if self.cap is None and value != getattr(ImportanceConfig, name):
                raise JaxdynError(
                    f"loss.importance.{name} needs loss.importance.cap, which is None; got {value}"
                )


def importance_weights(
    config: ImportanceConfig,
    old: Float[Array, "B C"],
    sampler: Float[Array, "B C"],
    mask: Bool[Array, "B C"],
    normalizer: Normalizer,
) -> tuple[Float[Array, "B #C"], dict[str, Float[Array, ""]]]:
    """w, a column for sequences, and its metrics: the uncapped ratio's mean, the share capped."""
    assert config.cap is not None
    apart = jax.lax.stop_gradient(jnp.where(mask, old - sampler, 0))
    if config.level == "sequence":
        apart = apart.sum(axis=1, keepdims=True)
    ratio = jnp.exp(apart)
    of_tokens = lambda x: aggregate("token-mean", jnp.broadcast_to(x, mask.shape), mask, normalizer)
    metrics = {
        "sampling/importance_ratio/mean": of_tokens(ratio),
        "sampling/importance_ratio/capped": of_tokens((ratio > config.cap).astype(ratio.dtype)),
    }
    return jnp.minimum(ratio, config.cap), metrics


def sampler_difference(
    old: Float[Array, "B C"],
    sampler: Float[Array, "B C"],
    mask: Bool[Array, "B C"],
    normalizer: Normalizer,
) -> dict[str, Float[Array, ""]]:
    """|ℓᵒ − ℓˢ| of the completions' tokens, in nats: its mean, and its largest."""
    apart = jax.lax.stop_gradient(jnp.where(mask, jnp.abs(old - sampler), 0))
    return {
        "sampling/logp_difference/mean": aggregate("token-mean", apart, mask, normalizer),
        "sampling/logp_difference/max": apart.max(),
    }
