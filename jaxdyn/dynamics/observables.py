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


def chosen(
    model: Model, at: At, head: Params, phi: Float[Array, "N D"], quantities: tuple[str, ...]
) -> Float[Array, "Q N"]:
    """h of the named quantities alone, from features."""
    found = observe(at, model.logits(head, phi)).quantities
    return jnp.stack([found[QUANTITIES.index(name)] for name in quantities])


def feature_cotangents(
    model: Model, at: At, head: Params, phi: Float[Array, "N D"], quantities: tuple[str, ...]
) -> Float[Array, "Q N D"]:
    """∂h/∂φ = Wᵀ ∂h/∂f of the named quantities at every site."""
    found, pull = jax.vjp(lambda x: chosen(model, at, head, x, quantities), phi)
    one = lambda q: pull(jnp.zeros_like(found).at[q].set(1))[0]
    return jax.vmap(one)(jnp.arange(len(quantities)))
