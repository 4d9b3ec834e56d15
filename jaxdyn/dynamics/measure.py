"""One look at a run: the state at the probe sites, and what the last update did there.

Every figure is a mean over the probe sites of one kind (prompt or completion) unless it says
otherwise; log-probs and entropies are in nats. Sites and their contexts are fixed before training,
so that a change is the policy's and not that of the states it visits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxdyn.dynamics.propagation import delta_logits, site_features, to_log_probs
from jaxdyn.hosts import fetch
from jaxdyn.types import Model, Params, Sites


@struct.dataclass
class SiteState:
    """The model at N sites: features [N, D] and log-probs [N, V], float32 or better."""

    features: Float[Array, "N D"]
    log_probs: Float[Array, "N V"]


@functools.partial(jax.jit, static_argnames="model")
def site_state(model: Model, params: Params, sites: Sites) -> SiteState:
    """Features and log-probs at the sites."""
    view = model.view(params)
    phi = site_features(model, view["backbone"], sites)
    return SiteState(phi, jax.nn.log_softmax(model.logits(view["classifier"], phi)))


@jax.jit
def _state_arrays(state, weight, sites, start, reference):
    """Per-site figures, and feature cosines and inner products [N, N]."""
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    log_probs, phi = state.log_probs, wide(state.features)
    probs = jnp.exp(log_probs)
    norms = jnp.linalg.norm(phi, axis=1)
    before = wide(start.features)
    inner = phi @ phi.T
    pick = lambda x: jnp.take_along_axis(x, sites.targets[:, None], axis=1)[:, 0]
    return {
        "entropy": -jnp.sum(probs * log_probs, axis=1),
        "confidence": jnp.max(probs, axis=1),
        "sampled_logp": pick(log_probs),
        "kl": jnp.sum(probs * (log_probs - reference.log_probs), axis=1),
        "drift_cosine": jnp.sum(phi * before, axis=1) / (norms * jnp.linalg.norm(before, axis=1)),
        "drift_norm": jnp.linalg.norm(phi - before, axis=1),
        "inner": inner,
        "cosine": inner / (norms[:, None] * norms[None, :]),
        "classifier_norm": jnp.linalg.norm(weight),
    }


@functools.partial(jax.jit, static_argnames="model")
def _update_arrays(model, before, after, sites, head_share, state):
    """First-order and actual Δ log π of the targets [N], and sums over the vocabulary."""
    delta = jax.tree.map(jnp.subtract, after, before)
    phi, parts = delta_logits(model, before, delta, sites, head_share)
    logits = model.logits(model.view(before)["classifier"], phi)
    parts = jax.tree.map(lambda d: to_log_probs(logits, d), parts)
    predicted = parts.total
    actual = state.log_probs - jax.nn.log_softmax(logits)
    pick = lambda x: jnp.take_along_axis(x, sites.targets[:, None], axis=1)[:, 0]
    vectors = {
        "representation": parts.representation,
        "gradient": parts.gradient,
        "cross": parts.cross,
        "predicted": predicted,
        "actual": actual,
        "residual": actual - predicted,
    }
    along = {name: jnp.sum(vector * predicted) for name, vector in vectors.items()}
    return {name: pick(vector) for name, vector in vectors.items()}, along


def _pairs(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The entries above the diagonal of the submatrix of `rows`."""
    return matrix[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)]


def measure_state(
    model: Model,
    params: Params,
    sites: Sites,
    start: SiteState,
    reference: SiteState,
    state: SiteState | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The policy at the sites: scalars for the log, and per-site arrays.

    Args:
      model: a `LanguageModel`.
      params: its parameters, as stored.
      sites: N probe sites.
      start: their state before training, for the features' drift.
      reference: their state under the reference policy, for the KL.
      state: `site_state` of `params`, if it is known already.

    Returns:
      Scalars keyed `probe/{entropy,confidence,sampled_logp,kl}/{kind}`, `features/{kind}/…`,
      `features/drift/…`, `classifier/norm`; and arrays over sites, with the feature cosines of
      each kind. A kind without two sites has no cosines.
    """
    state = site_state(model, params, sites) if state is None else state
    classifier = model.view(params)["classifier"]
    weight = classifier["weight"]
    if "lora_a" in classifier:
        adapter = classifier["lora_b"] @ classifier["lora_a"]
        weight = weight + model.config.lora_scale * adapter
    figures = _state_arrays(state, weight, sites, start, reference)
    arrays = fetch(figures)
    is_prompt, targets = fetch((sites.is_prompt, sites.targets))
    scalars = {"classifier/norm": float(arrays["classifier_norm"])}
    kept = {k: arrays[k] for k in ("entropy", "confidence", "sampled_logp", "kl", "drift_cosine")}
    kept |= {"is_prompt": is_prompt, "targets": targets}
    for kind, rows in (
        ("prompt", np.flatnonzero(is_prompt)),
        ("completion", np.flatnonzero(~is_prompt)),
    ):
        if len(rows) == 0:
            continue
        for name in ("entropy", "confidence", "sampled_logp", "kl"):
            scalars[f"probe/{name}/{kind}"] = float(arrays[name][rows].mean())
        if len(rows) < 2:
            continue
        cosines = _pairs(arrays["cosine"], rows)
        q05, q50, q95 = np.quantile(cosines, (0.05, 0.5, 0.95))
        scalars |= {
            f"features/{kind}/cosine_mean": float(cosines.mean()),
            f"features/{kind}/cosine_q05": float(q05),
            f"features/{kind}/cosine_q50": float(q50),
            f"features/{kind}/cosine_q95": float(q95),
            f"features/{kind}/negative_share": float((cosines < 0).mean()),
            f"features/{kind}/inner_mean": float(_pairs(arrays["inner"], rows).mean()),
        }
        kept[f"cosines_{kind}"] = arrays["cosine"][np.ix_(rows, rows)]
    scalars["features/drift/cosine_mean"] = float(arrays["drift_cosine"].mean())
    scalars["features/drift/norm_mean"] = float(arrays["drift_norm"].mean())
    return scalars, kept


def measure_update(
    model: Model,
    before: Params,
    after: Params,
    sites: Sites,
    head_share: jax.Array | None = None,
    state: SiteState | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """What the applied update `after − before` did at the sites, against its first order.

    Returns:
      Scalars: `delta/{part}/rms` over sites of Δ log π of the site's token, in nats;
      `delta/correlation`, Pearson's, predicted against actual (nan if either does not vary);
      `share/{component}` = ⟨part, predicted⟩ / ⟨predicted, predicted⟩ over sites and vocabulary,
      which sum to 1. And the per-site arrays behind them. See `delta_logits` for the arguments;
      `state` is `site_state` of `after`, if it is known already.
    """
    state = site_state(model, after, sites) if state is None else state
    figures = _update_arrays(model, before, after, sites, head_share, state)
    per_site, along = fetch(figures)
    scalars = {f"delta/{k}/rms": float(np.sqrt(np.mean(v**2))) for k, v in per_site.items()}
    predicted, actual = per_site["predicted"], per_site["actual"]
    varies = predicted.std() > 0 and actual.std() > 0
    scalars["delta/correlation"] = (
        float(np.corrcoef(predicted, actual)[0, 1]) if varies else float("nan")
    )
    for part in ("representation", "gradient", "cross"):
        scalars[f"share/{part}"] = (
            float(along[part] / along["predicted"]) if along["predicted"] else float("nan")
        )
    return scalars, {k: per_site[k] for k in ("representation", "gradient", "cross", "actual")}
