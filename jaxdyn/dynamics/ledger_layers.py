r"""The account of the body by layer: of whole texts by kind of parameter, or of every site.

Of a text's sum over its sites, one backward pass gives every layer's and every kind's part at once:
with a layer's input a and its output's cotangent δ, what the change ΔK of its kernel does is

    ⟨Σ_t δ_t a_tᵀ, ΔKᵀ⟩ = Σ_t δ_t · (a_t ΔK),

so that no text's gradient is ever formed (a bias: Σ_t δ_t·Δb, a scale: Σ_t δ_t·(a_t ⊙ Δs), a table:
Σ_t δ_t·ΔE[id_t]; of an adapter s A B by factor, Σ_t s δ_t·(a_t ΔA B) and Σ_t s δ_t·(a_t A ΔB)).

Of every site apart it takes one forward-mode product a layer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdyn.dynamics.observables import At, feature_cotangents, in_blocks, logit_cotangents
from jaxdyn.kernels.gram import Path, parameters_of, pulled, stacked
from jaxdyn.kernels.layers import product
from jaxdyn.kernels.operator import site_features
from jaxdyn.kernels.parts import kind_of
from jaxdyn.types import Model, Params, Sites, View

CLASSIFIER = "classifier"


def text_parts(
    model: Model,
    view: View,
    change: View,
    sites: Sites,
    at: At,
    real: Float[Array, " N"],
    quantities: tuple[str, ...],
) -> dict[str, Float[Array, "Q B layers"]]:
    """Σ ḣ over each text's sites, by kind of parameter and layer (1 of what is in none).

    One forward pass, and a backward pass a quantity. `real` is 1 where a site counts, else 0.
    Kinds are "query", "key", "value", "out", "mlp", "norms", "embedding", "final_norm" and
    "classifier"; an adapter's factors have "_lora_a" and "_lora_b" after theirs.
    """
    phi, inputs, pull = model.opened(view["backbone"], sites.tokens, sites.mask)
    place = (sites.rows, sites.positions)
    head, here = view["classifier"], phi[place]
    still = {name: jnp.zeros_like(x) for name, x in head.items()}
    of_head = {
        name: jax.jvp(lambda w: model.logits(w, here), (head,), ({**still, name: delta},))[1]
        for name, delta in change["classifier"].items()
    }

    def of_sites(at, logits, real, of_head):
        """∂h/∂f [N, Q, V], and its product with what each part of the classifier does."""
        found = logit_cotangents(at, logits, quantities) * real[None, :, None]
        return found.swapaxes(0, 1), {
            name: product("qnv,nv->nq", found, moved) for name, moved in of_head.items()
        }

    of_logits, by_site = in_blocks(model, of_sites, at, model.logits(head, here), real, of_head)
    cotangents = feature_cotangents(model, head, here, of_logits.swapaxes(0, 1))
    nothing = jnp.zeros((len(quantities), *phi.shape), cotangents.dtype)
    start = nothing.at[:, *place].add(cotangents).astype(phi.dtype)
    by_text = lambda x: jax.ops.segment_sum(x, sites.rows, len(phi)).T[..., None]
    parts: dict[str, jax.Array] = {}
    for name, x in by_site.items():
        parts = _added(parts, {_kind(CLASSIFIER, name): by_text(x)})

    weights, moves = (parameters_of(tree["backbone"]) for tree in (view, change))
    given = weights, moves, stacked(inputs), pulled(pull, start)
    for inside in (True, False):  # in a layer, which one after another are scanned over, or in none
        own = [{k: x for k, x in one.items() if (k[0] == "layers") == inside} for one in given]
        found = jax.lax.map(lambda x: _layer_parts(model.config.lora_scale, *x), own)
        parts = _added(parts, {kind: jnp.moveaxis(x, 0, -1) for kind, x in found.items()})
    return parts


def _layer_parts(
    scale: float,
    weights: dict[Path, Params],
    moves: dict[Path, Params],
    inputs: dict[Path, jax.Array],
    cotangents: dict[Path, jax.Array],
) -> dict[str, Float[Array, "Q B"]]:
    """Σ_t δ_t · (what the changes add to the outputs) by kind, of one layer's parameters.

    inputs [B, T, I], cotangents [B, Q, T, O].
    """
    parts: dict[str, jax.Array] = {}
    for path, deltas in moves.items():
        for name, delta in deltas.items():
            written = _written(name, delta, weights[path], inputs[path], scale)
            found = product("bqto,bto->qb", cotangents[path], written)
            parts = _added(parts, {_kind(_place(path), name): found})
    return parts


def _added(parts: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Both, added where a kind is in both."""
    return parts | {kind: parts[kind] + x if kind in parts else x for kind, x in more.items()}


def _written(name: str, delta: jax.Array, own: Params, a: jax.Array, scale: float) -> jax.Array:
    """What a parameter's change alone adds to its layer's output, [B, T, O]."""
    dense = lambda x, matrix: product("bti,io->bto", x, matrix)
    match name:
        case "embedding":
            return delta[a]
        case "kernel":
            return dense(a, delta)
        case "scale":
            return a * delta[None, None]
        case "bias":
            return jnp.broadcast_to(delta, (*a.shape[:2], *delta.shape))
        case "lora_a":
            return scale * dense(dense(a, delta), own["lora_b"])
        case "lora_b":
            return scale * dense(dense(a, own["lora_a"]), delta)
    raise AssertionError(f"a layer has no {name}")


def _place(path: Path) -> str:
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
