"""What a policy says of sampled completions: log-probs, entropy, confidence, values.

A policy is a model with parameters and, where they are known already, the features of the batch:
in a classifier stage decoding has computed them, and while only the classifier has moved they are
the reference's too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jaxdyn.models import state_values
from jaxdyn.rl import (
    Normalizer,
    TokenStatistics,
    feature_statistics,
    normalizer_of,
    support_log_mass,
)
from jaxdyn.train.sharing import Sequences, of_completions, slot_features, slot_ids
from jaxdyn.types import Model, Params, Rollout, Support


class ValueTargets(struct.PyTreeNode):
    """What the value head is held to: its estimates before the update, and the returns."""

    old: Float[Array, "B C"]
    returns: Float[Array, "B C"]


class UpdateBatch(Sequences):
    """What a policy-gradient update needs of B sampled completions.

    `completion_mask` marks the tokens that the loss counts.
    """

    advantages: Float[Array, " B"] | Float[Array, "B C"]
    old_per_token_logps: Float[Array, "B C"] | None = None
    ref_per_token_logps: Float[Array, "B C"] | None = None
    values: ValueTargets | None = None
    sampler_per_token_logps: Float[Array, "B C"] | None = None
    held_back: Bool[Array, "B C"] | None = None


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model's policy, with the features [B, C, D] of a batch if they are known."""

    model: Model
    params: Params
    features: jax.Array | None = None

    def logps(self, batch: Sequences | Rollout, temperature: ArrayLike) -> Float[Array, "B C"]:
        """Teacher-forced log π / temperature of the batch's completion tokens, in nats."""
        if self.features is None:
            return policy_logps(self.model, self.params, batch, temperature)
        ids = batch.completion_ids
        return classifier_logps(self.model, self.params, self.features, ids, temperature)


batch_values = jax.jit(state_values)
"""The value head's estimates from features, before an update."""


def completion_statistics(
    model: Model, classifier: Params, features: jax.Array, ids: jax.Array, temperature: ArrayLike
) -> TokenStatistics:
    """`feature_statistics` of the model's policy."""
    return feature_statistics(
        model.logits, classifier, features, ids, temperature, shards=model.shards
    )


@functools.partial(jax.jit, static_argnames="model")
@jax.named_scope("reference")
def classifier_logps(
    model: Model, params: Params, features: jax.Array, ids: jax.Array, temperature: ArrayLike
) -> Float[Array, "B C"]:
    """Per-token log-probs of `ids` from features."""
    classifier = model.view(params)["classifier"]
    return completion_statistics(model, classifier, features, ids, temperature).logps


@functools.partial(jax.jit, static_argnames="model")
@jax.named_scope("reference")
def policy_logps(
    model: Model, params: Params, batch: Sequences | Rollout, temperature: ArrayLike
) -> Float[Array, "B C"]:
    """Teacher-forced per-token log-probs of the batch's completions."""
    features = slot_features(model, params["backbone"], batch)
    logps = classifier_logps(model, params, features, slot_ids(batch), temperature)
    return of_completions(batch, logps)


@functools.partial(jax.jit, static_argnames="model")
@jax.named_scope("reference")
def support_correction(
    model: Model, params: Params, features: jax.Array, support: Support, temperature: ArrayLike
) -> Float[Array, "B C"]:
    """log q − log qˢ of the support's probability under the policy, q, and under the sampler, qˢ.

    What the sampler's log-probs take for the difference to the policy's to be that of both
    renormalised to the support: (ℓ − log q) − (ℓˢ − log qˢ).
    """
    classifier = model.view(params)["classifier"]
    mass = support_log_mass(
        model.logits, classifier, features, support.bits, temperature, shards=model.shards
    )
    return mass - support.log_mass


@functools.partial(jax.jit, static_argnames="model")
def policy_certainty(
    model: Model, params: Params, batch: Sequences | Rollout, temperature: ArrayLike
) -> dict[str, jax.Array]:
    """Means over a batch's completion tokens: entropy, confidence, sampled log-prob."""
    view = model.view(params)
    features = slot_features(model, view["backbone"], batch)
    ids, mask = slot_ids(batch), batch.completion_mask
    found = completion_statistics(model, view["classifier"], features, ids, temperature)
    statistics = jax.tree.map(functools.partial(of_completions, batch), found)
    return certainty(statistics, mask, normalizer_of(mask))


def certainty(
    statistics: TokenStatistics, mask: jax.Array, normalizer: Normalizer
) -> dict[str, jax.Array]:
    """Entropy (nats), largest probability and sampled log-prob, summed over tokens / all tokens."""
    token_mean = lambda x: jnp.sum(jnp.where(mask, x, 0)) / normalizer.tokens
    return {
        "entropy": token_mean(statistics.entropy),
        "confidence/max_prob": token_mean(statistics.max_prob),
        "confidence/sampled_logp": token_mean(statistics.logps),
        "confidence/margin": token_mean(statistics.margin),
    }
