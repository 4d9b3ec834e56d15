"""Per-token statistics of the policy: log-probability, entropy and confidence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxdyn.types import Params


@struct.dataclass
class TokenStatistics:
    """What the policy says at every slot. Logarithms are natural, so `entropy` is in nats."""

    logps: Float[Array, "*B"]
    entropy: Float[Array, "*B"]
    max_prob: Float[Array, "*B"]


def token_statistics(
    logits: Float[Array, "*B V"], ids: Int[Array, "*B"], temperature: ArrayLike = 1.0
) -> TokenStatistics:
    """Log-probability of `ids`, entropy and largest probability of π = softmax(f / temperature).

        logps = log π[ids]      entropy = -Σ_v π_v log π_v      max_prob = max_v π_v

    Computed in float32 or better. Temperature 0, the greedy sampler's, is read as 1, as the
    sampler reads it when it records log-probabilities.
    """
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    temperature = jnp.asarray(temperature, wide)
    scaled = logits.astype(wide) / jnp.where(temperature > 0, temperature, 1)
    log_probs = jax.nn.log_softmax(scaled, axis=-1)
    logps = jnp.take_along_axis(log_probs, ids[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return TokenStatistics(logps, entropy, jnp.exp(jnp.max(log_probs, axis=-1)))


def feature_statistics(
    logits_fn: Callable[[Params, jax.Array], jax.Array],
    classifier: Params,
    features: Float[Array, "*B D"],
    ids: Int[Array, "*B"],
    temperature: ArrayLike = 1.0,
) -> TokenStatistics:
    """`token_statistics` of f = `logits_fn(classifier, features)`.

    Work on the vocabulary's size is behind this signature, so what bounds its memory goes here.
    """
    return token_statistics(logits_fn(classifier, features), ids, temperature)
