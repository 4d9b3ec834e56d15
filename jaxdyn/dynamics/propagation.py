r"""What an applied update does to other sites, to first order, split into the NTK's components.

An update Δθ = (Δψ, ΔW) moves the logits f = Wφ of a site s by

    Δf(s) =  ΔW φ(s)  +  W (∂φ(s)/∂ψ) Δψ  +  O(‖Δθ‖²)
             └ representation ┘  └ gradient component ┘

and log π by Δ log π = Δf − 1 πᵀΔf. No kernel matrix is formed: the first term needs the features,
the second one forward-mode product. With Δθ = η Σ_u ∇θ objective_u these are Σ_u Θ(s, s_u) g_u of
the two components of the empirical NTK (Tomihari 2026, arXiv 2601.04670, the NTK decomposition;
our derivation allows any optimizer, since only the applied Δθ enters).

Tied embeddings. The shared matrix E is both classifier (head path) and input embedding. Its change
is ΔE = ΔE_head + ΔE_emb, by the path the gradient came through. Then

    representation = D_head ΔE_head,   gradient = D_body(Δψ with ΔE_emb),
    cross          = D_head ΔE_emb + D_emb ΔE_head,

and the three sum to the whole.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdyn.kernels.operator import pushforward
from jaxdyn.kernels.operator import site_features as site_features
from jaxdyn.types import Components, Params, Sites


def to_log_probs(
    logits: Float[Array, "N V"], delta_logits: Float[Array, "N V"]
) -> Float[Array, "N V"]:
    """Δ log π = Δf − 1 πᵀΔf, the log-softmax's derivative applied to Δf."""
    mean = jnp.sum(jax.nn.softmax(logits) * delta_logits, axis=-1, keepdims=True)
    return delta_logits - mean


def delta_logits(
    model: Any, view: Params, delta: Params, sites: Sites, head_share: jax.Array | None = None
) -> tuple[Float[Array, "N D"], Components]:
    """Features at the sites and the first-order Δf [N, V] there, by component.

    Args:
      model: a `LanguageModel`.
      view: its parameters before the update, `model.view(params)`.
      delta: the update, shaped as `view`.
      sites: N probe sites.
      head_share: for a tied model, ΔE_head [V, D]: the part of the shared matrix's change that
        came through the head path. Ignored, and cross zero, for an untied model.

    Returns:
      φ [N, D] and `Components` of arrays [N, V] in the logits' dtype.
    """
    if model.config.tied:
        if head_share is None:
            raise ValueError("a tied model needs head_share, the head path's part of the update")
        classifier, backbone = delta["classifier"], delta["backbone"]
        rest = backbone["embed"]["embedding"] - head_share
        delta = {
            "classifier": {**classifier, "weight": head_share},
            "backbone": {**backbone, "embed": {"embedding": rest}},
        }
    return pushforward(model, view, delta, sites)


def propagate(
    model: Any, view: Params, delta: Params, sites: Sites, head_share: jax.Array | None = None
) -> Components:
    """First-order Δ log π [N, V] of an applied update at the sites, by component.

    See `delta_logits` for the arguments. `.total` is the whole prediction.
    """
    phi, parts = delta_logits(model, view, delta, sites, head_share)
    logits = model.logits(view["classifier"], phi)
    return jax.tree.map(lambda d: to_log_probs(logits, d), parts)
