"""What a ledger is of: functions h of a site's logits, and how a change of the logits moves them.

    log_prob    log π(y) of the site's token              entropy  H = −Σ_v π_v log π_v
    confidence  π_(1), the largest probability            margin   π_(1) − π_(2)
    kl          Σ_v π_v log(π_v / π⁰_v), from the first checkpoint's π⁰

All but confidence and margin are smooth; those two have kinks where the largest tokens change
places, and are equal to their integrals all the same, but quadrature finds these more slowly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdyn.rl import token_statistics
from jaxdyn.types import Model, Params

QUANTITIES = ("log_prob", "entropy", "confidence", "margin", "kl")
SMOOTH = ("log_prob", "entropy", "kl")


class Observed(NamedTuple):
    """h [Q, N] in the order of `QUANTITIES`, and log π of A further tokens a site [N, A]."""

    quantities: Float[Array, "Q N"]
    tokens: Float[Array, "N A"]


class At(NamedTuple):
    """What is observed at N sites: their tokens, A further ones, and the first log π⁰."""

    targets: Int[Array, " N"]
    token_ids: Int[Array, "N A"]
    start: Float[Array, "N V"]


def observe(at: At, logits: Float[Array, "N V"]) -> Observed:
    """h of every site's logits, and log π of the further tokens; in nats, in float32 or better."""
    log_probs = jax.nn.log_softmax(logits)
    statistics = token_statistics(logits, at.targets)
    kl = jnp.sum(jnp.exp(log_probs) * (log_probs - at.start), axis=-1)
    quantities = [statistics.logps, statistics.entropy, statistics.max_prob, statistics.margin, kl]
    return Observed(jnp.stack(quantities), jnp.take_along_axis(log_probs, at.token_ids, axis=1))


def observed_parts(
    model: Model, at: At, head: Params, d_head: Params, phi: jax.Array, d_phi: jax.Array
) -> dict[str, Observed]:
    """ḣ by component, where the classifier moves along `d_head` and the features along `d_phi`.

    representation = ⟨∂h/∂f, Ẇ φ⟩, gradient = ⟨∂h/∂f, W φ̇⟩.
    """
    logits, through_body = jax.jvp(lambda x: model.logits(head, x), (phi,), (d_phi,))
    _, through_head = jax.jvp(lambda w: model.logits(w, phi), (head,), (d_head,))
    _, along = jax.linearize(lambda f: observe(at, f), logits)
    return {"representation": along(through_head), "gradient": along(through_body)}


def logit_cotangents(
    at: At, logits: Float[Array, "N V"], quantities: tuple[str, ...]
) -> Float[Array, "Q N V"]:
    """∂h/∂f of the named quantities at every site, with π = softmax f and e_v the unit vectors:

    log_prob    e_y − π                        entropy  −π (log π + H)
    confidence  π_(1) (e_(1) − π)              kl       π (log (π / π⁰) − KL)
    margin      the confidence's, less π_(2) (e_(2) − π)
    """
    log_probs = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_probs)
    unit = lambda ids: jax.nn.one_hot(ids, logits.shape[-1], dtype=logits.dtype)
    centred = lambda x: probs * (x - jnp.sum(probs * x, axis=-1, keepdims=True))

    def ranked(place: int) -> jax.Array:
        ids = jax.lax.top_k(logits, 2)[1][:, place]
        return jnp.take_along_axis(probs, ids[:, None], axis=1) * (unit(ids) - probs)

    formulas = {
        "log_prob": lambda: unit(at.targets) - probs,
        "entropy": lambda: -centred(log_probs),
        "confidence": lambda: ranked(0),
        "margin": lambda: ranked(0) - ranked(1),
        "kl": lambda: centred(log_probs - at.start),
    }
    return jnp.stack([formulas[name]() for name in quantities])


def feature_cotangents(
    model: Model, head: Params, phi: Float[Array, "N D"], of_logits: Float[Array, "Q N V"]
) -> Float[Array, "Q N D"]:
    """∂h/∂φ = Wᵀ ∂h/∂f at every site."""
    _, pull = jax.vjp(lambda x: model.logits(head, x), phi)
    return jax.vmap(pull)(of_logits)[0]
