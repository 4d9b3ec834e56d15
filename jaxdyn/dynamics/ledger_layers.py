r"""The account of the body by layer: of whole texts by kind of parameter, or of every site.

Of a text's sum over its sites, one backward pass gives every layer's and every kind's part at once:
with a layer's input a and its output's cotangent δ, what the change ΔK of its kernel does is

    ⟨Σ_t δ_t a_tᵀ, ΔKᵀ⟩ = Σ_t δ_t · (a_t ΔK),

so that no text's gradient is ever formed (`jaxdyn.models.itemized`, with the other parameters).

Of every site apart it takes one forward-mode product a layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from jaxdyn.dynamics.observables import At, feature_cotangents, in_blocks, logit_cotangents
from jaxdyn.kernels.layers import product
from jaxdyn.kernels.operator import site_features
from jaxdyn.kernels.parts import kind_of
from jaxdyn.types import Model, Params, Sites, View

CLASSIFIER = "classifier"


def text_parts(
    model: Model,
    view: View,
    change: View,
    t: Any,
    sites: Sites,
    at: At,
    real: Float[Array, " N"],
    quantities: tuple[str, ...],
) -> dict[str, Float[Array, "Q B layers"]]:
    """Σ ḣ over each text's sites at θ + t Δ, by kind of parameter and layer (1 of what is in none).

    One forward pass, and a backward pass a quantity. `real` is 1 where a site counts, else 0.
    Kinds are "query", "key", "value", "out", "mlp", "norms", "embedding", "final_norm" and
    "classifier"; an adapter's factors have "_lora_a" and "_lora_b" after theirs.
    """
    backbone, moves = view["backbone"], change["backbone"]
    phi, pull = model.itemized(backbone, moves, t, sites.tokens, sites.mask)
    place = (sites.rows, sites.positions)
    head = jax.tree.map(lambda x, d: x + t * d, view["classifier"], change["classifier"])
    here = phi[place]

    def of_sites(at, logits, real):
        """∂h/∂f [N, Q, V]."""
        return logit_cotangents(at, logits, quantities).swapaxes(0, 1) * real[:, None, None]

    of_logits = in_blocks(model, of_sites, at, model.logits(head, here), real).swapaxes(0, 1)
    cotangents = feature_cotangents(model, head, here, of_logits)
    nothing = jnp.zeros((len(quantities), *phi.shape), cotangents.dtype)
    start = nothing.at[:, *place].add(cotangents).astype(phi.dtype)
    by_text = lambda x: jax.ops.segment_sum(x.T, sites.rows, len(phi)).T[..., None]
    parts: dict[str, jax.Array] = {}
    for name in head:
        of_name = _of_head(model, head, change["classifier"], name, here, of_logits)
        parts = _added(parts, {_kind(CLASSIFIER, name): by_text(of_name)})

    for path, items in flatten_dict(jax.vmap(pull)(start)).items():
        by_layer = items if path[0] == "layers" else items[:, None]
        of_parameter = {_kind(_place(path[:-1]), path[-1]): by_layer.swapaxes(1, 2)}
        parts = _added(parts, of_parameter)
    return parts


def _of_head(
    model: Model,
    head: Params,
    change: Params,
    name: str,
    phi: Float[Array, "N D"],
    of_logits: Float[Array, "Q N V"],
) -> Float[Array, "Q N"]:
    """⟨∂h/∂f, ΔW φ⟩ of one of the classifier's parameters, as ⟨ΔWᵀ ∂h/∂f, φ⟩: no [N, V] more."""
    if name == "bias":
        return product("qnv,v->qn", of_logits, change[name])
    still = {key: jnp.zeros_like(x) for key, x in head.items()}
    along = lambda x: jax.jvp(
        lambda w: model.logits(w, x), (head,), ({**still, name: change[name]},)
    )
    _, pull = jax.vjp(lambda x: along(x)[1], phi)
    return product("qnd,nd->qn", jax.vmap(pull)(of_logits)[0], phi)


def _added(parts: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Both, added where a kind is in both."""
    return parts | {kind: parts[kind] + x if kind in parts else x for kind, x in more.items()}


def _place(path: tuple[str, ...]) -> str:
    kind = kind_of(path)
    return path[-1] if kind == "attention" else kind


def _kind(kind: str, name: str) -> str:
    return f"{kind}_{name}" if name.startswith("lora_") else kind


def site_layer_parts(
    model: Model,
    view: View,
    change: View,
    sites: Sites,
    at: At,
    quantities: tuple[str, ...],
    layers_at_once: int,
) -> Float[Array, "Q places N"]:
    """ḣ of every site by place in the body: embedding, each of L layers, final norm.

    One forward-mode product a place; they add up to the gradient component.
    """
    backbone, count = view["backbone"], model.config.num_layers
    body = lambda psi: site_features(model.unfused, psi, sites)
    phi, along = jax.linearize(body, backbone)
    head = view["classifier"]
    of_logits = logit_cotangents(at, model.logits(head, phi), quantities)
    cotangents = feature_cotangents(model, head, phi, of_logits)

    def at_place(place: jax.Array) -> jax.Array:
        of_layer = jnp.arange(1, count + 1) == place

        def only(path, x):
            if path[0].key == "layers":
                return x * of_layer.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)
            return x * (place == (count + 1 if path[0].key == "norm" else 0)).astype(x.dtype)

        moved = along(jax.tree_util.tree_map_with_path(only, change["backbone"]))
        return product("qnd,nd->qn", cotangents, moved)

    places = jnp.arange(count + 2)
    found = jax.lax.map(at_place, places, batch_size=min(layers_at_once, count + 2))
    return found.swapaxes(0, 1)
