"""The derivative of a policy loss with respect to the logits, as two numbers a token.

Every loss sees the logits f of a slot through ℓ = log π(y) of the sampled token y and the entropy
H alone, both of π = softmax(f / temperature). So with a = ∂loss/∂ℓ and b = ∂loss/∂H

    ∂loss/∂f = (a (e_y − π) − b π ⊙ (log π + H)) / temperature ,

with the KL, the clipping, the masks and the average in a and b. A value loss is not among it: it
sees no logits.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.rl.aggregation import Normalizer
from jaxdyn.rl.logprobs import scaled
from jaxdyn.rl.losses import LossConfig, policy_loss


@struct.dataclass
class LogitCotangents:
    """a = ∂loss/∂ℓ and b = ∂loss/∂H at every slot of completions; 0 where the loss looks away."""

    of_logp: Float[Array, "*B"]
    of_entropy: Float[Array, "*B"]

    def whole(
        self, logits: Float[Array, "*B V"], ids: Int[Array, "*B"], temperature: ArrayLike = 1.0
    ) -> Float[Array, "*B V"]:
        """∂loss/∂f [..., V], from the logits f and the sampled tokens; see above.

        Temperature 0, the greedy sampler's, is read as 1, as `token_statistics` reads it.
        """
        log_probs = jax.nn.log_softmax(scaled(logits, temperature))
        probs = jnp.exp(log_probs)
        entropy = -jnp.sum(probs * log_probs, axis=-1, keepdims=True)
        a, b = self.of_logp[..., None], self.of_entropy[..., None]
        score = jax.nn.one_hot(ids, logits.shape[-1], dtype=probs.dtype) - probs
        return scaled(a * score - b * probs * (log_probs + entropy), temperature)


def logit_cotangents(
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
) -> LogitCotangents:
    """a and b of `policy_loss` with the same arguments, all its losses, weights and controls.

    Raises:
      JaxdynError: as `policy_loss`.
    """

    def loss(logps, entropy):
        batch = old_per_token_logps, ref_per_token_logps, advantages, completion_mask
        beside = entropy, sampler_per_token_logps, held_back
        return policy_loss(config, logps, *batch, normalizer, *beside)[0]

    if entropy is None:
        of_logp = jax.grad(loss)(per_token_logps, None)
        return LogitCotangents(of_logp, jnp.zeros_like(of_logp))
    return LogitCotangents(*jax.grad(loss, argnums=(0, 1))(per_token_logps, entropy))
