"""The probe's figures against plain numpy, and the choice of sites."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn.dynamics import ProbeConfig, measure_state, measure_update, site_state
from jaxdyn.dynamics import sites_from_rollout as choose
from jaxdyn.types import JaxdynError, Rollout


def test_state_at_the_sites_equals_numpy(x64):
    model, params = oracles.tiny_model("gpt_neox-untied")
    _, moved = oracles.tiny_model("gpt_neox-untied")
    moved = jax.tree.map(lambda x: 1.1 * x, moved)
    sites = oracles.tiny_sites()
    start = site_state(model, params, sites)
    found = measure_state(model, moved, sites, start, start)
    scalars, arrays = found.scalars, found.arrays

    log_probs = np.asarray(jax.nn.log_softmax(oracles.site_logits(model, moved, sites)))
    before = np.asarray(jax.nn.log_softmax(oracles.site_logits(model, params, sites)))
    p = np.exp(log_probs)
    prompt = np.array([0, 2, 3])
    pick = log_probs[np.arange(5), np.asarray(sites.targets)]
    # The figures are stored in float32.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6)
    close(scalars["probe/entropy/prompt"], -(p * log_probs).sum(1)[prompt].mean())
    close(scalars["probe/confidence/prompt"], p.max(1)[prompt].mean())
    close(scalars["probe/sampled_logp/completion"], pick[[1, 4]].mean())
    close(scalars["probe/kl/completion"], (p * (log_probs - before)).sum(1)[[1, 4]].mean())

    features = lambda v: np.asarray(model.features(v["backbone"], sites.tokens, sites.mask))
    phi = features(moved)[sites.rows, sites.positions]
    old = features(params)[sites.rows, sites.positions]
    norm = np.linalg.norm
    pairs = [(0, 2), (0, 3), (2, 3)]
    cosines = [phi[i] @ phi[j] / norm(phi[i]) / norm(phi[j]) for i, j in pairs]
    close(scalars["features/prompt/cosine_mean"], np.mean(cosines))
    close(scalars["features/prompt/cosine_q95"], np.quantile(cosines, 0.95))
    close(scalars["features/prompt/negative_share"], np.mean(np.array(cosines) < 0))
    close(scalars["features/prompt/inner_mean"], np.mean([phi[i] @ phi[j] for i, j in pairs]))
    close(scalars["features/drift/norm_mean"], norm(phi - old, axis=1).mean())
    close(
        scalars["features/drift/cosine_mean"],
        np.mean((phi * old).sum(1) / norm(phi, axis=1) / norm(old, axis=1)),
    )
    close(scalars["classifier/norm"], norm(moved["classifier"]["weight"]))
    assert arrays["cosines_prompt"].shape == (3, 3)


def test_update_figures_equal_numpy(x64):
    model, params = oracles.tiny_model("gpt2-untied")
    after = jax.tree.map(lambda x: 1.01 * x, params)
    sites = oracles.tiny_sites()
    found = measure_update(model, params, after, sites)
    scalars, arrays = found.scalars, found.arrays
    log_probs = lambda v: np.asarray(jax.nn.log_softmax(oracles.site_logits(model, v, sites)))
    change = (log_probs(after) - log_probs(params))[np.arange(5), np.asarray(sites.targets)]
    np.testing.assert_allclose(arrays["actual"], change, atol=1e-12)
    predicted = arrays["representation"] + arrays["gradient"] + arrays["cross"]
    np.testing.assert_allclose(scalars["delta/predicted/rms"], np.sqrt(np.mean(predicted**2)))
    np.testing.assert_allclose(
        scalars["delta/residual/rms"], np.sqrt(np.mean((change - predicted) ** 2))
    )
    np.testing.assert_allclose(scalars["delta/correlation"], np.corrcoef(predicted, change)[0, 1])


def test_an_update_that_moves_nothing_has_no_shares():
    model, params = oracles.tiny_model("gpt_neox-untied", jnp.float32)
    scalars = measure_update(model, params, params, oracles.tiny_sites()).scalars
    assert scalars["delta/actual/rms"] == 0.0
    assert all(np.isfinite(x) for x in scalars.values())
    assert not [key for key in scalars if key.startswith("share/") or key == "delta/correlation"]


def rollout(lengths):
    slots = max(lengths)
    mask = np.arange(slots)[None] < np.array(lengths)[:, None]
    ids = np.arange(len(lengths) * slots).reshape(-1, slots)
    prompt = np.full((len(lengths), 3), 99)
    return Rollout(
        jnp.asarray(prompt),
        jnp.ones(prompt.shape, bool),
        jnp.asarray(ids),
        jnp.asarray(mask),
        jnp.zeros(ids.shape),
    )


def test_sites_are_the_prompts_end_and_places_inside_the_completion():
    sampled = rollout([4, 1, 2])
    sites = choose(sampled, sites_per_completion=2, seed=0)
    rows, positions = np.asarray(sites.rows), np.asarray(sites.positions)
    np.testing.assert_array_equal(rows, [0, 0, 0, 1, 2, 2])
    np.testing.assert_array_equal(sites.is_prompt, [True, False, False, True, True, False])
    # Slot 2 is the prompts' last; what a site predicts stands one slot further.
    np.testing.assert_array_equal(positions[np.asarray(sites.is_prompt)], [2, 2, 2])
    np.testing.assert_array_equal(np.asarray(sites.tokens)[rows, positions + 1], sites.targets)
    assert np.asarray(sites.mask)[rows, positions + 1].all()
    again = choose(sampled, sites_per_completion=2, seed=0)
    np.testing.assert_array_equal(again.positions, positions)


@pytest.mark.parametrize(
    "field, value", [("every", -1), ("num_prompts", 1), ("sites_per_completion", -2)]
)
def test_a_probe_out_of_range_is_named(field, value):
    with pytest.raises(JaxdynError, match=f"probe.{field}.*{value}"):
        ProbeConfig(**{field: value})
