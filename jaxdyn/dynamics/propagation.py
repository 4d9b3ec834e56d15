r"""What an applied update does to other sites, to first order, split into the NTK's components.

An update Δθ = (Δψ, ΔW) moves the logits f = Wφ of a site s by

    Δf(s) =  ΔW φ(s)  +  W (∂φ(s)/∂ψ) Δψ  +  O(‖Δθ‖²)
             └ representation ┘  └ gradient component ┘

and log π by Δ log π = Δf − 1 πᵀΔf. No kernel matrix is formed: the first term needs the features,
the second one forward-mode product. With Δθ = η Σ_u ∇θ objective_u these are Σ_u Θ(s, s_u) g_u of
the two components of the empirical NTK (Tomihari 2026, arXiv 2601.04670, the NTK decomposition;
our derivation allows any optimizer, since only the applied Δθ enters).

Tied embeddings. The shared matrix E is both classifier (head path) and input embedding. Where its
change ΔE = ΔE_head + ΔE_emb is known by the path that the gradient came through (`head_share`),

    representation = D_head ΔE_head,   gradient = D_body(Δψ with ΔE_emb),
    cross          = D_head ΔE_emb + D_emb ΔE_head.

Of any other change it is split by the matrix's role alone: representation = D_head ΔE, gradient =
D_body(Δψ with ΔE), cross = 0. Either way the three sum to the whole.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdyn.kernels.operator import pushforward
from jaxdyn.kernels.operator import site_features as site_features
from jaxdyn.types import Components, Model, Params, Sites, View


def to_log_probs(
    logits: Float[Array, "N V"], delta_logits: Float[Array, "N V"]
) -> Float[Array, "N V"]:
    """Δ log π = Δf − 1 πᵀΔf, the log-softmax's derivative applied to Δf."""
    mean = jnp.sum(jax.nn.softmax(logits) * delta_logits, axis=-1, keepdims=True)
    return delta_logits - mean


def delta_logits(
    model: Model, params: Params, delta: Params, sites: Sites, head_share: jax.Array | None = None
) -> tuple[Float[Array, "N D"], Components]:
    """Features at the sites and the first-order Δf [N, V] there, by component.

    Args:
      model: a `LanguageModel`.
      params: its parameters before the update, as stored.
      delta: the update, shaped as `params`.
      sites: N probe sites.
      head_share: for a tied model, ΔE_head [V, D]: the part of the shared matrix's change that
        came through the head path; without it the split is by role. Ignored for an untied model.

    Returns:
      φ [N, D] and `Components` of arrays [N, V] in the logits' dtype.
    """
    view = model.view(params)
    if not model.config.tied or head_share is None:
        return pushforward(model, view, model.view(delta), sites, by_path=False)
    return pushforward(model, view, by_path(model, delta, head_share), sites)


def by_path(model: Model, delta: Params, head_share: jax.Array | None) -> View:
    """A change as the gradient came: of a tied matrix the head path's part, and the rest."""
    change = model.view(delta)
    if not model.config.tied:
        return change
    whole = change["backbone"]["embed"]["embedding"]
    return View(
        {
            "classifier": {**change["classifier"], "weight": head_share},
            "backbone": {**change["backbone"], "embed": {"embedding": whole - head_share}},
        }
    )


def propagate(
    model: Model, params: Params, delta: Params, sites: Sites, head_share: jax.Array | None = None
) -> Components:
    """First-order Δ log π [N, V] of an applied update at the sites, by component.

    See `delta_logits` for the arguments. `.total` is the whole prediction.
    """
    phi, parts = delta_logits(model, params, delta, sites, head_share)
    logits = model.logits(model.view(params)["classifier"], phi)
    return jax.tree.map(lambda d: to_log_probs(logits, d), parts)
