"""Clip-Cov and KL-Cov: the few tokens that take most of the entropy are held back.

To first order a step changes the entropy by minus the covariance of log π and the advantage. Of all
tokens t of a batch

    cov_t = (ℓᵒ_t − mean ℓᵒ) (A_t − mean A)

and of N tokens k = max(⌊share · N⌋, 1) are held back: by `clip` at random among those with cov
within `bounds`, which then have no gradient; by `kl` those with the largest, which get β times an
estimate of KL(π_old ‖ π) added, in the place of the ratio's clip.

Source: Cui et al. 2025, "The entropy mechanism of reinforcement learning for reasoning language
models" (arXiv 2505.22617), section 4.

Deviations: means and selection are the whole batch's, made once from the log-probs before its
first update, so that no division into micro-batches or devices changes them, and inner epochs hold
the same tokens back. The KL is estimated by ρ − log ρ − 1, whose slope at ρ = 1 is 0, where their
code has |log ρ|, whose slope there is the sign of what rounding left. Before the policy has moved
there is no KL with either, so that `kl` takes two inner epochs.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxdyn.grammar import above as above_bound
from jaxdyn.grammar import between, finite, one_of
from jaxdyn.types import JaxdynError

Control = Literal["clip", "kl"]
_READS = {None: (), "clip": ("share", "bounds"), "kl": ("share", "beta")}


@dataclasses.dataclass(frozen=True)
class CovarianceConfig:
    """Control of the entropy by the covariance of log-probs and advantages.

    Attributes:
      control: clip (Clip-Cov) or kl (KL-Cov); neither when not given.
      share: of the batch's tokens, that are held back.
      bounds: between which clip picks them.
      beta: weight β of kl's penalty.
    """

    control: Control | None = None
    share: float = 2e-4
    bounds: tuple[float, float] = (1.0, 5.0)
    beta: float = 1.0

    def __post_init__(self):
        section = "loss.covariance"
        one_of((*get_args(Control), None), self, section, "control")
        between(0, 1, self, section, "share", ends="(]")
        above_bound(0, self, section, "beta")
        finite(self, section, "bounds")
        if len(self.bounds) != 2 or not self.bounds[0] < self.bounds[1]:
            raise JaxdynError(f"{section}.bounds must be 2 that ascend, got {self.bounds}")
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in _READS[self.control]:
                raise JaxdynError(
                    f"{section}.{field.name} is of no use to control {self.control}, got {value}"
                )


def covariances(
    logps: Float[Array, "B C"],
    advantages: Float[Array, " B"] | Float[Array, "B C"],
    mask: Bool[Array, "B C"],
) -> Float[Array, "B C"]:
    """(ℓ − mean ℓ)(A − mean A), the means over all tokens; 0 at masked slots."""
    of_tokens = advantages[:, None] if advantages.ndim == 1 else advantages
    count = jnp.maximum(mask.sum(), 1)

    def centred(x):
        x = jnp.broadcast_to(x, mask.shape)
        return jnp.where(mask, x - jnp.where(mask, x, 0).sum() / count, 0)

    return centred(logps) * centred(of_tokens)


def held_back(
    config: CovarianceConfig,
    logps: Float[Array, "B C"],
    advantages: Float[Array, " B"] | Float[Array, "B C"],
    mask: Bool[Array, "B C"],
    key: PRNGKeyArray,
) -> Bool[Array, "B C"]:
    """Which tokens of the whole batch are held back; `key` is what `clip` draws from."""
    count = max(int(config.share * int(mask.sum())), 1)
    return _select(config, logps, advantages, mask, key, np.int32(count))


@jax.jit(static_argnums=0)
def _select(config, logps, advantages, mask, key, count):
    cov = covariances(logps, advantages, mask)
    if config.control == "kl":
        eligible, order = mask, -cov
    else:
        low, high = config.bounds
        eligible, order = mask & (cov > low) & (cov < high), jax.random.uniform(key, cov.shape)
    order = jnp.where(eligible, order, jnp.inf).ravel()
    rank = jnp.argsort(jnp.argsort(order, stable=True))
    return eligible & (rank < count).reshape(mask.shape)
