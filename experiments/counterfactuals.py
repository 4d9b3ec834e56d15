"""Updates that were not made: of W or the body alone, with features centred or whitened.

All are of one length, 10⁻³ nats of KL a token at held-out prompts, to second order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accounts import (
    Counts,
    entropies,
    entropy_change,
    first_order,
    held_out,
    log_probs_at,
    loss_gradient,
    only,
    plus,
    scaled,
    second_order_kl,
    taken,
    target_change,
)

from jaxdyn.optim.whitened import second_moment, whitened_direction
from jaxdyn.rl.cotangents import LogitCotangents
from jaxdyn.train import SavedRun
from jaxdyn.train.sharing import batch_features
from jaxdyn.types import Params

KL = 1e-3
"""Of every update, in nats a token."""


def counterfactual(saved: SavedRun, step: int, counts: Counts) -> dict[str, Any]:
    """ΔH that really follows, and the reward's gain to first order, of updates of one length."""
    model, (prepared, update) = saved.task.model, taken(saved, step)
    look = held_out(saved, update.before, counts, step + 1)
    before = log_probs_at(model, update.before, look.tokens)
    found = {}
    for name, change in directions(model, update, prepared).items():
        whole = sum(first_order(model, update.before, change, look.tokens).values())
        length = np.sqrt(KL / second_order_kl(before, whole))
        after = log_probs_at(model, plus(update.before, scaled(change, length)), look.tokens)
        gain = length * target_change(before, whole, look.tokens.targets)
        found[name] = {
            "entropy": float((entropies(after) - entropies(before)).mean()),
            "entropy_first_order": float(length * entropy_change(before, whole).mean()),
            "reward": float(gain @ look.gains),
        }
    return found


def directions(model: Any, update: Any, prepared: Any) -> dict[str, Params]:
    """What was applied and its halves, and plain gradient steps of W and of the body alone."""
    applied = jax.tree.map(jnp.subtract, update.after, update.before)
    batch, temperature = prepared.batch, jnp.float32(update.temperature)
    weights = jnp.asarray(update.weights)
    gradient = loss_gradient(model, update.before, batch, weights, temperature)
    downhill = scaled(gradient, -1.0)
    phi = batch_features(model, update.before["backbone"], batch)
    steps = classifier_steps(model, update.before, phi, batch, weights, temperature)
    nothing = jax.tree.map(jnp.zeros_like, applied)
    of_head = lambda x: {**nothing, "classifier": {**nothing["classifier"], "weight": x}}
    return {
        "applied": applied,
        "applied, W alone": only("classifier", applied),
        "applied, body alone": only("backbone", applied),
        "gradient, body alone": only("backbone", downhill),
        **{f"gradient, W {name}": of_head(x) for name, x in steps.items()},
    }


def classifier_steps(
    model: Any, params: Params, phi: jax.Array, batch: Any, weights: jax.Array, temperature: Any
) -> dict[str, jax.Array]:
    """−Σ_u g_u φ_uᵀ [V, D], of features as they are, less their mean, and whitened."""
    logits = model.logits(model.view(params)["classifier"], phi)
    cotangents = LogitCotangents(weights[..., 0], weights[..., 1])
    mask = batch.completion_mask[..., None]
    field = jnp.where(mask, cotangents.whole(logits, batch.completion_ids, temperature), 0)
    mean = jnp.sum(jnp.where(mask, phi, 0), axis=(0, 1)) / jnp.sum(batch.completion_mask)
    moment, count = second_moment(phi, batch.completion_mask)
    against = lambda x: -jnp.einsum("bcv,bcd->vd", field, x)
    plain = against(phi)
    return {
        "plain": plain,
        "centred": against(phi - mean[None, None]),
        "whitened": whitened_direction(-plain, moment / count, 1e-3),
    }
