r"""The metric in which an optimizer sees gradients: P of a live Adam state.

Adam moves θ by η P m̂ with the diagonal P = 1 / (√ν̂ + ε), ν̂ the bias-corrected second moments
(Kingma and Ba 2015, algorithm 1). Reinforcing one sample then moves another's log-prob by the
preconditioned kernel

    Θ_P(s, s') = (∂f(s)/∂θ) P (∂f(s')/∂θ)ᵀ,

an ordinary kernel in the coordinates θ/√P. Of a fresh gradient g, m̂ holds the share
(1 − b1) / (1 − b1ᵗ); the rest of the update is momentum, which no kernel between sites describes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdyn.types import JaxdynError, Model, Params


def adam_preconditioner(
    state: optax.OptState, params: Params, *, b2: float = 0.999, eps: float = 1e-8
) -> Params:
    """P = 1 / (√(ν / (1 − b2ᵗ)) + ε), shaped as `params`, from a live optax state.

    Args:
      state: any optax state that holds `scale_by_adam`'s: one for the whole tree, or one for each
        of its top-level parts. What has no moments does not move, so its P is 0: a part without a
        state, and leaves that a part's state leaves out, as all but its adapters may be.
      params: the parameters that the optimizer moves, as stored.
      b2: the optimizer's decay of the second moments, which the state does not know; and its `eps`.

    Raises:
      JaxdynError: if no Adam state is there, if it has not taken a step, or if its second moments
        have other shapes than the parameters.
    """
    whole = _adams(state)
    if not whole:
        raise JaxdynError("the optimizer state holds no Adam moments (scale_by_adam)")
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if len(whole) == 1 and shapes(whole[0].nu) == shapes(params):
        return _inverse_root(whole[0], b2, eps)
    by_part = _parts_of(state, set(params))
    if not by_part:
        raise JaxdynError(
            "the second moments have other shapes than the parameters: the state belongs to "
            "another model"
        )
    out = {}
    for part, tree in params.items():
        leaves = flatten_dict(jax.tree.map(jnp.zeros_like, tree))
        for adam in _adams(by_part.get(part, ()))[:1]:
            if not flatten_dict(shapes(adam.nu)).items() <= flatten_dict(shapes(tree)).items():
                raise JaxdynError(
                    f"the second moments of {part} have other shapes than its parameters: the "
                    "state belongs to another model"
                )
            leaves |= flatten_dict(_inverse_root(adam, b2, eps))
        out[part] = unflatten_dict(leaves)
    return out


def roots_of(model: Model, params: Params, preconditioner: Params | None) -> Params | None:
    """√P in the shape of `model.view(params)`, or None without a preconditioner.

    Raises:
      JaxdynError: if P is not shaped as the parameters, or negative somewhere.
    """
    if preconditioner is None:
        return None
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    view = model.view(params)
    if shapes(preconditioner) not in (shapes(params), shapes(view)):
        raise JaxdynError("the preconditioner must be a tree of the parameters' own shapes")
    for path, x in jax.tree_util.tree_leaves_with_path(preconditioner):
        if not (lowest := float(jnp.min(x))) >= 0:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise JaxdynError(f"the preconditioner must not be negative, got {lowest} in {name}")
    return model.view(jax.tree.map(jnp.sqrt, preconditioner))


def _adams(state: Any) -> list[optax.ScaleByAdamState]:
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    return [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]


def _parts_of(state: Any, parts: set[str]) -> dict[str, Any]:
    """The first mapping from top-level parts of the parameters to states that hold Adam's."""
    if isinstance(state, dict):
        if set(state) <= parts and _adams(state):
            return state
        state = tuple(state.values())
    if isinstance(state, tuple | list):
        for inner in state:
            if found := _parts_of(inner, parts):
                return found
    return {}


def _inverse_root(adam: optax.ScaleByAdamState, b2: float, eps: float) -> Params:
    steps = int(adam.count)
    if not steps:
        raise JaxdynError("the Adam state has taken no step, so it has no second moments yet")
    root = lambda nu: 1 / (jnp.sqrt(nu / (1 - b2**steps)) + eps)
    return jax.tree.map(root, adam.nu)
