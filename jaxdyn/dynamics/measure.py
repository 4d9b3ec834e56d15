"""One look at a run: the state at the probe sites, and what the last update did there.

Every figure is a mean over the probe sites of one kind (prompt or completion) unless it says
otherwise; log-probs and entropies are in nats. Sites and their contexts are fixed before training,
so that a change is the policy's and not that of the states it visits. Everything is in float32 or
better, whatever the model computes in (`jaxdyn.dynamics.precision`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxdyn.dynamics.precision import exact_products, in_float32
from jaxdyn.dynamics.propagation import delta_logits, site_features, to_log_probs
from jaxdyn.hosts import fetch
from jaxdyn.kernels import debiased_cka, effective_rank, participation_ratio, spectrum
from jaxdyn.types import COMPONENTS, Model, Params, Sites


@struct.dataclass
class SiteState:
    """The model at N sites: features [N, D] and log-probs [N, V], float32 or better.

    `row_norms` [V] are ‖W_v‖ of the classifier with its adapters.
    """

    features: Float[Array, "N D"]
    log_probs: Float[Array, "N V"]
    row_norms: Float[Array, " V"]


@struct.dataclass
class StateMeasures:
    """The policy at the probe sites; {kind} is "prompt" or "completion".

    scalars: means over the sites of a kind, and what its features and the classifier are like.
      probe/{entropy,confidence,sampled_logp,kl}/{kind}
      features/{kind}/cosine_{mean,q05,q50,q95}, negative_share, inner_mean: over pairs of sites
      features/{kind}/effective_rank, participation_ratio: of the spectrum of ⟨φ, φ'⟩
      features/{kind}/cka_to_start: debiased CKA with the features before training
      features/drift/cosine_mean, norm_mean: of each site's feature with that before training
      classifier/norm, row_norm_{mean,std,max}: ‖W‖, and ‖W_v‖ over the vocabulary
      classifier/row_norm_change: root mean square of ‖W_v‖ less that before training
      What needs more sites than a kind has (two, and four for the CKA), or would be a division by
      zero, is left out.
    arrays: over the N sites entropy, confidence, sampled_logp, kl, drift_cosine, is_prompt and
      targets; and cosines_{kind} [n, n] of the features of the kind's n sites.
    """

    scalars: dict[str, float]
    arrays: dict[str, np.ndarray]


@struct.dataclass
class UpdateMeasures:
    """What an update did at the probe sites, against its first order; {part} is a component,
    "predicted" (their sum), "actual" or "residual" (actual less predicted).

    scalars:
      delta/{part}/rms: over sites, of Δ log π of the site's token, in nats
      delta/correlation: Pearson's, predicted against actual; left out where either does not vary
      share/{component}: ⟨part, predicted⟩ / ⟨predicted, predicted⟩ over sites and vocabulary,
        which sum to 1; left out where nothing is predicted
      delta/share/{component}: the same over the sites' own tokens
    arrays: Δ log π of the site's token over the N sites, by component and "actual".
    """

    scalars: dict[str, float]
    arrays: dict[str, np.ndarray]


@functools.partial(jax.jit, static_argnames="model")
@exact_products
@jax.named_scope("probe")
def site_state(model: Model, params: Params, sites: Sites) -> SiteState:
    """Features and log-probs at the sites, of a float32 pass or better."""
    model = in_float32(model)
    view = model.view(params)
    classifier = view["classifier"]
    phi = site_features(model, view["backbone"], sites)
    weight = classifier["weight"]
    if "lora_a" in classifier:
        adapter = classifier["lora_b"] @ classifier["lora_a"]
        weight = weight + model.config.lora_scale * adapter
    norms = jnp.linalg.norm(jax.lax.stop_gradient(_wide(weight)), axis=1)
    return SiteState(phi, jax.nn.log_softmax(model.logits(classifier, phi)), norms)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@jax.jit
@exact_products
@jax.named_scope("probe")
def _state_arrays(state, sites, start, reference):
    """Per-site figures, matrices over pairs of sites [N, N], and the classifier's figures."""
    log_probs, phi, before = state.log_probs, _wide(state.features), _wide(start.features)
    probs = jnp.exp(log_probs)
    norms = jnp.linalg.norm(phi, axis=1)
    inner = phi @ phi.T
    rows = state.row_norms
    pick = lambda x: jnp.take_along_axis(x, sites.targets[:, None], axis=1)[:, 0]
    # Only features' differences enter a CKA, so what all have in common need not blur them.
    centred = lambda x: x - jnp.mean(x, axis=0, keepdims=True)
    gram = lambda x: jnp.matmul(centred(x), centred(x).T)
    per_site = {
        "entropy": -jnp.sum(probs * log_probs, axis=1),
        "confidence": jnp.max(probs, axis=1),
        "sampled_logp": pick(log_probs),
        "kl": jnp.sum(probs * (log_probs - reference.log_probs), axis=1),
        "drift_cosine": jnp.sum(phi * before, axis=1) / (norms * jnp.linalg.norm(before, axis=1)),
        "drift_norm": jnp.linalg.norm(phi - before, axis=1),
    }
    pairs = {
        "inner": inner,
        "cosine": inner / (norms[:, None] * norms[None, :]),
        "gram": gram(phi),
        "start_gram": gram(before),
    }
    classifier = {
        "classifier/norm": jnp.linalg.norm(rows),
        "classifier/row_norm_mean": jnp.mean(rows),
        "classifier/row_norm_std": jnp.std(rows),
        "classifier/row_norm_max": jnp.max(rows),
        "classifier/row_norm_change": jnp.sqrt(jnp.mean((rows - start.row_norms) ** 2)),
    }
    return per_site, pairs, classifier


@jax.jit
@jax.named_scope("probe")
def _feature_figures(inner, gram, start_gram):
    """Of n sites' features, from their matrices [n, n]."""
    values = spectrum(inner)
    figures = {
        "effective_rank": effective_rank(values),
        "participation_ratio": participation_ratio(values),
    }
    if len(inner) >= 4:
        figures["cka_to_start"] = debiased_cka(gram, start_gram)
    return figures


@functools.partial(jax.jit, static_argnames="model")
@exact_products
@jax.named_scope("probe")
def _update_arrays(model, before, after, sites, head_share, state):
    """First-order and actual Δ log π of the targets [N], and sums over the vocabulary."""
    model = in_float32(model)
    delta = jax.tree.map(jnp.subtract, after, before)
    phi, parts = delta_logits(model, before, delta, sites, head_share)
    logits = model.logits(model.view(before)["classifier"], phi)
    parts = jax.tree.map(lambda d: to_log_probs(logits, d), parts)
    predicted = parts.total
    actual = state.log_probs - jax.nn.log_softmax(logits)
    pick = lambda x: jnp.take_along_axis(x, sites.targets[:, None], axis=1)[:, 0]
    vectors = {name: getattr(parts, name) for name in COMPONENTS} | {
        "predicted": predicted,
        "actual": actual,
        "residual": actual - predicted,
    }
    along = {name: jnp.sum(vector * predicted) for name, vector in vectors.items()}
    return {name: pick(vector) for name, vector in vectors.items()}, along


def measure_state(
    model: Model,
    params: Params,
    sites: Sites,
    start: SiteState,
    reference: SiteState,
    state: SiteState | None = None,
) -> StateMeasures:
    """The policy at the sites.

    Args:
      model: a `LanguageModel`.
      params: its parameters, as stored.
      sites: N probe sites.
      start: their state before training, for the features' drift and the classifier's.
      reference: their state under the reference policy, for the KL.
      state: `site_state` of `params`, if it is known already.
    """
    state = site_state(model, params, sites) if state is None else state
    per_site, pairs, classifier = fetch(_state_arrays(state, sites, start, reference))
    is_prompt, targets = fetch((sites.is_prompt, sites.targets))
    scalars = {name: float(x) for name, x in classifier.items()}
    arrays = {name: x for name, x in per_site.items() if name != "drift_norm"}
    arrays |= {"is_prompt": is_prompt, "targets": targets}
    for kind, rows in (
        ("prompt", np.flatnonzero(is_prompt)),
        ("completion", np.flatnonzero(~is_prompt)),
    ):
        if len(rows) == 0:
            continue
        for name in ("entropy", "confidence", "sampled_logp", "kl"):
            scalars[f"probe/{name}/{kind}"] = float(per_site[name][rows].mean())
        if len(rows) < 2:
            continue
        own = {name: x[np.ix_(rows, rows)] for name, x in pairs.items()}
        cosines, inner = _above(own["cosine"]), own["inner"]
        q05, q50, q95 = np.quantile(cosines, (0.05, 0.5, 0.95))
        scalars |= {
            f"features/{kind}/cosine_mean": float(cosines.mean()),
            f"features/{kind}/cosine_q05": float(q05),
            f"features/{kind}/cosine_q50": float(q50),
            f"features/{kind}/cosine_q95": float(q95),
            f"features/{kind}/negative_share": float((cosines < 0).mean()),
            f"features/{kind}/inner_mean": float(_above(inner).mean()),
        }
        found = fetch(_feature_figures(inner, own["gram"], own["start_gram"]))
        scalars |= {f"features/{kind}/{k}": float(x) for k, x in found.items() if np.isfinite(x)}
        arrays[f"cosines_{kind}"] = own["cosine"]
    scalars["features/drift/cosine_mean"] = float(per_site["drift_cosine"].mean())
    scalars["features/drift/norm_mean"] = float(per_site["drift_norm"].mean())
    return StateMeasures(scalars, arrays)


def _above(matrix: np.ndarray) -> np.ndarray:
    """The entries above the diagonal."""
    return matrix[np.triu_indices(len(matrix), 1)]


def measure_update(
    model: Model,
    before: Params,
    after: Params,
    sites: Sites,
    head_share: jax.Array | None = None,
    state: SiteState | None = None,
) -> UpdateMeasures:
    """What the applied update `after − before` did at the sites, against its first order.

    For the arguments see `delta_logits`; `state` is `site_state` of `after`, if it is known
    already.
    """
    state = site_state(model, after, sites) if state is None else state
    figures = _update_arrays(model, before, after, sites, head_share, state)
    per_site, along = fetch(figures)
    scalars = {f"delta/{k}/rms": float(np.sqrt(np.mean(v**2))) for k, v in per_site.items()}
    predicted, actual = per_site["predicted"], per_site["actual"]
    if predicted.std() > 0 and actual.std() > 0:
        scalars["delta/correlation"] = float(np.corrcoef(predicted, actual)[0, 1])
    if squares := float(predicted @ predicted):
        own = {part: float(per_site[part] @ predicted) / squares for part in COMPONENTS}
        scalars |= {f"delta/share/{part}": x for part, x in own.items()}
    if whole := along["predicted"]:
        scalars |= {f"share/{part}": float(along[part] / whole) for part in COMPONENTS}
    return UpdateMeasures(scalars, {k: per_site[k] for k in (*COMPONENTS, "actual")})
