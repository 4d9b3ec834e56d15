"""Per-token statistics of the policy: log-probability, entropy and confidence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


@struct.dataclass
class TokenStatistics:
    """What the policy says at every slot. Logarithms are natural, so `entropy` is in nats.

    `margin` is the difference of the two largest probabilities, 0 where they tie.
    """

    logps: Float[Array, "*B"]
    entropy: Float[Array, "*B"]
    max_prob: Float[Array, "*B"]
    margin: Float[Array, "*B"]


def token_statistics(
    logits: Float[Array, "*B V"], ids: Int[Array, "*B"], temperature: ArrayLike = 1.0
) -> TokenStatistics:
    """Log-probability of `ids`, entropy and confidence of π = softmax(f / temperature).

        logps = log π[ids]      entropy = -Σ_v π_v log π_v
        max_prob = π_(1)        margin = π_(1) - π_(2)        (the two largest)

    Computed in float32 or better. Temperature 0, the greedy sampler's, is read as 1, as the
    sampler reads it when it records log-probabilities.
    """
    z = scaled(logits, temperature)
    whole = summarise(z, jnp.arange(z.shape[-1]).reshape((1,) * ids.ndim + (-1,)))
    chosen = jnp.take_along_axis(z, ids[..., None], axis=-1)[..., 0]
    logps = chosen - whole.peak - whole.log_total
    return statistics_of(logps, whole.entropy, whole.top - whole.log_total[..., None])


def scaled(logits: Float[Array, "*B V"], temperature: ArrayLike) -> Float[Array, "*B V"]:
    """f / temperature in float32 or better; f where the temperature is 0."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    temperature = jnp.asarray(temperature, wide)
    return logits.astype(wide) / jnp.where(temperature > 0, temperature, 1)


class Summary(NamedTuple):
    """What normalises scaled logits z over some columns.

    peak: max z, a constant under differentiation.  log_total: log Σ exp(z - peak).
    entropy: of softmax z.  top, at: the two largest z - peak, and their columns.
    """

    peak: Float[Array, "*B"]
    log_total: Float[Array, "*B"]
    entropy: Float[Array, "*B"]
    top: Float[Array, "*B 2"]
    at: Int[Array, "*B 2"]


def summarise(z: Float[Array, "*B V"], columns: Int[Array, "*#B V"]) -> Summary:
    """The `Summary` of z over its last axis."""
    peak = jax.lax.stop_gradient(jnp.max(z, axis=-1))
    shifted = z - peak[..., None]
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    entropy = jnp.log(total) - jnp.sum(weights * shifted, axis=-1) / total
    return Summary(peak, jnp.log(total), entropy, *top_two(shifted, columns))


def statistics_of(
    logps: Float[Array, "*B"], entropy: Float[Array, "*B"], top: Float[Array, "*B 2"]
) -> TokenStatistics:
    """The statistics, of which the confidence comes from the two largest log-probabilities."""
    largest = jnp.exp(top)
    return TokenStatistics(logps, entropy, largest[..., 0], largest[..., 0] - largest[..., 1])


def top_two(
    x: Float[Array, "*B V"], columns: Int[Array, "*#B V"]
) -> tuple[Float[Array, "*B 2"], Int[Array, "*B 2"]]:
    """The two largest x with their `columns`; of equals, the lower column comes first.

    Plain reductions: they fuse and shard where a sort or an arg-max does not.
    """
    none = jnp.iinfo(columns.dtype).max
    first = jnp.max(x, axis=-1, keepdims=True)
    at = jnp.min(jnp.where(x == first, columns, none), axis=-1, keepdims=True)
    rest = jnp.where(columns == at, -jnp.inf, x)
    second = jnp.max(rest, axis=-1, keepdims=True)
    then = jnp.min(jnp.where(rest == second, columns, none), axis=-1, keepdims=True)
    return jnp.concatenate([first, second], -1), jnp.concatenate([at, then], -1)
