"""Which other tokens a training raised and lowered at each site."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxdyn.dynamics.ledger_path import batches_of_texts
from jaxdyn.hosts import fetch
from jaxdyn.kernels.execution import DEFAULT_BUDGET
from jaxdyn.kernels.operator import site_features, sites_of
from jaxdyn.types import Model, Params, Sites


def most_changed_tokens(
    model: Model,
    before: Params,
    after: Params,
    sites: Sites,
    count: int,
    memory_budget: int = DEFAULT_BUDGET,
) -> Int[np.ndarray, "N A"]:
    """Token ids [N, A = count]: the count / 2 whose probability rose most, from the most on, and
    then as many whose probability fell most.

    Args:
      model: a `LanguageModel`.
      before, after: its parameters, as stored; both are in memory at once.
      sites: N sites.
      count: an even number, at most V.
      memory_budget: bytes beside the parameters.

    Raises:
      JaxdynError: as `ledger`, of the sites and the budget.
    """
    views = model.view(before), model.view(after)
    ids = np.zeros((len(sites.rows), count), np.int32)
    nothing = np.zeros((len(sites.rows), 0), np.int32)
    for batch in batches_of_texts(model, sites, nothing, memory_budget, share=True):
        found = fetch(_changed(model, *views, batch.sites, count // 2))
        ids[batch.numbers] = found  # a site that comes again gets the same
    return ids


@functools.partial(jax.jit, static_argnums=(0, 4))
def _changed(model, before, after, sites, half):
    def probabilities(view):
        phi = site_features(model, view["backbone"], sites_of(sites))
        return jax.nn.softmax(model.logits(view["classifier"], phi))

    change = probabilities(after) - probabilities(before)
    pick = lambda x: jax.lax.top_k(x, half)[1]
    return jnp.concatenate([pick(change), pick(-change)], axis=1)
