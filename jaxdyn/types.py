"""The arrays that pass between rooms: frozen pytrees with documented shapes.

One alphabet throughout the package:

    P  prompts               G  generations per prompt      B  sequences (B = P * G in a rollout)
    S  prompt slots          C  completion slots            T  token slots of a sequence (T = S + C)
    D  feature width         V  vocabulary                  L  layers             N  sites

Sequences are padded on either side; a boolean mask says which slots hold a token. Rollouts are
padded on the left up to S and on the right after the completion, so that a completion always
starts at slot S.
"""

from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.errors import JaxdynError as JaxdynError

Params = dict[str, Any]
"""A parameter tree `{"backbone": ..., "classifier": ...}`."""


@struct.dataclass
class PromptBatch:
    """P tokenised prompts, padded on the left to S slots."""

    prompt_ids: Int[Array, "P S"]
    prompt_mask: Bool[Array, "P S"]


@struct.dataclass
class Rollout:
    """B sampled completions. Row p * G + g is generation g of prompt p.

    `completion_mask` covers the sampled tokens up to and including the stop token.
    `per_token_logps` is log softmax(f / temperature) at the sampled token, before any top-k or
    top-p filter: the quantity a teacher-forced pass computes. `features`, if they were harvested,
    are the φ that predicted each token, and 0 in the slots after a completion's end.
    """

    prompt_ids: Int[Array, "B S"]
    prompt_mask: Bool[Array, "B S"]
    completion_ids: Int[Array, "B C"]
    completion_mask: Bool[Array, "B C"]
    per_token_logps: Float[Array, "B C"]
    features: Float[Array, "B C D"] | None = None

    @property
    def tokens(self) -> jax.Array:
        """Prompt and completion side by side, [B, S + C]."""
        return jax.numpy.concatenate([self.prompt_ids, self.completion_ids], axis=1)

    @property
    def mask(self) -> jax.Array:
        """Which slots of `tokens` hold a token, [B, S + C]."""
        return jax.numpy.concatenate([self.prompt_mask, self.completion_mask], axis=1)


@struct.dataclass
class Sites:
    """N places where one token is predicted, inside B sequences.

    Site n sits at slot `positions[n]` of sequence `rows[n]`: its feature is the backbone's output
    there, and `targets[n]` is the token that follows. `is_prompt[n]` marks a prompt's last token,
    where the completion begins; the other sites lie inside completions.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    rows: Int[Array, " N"]
    positions: Int[Array, " N"]
    targets: Int[Array, " N"]
    is_prompt: Bool[Array, " N"]


@struct.dataclass
class KVCache:
    """Keys and values of every layer, `[L, B, kv_heads, K, head_dim]`, for K cache slots.

    Heads come before slots, so that a decoding step reads each head's keys in one stretch.
    """

    keys: Float[Array, "L B heads K width"]
    values: Float[Array, "L B heads K width"]


@struct.dataclass
class Components:
    """A quantity split by the path through which the parameters move it.

    representation: through the classifier W.  gradient: through the backbone.  cross: for tied
    embeddings, the product of the two paths (zero when untied).  They add up to `total` exactly.
    """

    representation: jax.Array
    gradient: jax.Array
    cross: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.representation + self.gradient + self.cross
