"""What a ledger is of: functions h of a site's logits, and how a change of the logits moves them.

    log_prob    log π(y) of the site's token              entropy  H = −Σ_v π_v log π_v
    confidence  π_(1), the largest probability            margin   π_(1) − π_(2)
    kl          Σ_v π_v log(π_v / π⁰_v), from the first checkpoint's π⁰

All but confidence and margin are smooth; those two have kinks where the largest tokens change
places, and are equal to their integrals all the same, but quadrature finds these more slowly.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdyn.rl import token_statistics
from jaxdyn.rl.logprobs import top_two
from jaxdyn.types import COMPONENTS, Model, Params

QUANTITIES = ("log_prob", "entropy", "confidence", "margin", "kl")
SMOOTH = ("log_prob", "entropy", "kl")


class Observed(NamedTuple):
    """h [Q, N] in the order of `QUANTITIES`, and log π of A further tokens a site [N, A]."""

    quantities: Float[Array, "Q N"]
    tokens: Float[Array, "N A"]


class At(NamedTuple):
    """What is observed at N sites: their tokens, A further ones, and the first logits f⁰.

    log π⁰ does as well: what is added to all of a site's logits is of no matter.
    """

    targets: Int[Array, " N"]
    token_ids: Int[Array, "N A"]
    start: Float[Array, "N V"]


def observe(at: At, logits: Float[Array, "N V"]) -> Observed:
    """h of every site's logits, and log π of the further tokens; in nats, in float32 or better."""
    log_probs = jax.nn.log_softmax(logits)
    statistics = token_statistics(logits, at.targets)
    gap = log_probs - jax.nn.log_softmax(at.start)
    kl = jnp.sum(jnp.exp(log_probs) * gap, axis=-1)
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
    moves = (through_head, through_body)
    found = in_blocks(model, rates, at, logits, moves)
    by_role = zip(COMPONENTS[:2], found, strict=True)
    return {name: Observed(h.T, more) for name, (h, more) in by_role}


BLOCK = 2**21
"""Bytes of a block's logits: with a few arrays beside it stays in a core's cache."""


def in_blocks(model: Model, function: Callable[..., Any], at: At, logits: jax.Array, *more: Any):
    """`function(at, logits, *more)`; of some sites after others on a CPU that has them all.

    It may look a dozen times through a site's logits: what a CPU would fetch from memory each time,
    an accelerator's compiler puts into few passes. What it is given and what it returns has the
    sites as its leading axis.
    """
    count, vocab = logits.shape
    # A power of two: it is likely to divide the number of sites.
    size = 2 ** math.floor(math.log2(max(1, BLOCK // (vocab * logits.dtype.itemsize))))
    blocks = -(-count // size)
    again = blocks * size - count

    def blocked(*given):
        # The last block ends with the last site, and so may have some of the one before again.
        starts = jnp.minimum(jnp.arange(blocks) * size, count - size)
        slices = lambda start: jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), given
        )
        found = jax.lax.map(lambda start: function(*slices(start)), starts)
        return jax.tree.map(whole, found)

    def whole(x: jax.Array) -> jax.Array:
        if not again:
            return x.reshape(count, *x.shape[2:])
        before = x[:-1].reshape((blocks - 1) * size, *x.shape[2:])
        return jnp.concatenate([before, x[-1, again:]])

    if model.row_shards > 1 or blocks == 1:
        return function(at, logits, *more)
    return jax.lax.platform_dependent(at, logits, *more, cpu=blocked, default=function)


def rates(
    at: At, logits: Float[Array, "N V"], moves: tuple[jax.Array, ...]
) -> list[tuple[Float[Array, "N Q"], Float[Array, "N A"]]]:
    """⟨∂h/∂f, ḟ⟩ of every site and move ḟ [N, V]; of `logit_cotangents`, none of which is formed.

    With E and Cov under π: ḟ_y − E ḟ, −Cov(log π, ḟ), Cov(f − f⁰, ḟ), π_(1) (ḟ_(1) − E ḟ), …
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    probs = jnp.exp(log_probs)
    mean = lambda x: jnp.sum(probs * x, axis=-1, keepdims=True)
    gap = log_probs - jax.nn.log_softmax(at.start)
    surprise, gap = log_probs - mean(log_probs), gap - mean(gap)
    top, places = top_two(log_probs, jnp.arange(logits.shape[-1])[None])

    def rate(move: jax.Array) -> tuple[jax.Array, jax.Array]:
        of = lambda ids: jnp.take_along_axis(move, ids, axis=1) - mean(move)
        first, second = jnp.split(jnp.exp(top) * of(places), 2, axis=1)
        log_prob, entropy, kl = of(at.targets[:, None]), -mean(surprise * move), mean(gap * move)
        return jnp.hstack([log_prob, entropy, first, first - second, kl]), of(at.token_ids)

    return [rate(move) for move in moves]


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
