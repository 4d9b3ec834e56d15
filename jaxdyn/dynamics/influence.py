r"""Who moved whom in one update: completions against sites, with everything else it did beside.

Let h be log π(y) or the entropy H at a site o, at temperature 1, and

    Δθ = −M ⊙ c Σ_u ∇loss_u + momentum + decay (+ others)

the update, with loss_u completion u's part of the loss, M the diagonal metric (η P s of Adam:
`jaxdyn.optim.applied_parts`) and c the clip. Then, exactly,

    h(θ + Δθ) − h(θ) = Σ_u K_ou + clipping + momentum + decay + residual + second order,

    K_ou = −∇h_oᵀ M ∇loss_u,        clipping = (c − 1) Σ_u K_ou,

every term but the last two by component: K is the NTK in the metric M, contracted with the real
loss's logit cotangents (`jaxdyn.kernels.policy_kernel`), and momentum and decay are forward-mode
products. The residual is the product along the Δθ that was applied less the columns before it: what
rounding left. What is of second order or higher is the actual change less that product.

The pairwise form of it for gradient descent is Pruthi et al. 2020 (TracIn, arXiv 2002.08484); the
components, the entropy, and Adam's columns are ours.
"""

import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxdyn.dynamics.precision import exact_products
from jaxdyn.dynamics.propagation import by_path
from jaxdyn.kernels import Execution, policy_kernel
from jaxdyn.kernels.operator import (
    Batches,
    batches_of,
    pullback,
    pushforward,
    site_features,
    sites_of,
)
from jaxdyn.kernels.rows import statistics_of
from jaxdyn.types import Components, Model, Params, Rollout, Sites, View


class Change(NamedTuple):
    """A part of the update shaped as the parameters; of a tied matrix the part that came through
    the head, [V, D], or None where none did."""

    delta: Params
    head_share: Any = None


@struct.dataclass
class Influence:
    """An update's account at O sites; its first axis holds log π of the site's token, and H.

    completions: K [2, O, U].  others: the other columns [2, O], "clipping" and those that were
    given.  first_order: of the applied update, and actual: the whole change, [2, O].

    Of several updates in a row the accounts may be added: each term is then the sum of theirs.
    """

    completions: Components
    others: dict[str, Components]
    first_order: jax.Array
    actual: jax.Array

    @property
    def columns(self) -> jax.Array:
        """What all columns add up to, [2, O]."""
        return self.completions.total.sum(axis=-1) + sum(x.total for x in self.others.values())

    @property
    def residual(self) -> jax.Array:
        """[2, O]: 0 but for rounding."""
        return self.first_order - self.columns

    @property
    def second_order(self) -> jax.Array:
        """[2, O]: and higher orders."""
        return self.actual - self.first_order


def influence(
    model: Model,
    before: Params,
    after: Params,
    sites: Sites,
    rollout: Rollout,
    *,
    weights: Any,
    temperature: float,
    metric: Params,
    clip: float = 1.0,
    others: dict[str, Change] | None = None,
    **execution: Unpack[Execution],
) -> Influence:
    """The account of the update `after − before` at the sites.

    Args:
      model: a `LanguageModel`.
      before, after: its parameters, as stored.
      sites: O sites.
      rollout: the U completions that the update is made of.
      weights: ∂loss/∂ log π and ∂loss/∂H of their tokens, [U, C, 2]: see
        `jaxdyn.rl.logit_cotangents`.
      temperature: at which the loss saw them.
      metric: M ≥ 0, shaped as the parameters; 0 where nothing moved.
      clip: c.
      others: what else was added to the parameters, by name.
      execution: see `jaxdyn.kernels.Execution`.

    Raises:
      JaxdynError: as `jaxdyn.kernels.policy_kernel`.
    """
    batches = batches_of(model, sites, "sites", _budget(execution))
    view = model.view(before)

    def along(change: Change) -> tuple[jax.Array, Components]:
        paths = change.head_share is not None
        moved = by_path(model, *change) if paths else model.view(change.delta)
        found, parts = statistics_along(model, view, moved, batches, paths)
        if model.config.tied and not paths:  # what the head reads came through the body
            parts = Components(parts.cross, parts.gradient, parts.representation)
        return found, parts

    columns = contributions(
        model,
        before,
        sites,
        rollout,
        weights=weights,
        temperature=temperature,
        metric=metric,
        **execution,
    )
    parts = {"clipping": jax.tree.map(lambda x: (clip - 1) * x.sum(axis=-1), columns)}
    parts |= {name: along(change)[1] for name, change in (others or {}).items()}
    start, applied = along(Change(jax.tree.map(jnp.subtract, after, before)))
    end = statistics_at(model, model.view(after), batches)
    return Influence(columns, parts, applied.total, end - start)


def contributions(
    model: Model,
    params: Params,
    sites: Sites,
    rollout: Rollout,
    *,
    weights: Any,
    temperature: float,
    metric: Params | None = None,
    places: Any = None,
    rollout_params: Params | None = None,
    **execution: Unpack[Execution],
) -> Components:
    """K = −∇h M ∇loss_u, [2, O, U], or of single tokens (u, c) `places` [M, 2], [2, O, M].

    Without a metric M is the identity: the change per unit of a plain gradient step's learning
    rate. With `rollout_params` ∇loss_u is taken there, and ∇h still at `params`. For the other
    arguments see `influence`.
    """
    found = policy_kernel(
        model,
        params,
        sites,
        rollout,
        weights=-np.asarray(weights),
        temperature=temperature,
        places=places,
        rollout_params=rollout_params,
        preconditioner=metric,
        **execution,
    )
    return Components(found.representation, found.gradient, found.cross)


@functools.partial(jax.jit, static_argnums=0)
def own_tokens(
    model: Model,
    params: Params,
    sites: Sites,
    weights: Any,
    temperature: Any,
    metric: Params | None = None,
) -> Components:
    """What each site's own token did to it, [2, O]: the case that a site is among the batch's.

    Args:
      sites: O sites, whose targets are the tokens that were sampled there.
      weights: ∂loss/∂ log π and ∂loss/∂H at each, [O, 2].
      temperature: at which the loss saw them.

    For the other arguments see `contributions`.
    """
    view, scale = model.view(params), None if metric is None else model.view(metric)

    def of_site(given):
        row, position, target, weight = given
        one = Sites(
            tokens=sites.tokens[row][None],
            mask=jnp.asarray(sites.mask)[row][None],
            rows=jnp.zeros(1, jnp.int32),
            positions=position[None],
            targets=target[None],
            is_prompt=jnp.zeros(1, bool),
        )
        phi = model.features(view["backbone"], one.tokens, one.mask)[0, position][None]
        logits = model.logits(view["classifier"], phi)
        wide = lambda x: jnp.asarray(x, logits.dtype)
        seen = jnp.where(temperature > 0, temperature, 1)
        _, cotangents = statistics_of(logits, target[None], wide(seen))
        field = jnp.einsum("t,tnv->nv", wide(weight), cotangents)
        change = pullback(model, view, -field, one)
        if scale is not None:
            change = jax.tree.map(lambda g, m: (g * m).astype(g.dtype), change, scale)
        _, gradients = statistics_of(logits, target[None])
        parts = pushforward(model, view, View(change), one)[1]
        return jax.tree.map(lambda d: jnp.einsum("tnv,nv->t", gradients, d), parts)

    found = jax.lax.map(of_site, (sites.rows, sites.positions, sites.targets, weights))
    return jax.tree.map(jnp.transpose, found)


@functools.partial(jax.jit, static_argnums=(0, 4))
def statistics_along(
    model: Model, view: View, change: View, batches: Batches, paths: bool
) -> tuple[jax.Array, Components]:
    """log π of the targets and H [2, N], and their first-order changes along Δ by component.

    Of a tied matrix Δ has its parts by path, or the whole in both roles: see `pushforward`.
    """

    def of_batch(_, batch):
        sites = sites_of(batch)
        phi, parts = pushforward(model, view, change, sites, paths)
        found, gradients = statistics_of(model.logits(view["classifier"], phi), sites.targets)
        along = lambda d: jnp.einsum("tnv,nv->tn", gradients, d)
        return None, (found, jax.tree.map(along, parts))

    _, found = jax.lax.scan(of_batch, None, batches.sites)
    return jax.tree.map(functools.partial(_in_order, batches), found)


@functools.partial(jax.jit, static_argnums=0)
@exact_products
def statistics_at(model: Model, view: View, batches: Batches) -> jax.Array:
    """log π of the targets and H, [2, N]."""

    def of_batch(_, batch):
        sites = sites_of(batch)
        phi = site_features(model, view["backbone"], sites)
        return None, statistics_of(model.logits(view["classifier"], phi), sites.targets)[0]

    return _in_order(batches, jax.lax.scan(of_batch, None, batches.sites)[1])


def _in_order(batches: Batches, x: jax.Array) -> jax.Array:
    """Of all batches [K, 2, S] the N sites, [2, N]."""
    return jnp.moveaxis(x, 1, 0).reshape(2, -1)[:, batches.places]


def _budget(execution: Execution) -> Execution:
    """Of the options the one that products along a change have a use for."""
    given = {k: v for k, v in execution.items() if k == "memory_budget"}
    return Execution(**given)  # type: ignore[typeddict-item]
