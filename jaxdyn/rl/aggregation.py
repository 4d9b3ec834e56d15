"""From one number a token to one number a batch, so that micro-batches add up.

An aggregate is Σ_b reduce_t x_bt / n, where n counts the sequences or the tokens of the *whole*
batch. With the whole batch's `Normalizer` the parts' aggregates, and so their losses, metrics and
gradients, add up to the batch's: gradient accumulation changes nothing.

Deviation from TRL: its `bnpo` divides by the tokens of each micro-batch, which makes the loss
depend on how the batch is split; here it divides by the whole batch's, as its `dapo` does.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxdyn.types import JaxdynError

Aggregation = Literal[
    "sequence-mean-token-mean",
    "sequence-mean-token-sum",
    "sequence-mean-token-sum-norm",
    "token-mean",
]
AggregationAlias = Literal[
    "seq-mean-token-mean",  # verl
    "seq-mean-token-sum",  # verl
    "seq-mean-token-sum-norm",  # verl
    "sequence-mean-token-scale",  # Tunix
    "grpo",  # TRL's loss types
    "bnpo",
    "dapo",
    "dr_grpo",
]

_ALIASES: dict[str, Aggregation] = {
    "seq-mean-token-mean": "sequence-mean-token-mean",
    "seq-mean-token-sum": "sequence-mean-token-sum",
    "seq-mean-token-sum-norm": "sequence-mean-token-sum-norm",
    "sequence-mean-token-scale": "sequence-mean-token-sum-norm",
    "grpo": "sequence-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "sequence-mean-token-sum-norm",
}


def canonical(aggregation: str) -> Aggregation:
    """The aggregation that a name or alias means; `JaxdynError` for a name that means none."""
    if aggregation in _ALIASES:
        return _ALIASES[aggregation]
    for known in get_args(Aggregation):
        if aggregation == known:
            return known
    choices = [*get_args(Aggregation), *_ALIASES]
    raise JaxdynError(f"aggregation must be one of {choices}, got {aggregation!r}")


@struct.dataclass
class Normalizer:
    """What the whole batch's sums are divided by.

    Its sequences, its completion tokens, and the length that a completion may have.
    """

    sequences: Float[Array, ""]
    tokens: Float[Array, ""]
    max_completion_length: Float[Array, ""]


def normalizer_of(
    completion_mask: Bool[Array, "B C"], max_completion_length: int | None = None
) -> Normalizer:
    """The counts of a batch; of an accumulated batch, those of all its micro-batches together.

    The longest completion is the sampler's limit, or C when not given. Sequences that lost all
    their tokens (`drop_truncated`) still count as sequences.
    """
    sequences, slots = completion_mask.shape
    limit = slots if max_completion_length is None else max_completion_length
    tokens = jnp.maximum(completion_mask.sum(), 1)
    return Normalizer(jnp.float32(sequences), tokens.astype(jnp.float32), jnp.float32(limit))


def aggregate(
    aggregation: str,
    x: Float[Array, "B C"],
    mask: Bool[Array, "B C"],
    normalizer: Normalizer,
) -> Float[Array, ""]:
    """Σ_b reduce_t x_bt / n: these rows' share of the whole batch's aggregate.

    sequence-mean-token-mean       Σ_b (Σ_t m x / Σ_t m) / sequences
    sequence-mean-token-sum        Σ_b  Σ_t m x          / sequences
    sequence-mean-token-sum-norm   Σ_b  Σ_t m x          / (sequences · max_completion_length)
    token-mean                     Σ_b  Σ_t m x          / tokens

    Source of the third: Liu et al. 2025 (Dr. GRPO). Raises `JaxdynError` for an unknown name.
    """
    kind = canonical(aggregation)
    per_sequence = jnp.sum(jnp.where(mask, x, 0), axis=1)
    whole = normalizer.sequences
    if kind == "sequence-mean-token-mean":
        per_sequence = per_sequence / jnp.maximum(mask.sum(axis=1), 1)
    elif kind == "sequence-mean-token-sum-norm":
        whole = whole * normalizer.max_completion_length
    elif kind == "token-mean":
        whole = normalizer.tokens
    return per_sequence.sum() / whole


def drop_truncated(
    completion_mask: Bool[Array, "B C"], finished: Bool[Array, " B"]
) -> Bool[Array, "B C"]:
    """The mask without the completions that were cut off before a stop token.

    Source: Yu et al. 2025 (DAPO), overlong filtering.
    """
    return completion_mask & finished[:, None]
