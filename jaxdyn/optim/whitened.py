r"""The whitened classifier step: what features have in common no longer carries an update around.

With G = −∂loss/∂W [V, D], Σ the mean of φ φᵀ over the batch's tokens and λ a ridge,

    D = G (Σ + λ I)⁻¹,    ΔW = √(2δ/κ) D,    κ = E[φᵀ Dᵀ (diag π − π πᵀ) D φ].

Of a plain step G = Σ_u g_u φ_uᵀ the logits at a site move by Σ_u g_u ⟨φ_u, φ⟩; of this one by
Σ_u g_u φ_uᵀ (Σ + λ I)⁻¹ φ, up to its length. The length is such that the KL of the old policy to
the new, to second order in it, is δ nats a token: there is no learning rate, and φ → cφ, W → W/c
changes nothing. (Ours, to be held against classifier-first RL; the metric (Σ + λ I)⁻¹ is that of
K-FAC's activation factor, Martens and Grosse 2015, arXiv 1503.05671.)
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def second_moment(
    features: Float[Array, "*B D"], mask: Bool[Array, "*B"]
) -> tuple[Float[Array, "D D"], Float[Array, ""]]:
    """Σ φ φᵀ over the tokens, and their number, in float32 or better."""
    wide = jnp.promote_types(features.dtype, jnp.float32)
    rows = jnp.where(mask[..., None], features, 0).reshape(-1, features.shape[-1])
    total = jnp.einsum("nd,ne->de", rows, rows, preferred_element_type=wide, precision="highest")
    return total, jnp.sum(mask).astype(wide)


def whitened_direction(
    gradient: Float[Array, "V D"], moment: Float[Array, "D D"], ridge: ArrayLike
) -> Float[Array, "V D"]:
    """D = G (Σ + λ I)⁻¹ with λ = `ridge` tr Σ / D, for G = −`gradient`."""
    width = len(moment)
    # Also where no token counts: then G is 0, and so is D.
    shift = ridge * jnp.trace(moment) / width + jnp.finfo(moment.dtype).tiny
    factor = jax.scipy.linalg.cho_factor(moment + shift * jnp.eye(width, dtype=moment.dtype))
    return -jax.scipy.linalg.cho_solve(factor, gradient.astype(moment.dtype).T).T


def curvature(change: Float[Array, "*B V"], log_probs: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """zᵀ (diag π − π πᵀ) z of a change z of the logits: its variance under π."""
    probs = jnp.exp(log_probs)
    centred = change - jnp.sum(probs * change, axis=-1, keepdims=True)
    return jnp.sum(probs * centred**2, axis=-1)


def step_length(kappa: Float[Array, ""], kl: ArrayLike) -> Float[Array, ""]:
    """√(2δ/κ), and 0 where nothing moves."""
    return jnp.where(kappa > 0, jnp.sqrt(2 * kl / jnp.where(kappa > 0, kappa, 1)), 0)
