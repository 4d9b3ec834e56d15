"""The probe's figures against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn import kernels
from jaxdyn.dynamics import (
    ProbeConfig,
    measure_state,
    measure_update,
    site_features,
    site_state,
)
from jaxdyn.types import JaxdynError, Sites


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
    share = arrays["gradient"] @ predicted / (predicted @ predicted)
    np.testing.assert_allclose(scalars["delta/share/gradient"], share)


def test_a_run_in_bfloat16_is_measured_in_float32():
    """Of steps of 1e-5 a bfloat16 pass sees nothing but its rounding; what is measured is what
    float32 computing measures, bit for bit."""
    model, params = oracles.tiny_model("gpt_neox-tied", jnp.float32)
    narrow = dataclasses.replace(model, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    sign = lambda x: jnp.asarray(rng.choice([-1e-5, 1e-5], x.shape), jnp.float32)
    after = jax.tree.map(lambda x: x + sign(x), params)
    sites = oracles.tiny_sites()
    logits = lambda m, p: m.logits(
        m.view(p)["classifier"], site_features(m, m.view(p)["backbone"], sites)
    )
    rough = logits(narrow, after) - logits(narrow, params)
    exact = logits(model, after) - logits(model, params)
    assert np.corrcoef(rough.ravel(), exact.ravel())[0, 1] < 0.5

    found = measure_update(narrow, params, after, sites)
    assert found.scalars["delta/correlation"] > 0.99
    assert found.scalars["delta/residual/rms"] < 0.05 * found.scalars["delta/predicted/rms"]
    same = measure_update(model, params, after, sites)
    for part, x in same.arrays.items():
        np.testing.assert_array_equal(found.arrays[part], x)
    states = site_state(narrow, params, sites), site_state(model, params, sites)
    for got, wanted in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_what_is_measured_multiplies_in_float32_on_every_device():
    """A GPU's default are ten bits, a TPU's eight; on the CPU only the program says so."""
    model, params = oracles.tiny_model("llama-tied", jnp.float32)
    half = dataclasses.replace(model, dtype=jnp.bfloat16)
    sites = oracles.tiny_sites()
    for given in (model, half):
        measure = jax.jit(lambda params, given=given: site_state(given, params, sites))
        text = measure.lower(params).as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert dots and all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


def test_an_update_that_moves_nothing_has_no_shares():
    model, params = oracles.tiny_model("gpt_neox-untied", jnp.float32)
    scalars = measure_update(model, params, params, oracles.tiny_sites()).scalars
    assert scalars["delta/actual/rms"] == 0.0
    assert all(np.isfinite(x) for x in scalars.values())
    assert not [key for key in scalars if key.startswith("share/") or key == "delta/correlation"]


def test_features_and_rows_of_the_classifier_equal_numpy(x64):
    """Six sites of each kind, so that a debiased CKA exists."""
    model, params = oracles.tiny_model("llama-tied")
    rng = np.random.default_rng(3)
    moved = jax.tree.map(lambda x: x + 0.2 * jnp.asarray(rng.standard_normal(x.shape)), params)
    tokens = jnp.asarray(rng.integers(0, oracles.VOCAB, (12, 5)), jnp.int32)
    n = jnp.arange(12, dtype=jnp.int32)
    sites = Sites(tokens, jnp.ones((12, 5), bool), n, n % 5, tokens[:, 0], n < 6)
    start = site_state(model, params, sites)
    found = measure_state(model, moved, sites, start, start).scalars

    features = lambda p: np.asarray(
        jax.jit(model.features)(p["backbone"], tokens, sites.mask)[n, n % 5]
    )
    for kind, rows in (("prompt", slice(0, 6)), ("completion", slice(6, 12))):
        x, y = features(moved)[rows], features(params)[rows]
        values = np.linalg.svd(x, compute_uv=False) ** 2
        p = values / values.sum()
        rank, ratio = np.exp(-(p * np.log(p)).sum()), 1 / (p**2).sum()
        np.testing.assert_allclose(found[f"features/{kind}/effective_rank"], rank, rtol=1e-9)
        np.testing.assert_allclose(found[f"features/{kind}/participation_ratio"], ratio, rtol=1e-9)
        cka = found[f"features/{kind}/cka_to_start"]
        grams = [jnp.asarray(z @ z.T) for z in (x, y)]
        np.testing.assert_allclose(cka, float(kernels.debiased_cka(*grams)), rtol=1e-9)
        assert cka < 0.99
    norms = [np.linalg.norm(p["backbone"]["embed"]["embedding"], axis=1) for p in (moved, params)]
    wanted = norms[0].mean(), norms[0].std(), norms[0].max()
    got = [found[f"classifier/row_norm_{name}"] for name in ("mean", "std", "max")]
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    change = np.sqrt(((norms[0] - norms[1]) ** 2).mean())
    np.testing.assert_allclose(found["classifier/row_norm_change"], change, rtol=1e-12)
    still = measure_state(model, params, sites, start, start).scalars
    assert still["classifier/row_norm_change"] == 0
    np.testing.assert_allclose(still["features/prompt/cka_to_start"], 1, rtol=1e-12)


def test_fewer_than_four_sites_of_a_kind_have_no_cka():
    model, params = oracles.tiny_model("gpt2-tied", jnp.float32)
    sites = oracles.tiny_sites()
    start = site_state(model, params, sites)
    scalars = measure_state(model, params, sites, start, start).scalars
    assert "features/prompt/effective_rank" in scalars
    assert not [key for key in scalars if "cka" in key]


def test_a_classifiers_adapter_counts_and_the_callers_numbers_stay():
    model, params = oracles.adapted_model("gpt_neox-untied", jnp.float32)
    params = jax.tree.map(np.array, params)
    before = jax.tree.map(np.copy, params)
    sites = oracles.tiny_sites()
    start = site_state(model, params, sites)
    found = measure_state(model, params, sites, start, start).scalars
    jax.tree.map(np.testing.assert_array_equal, params, before)
    head = before["classifier"]
    whole = head["weight"] + model.config.lora_scale * head["lora_b"] @ head["lora_a"]
    np.testing.assert_allclose(found["classifier/norm"], np.linalg.norm(whole), rtol=1e-5)
    assert abs(np.linalg.norm(head["weight"]) / np.linalg.norm(whole) - 1) > 1e-3


@pytest.mark.parametrize(
    "field, value", [("every", -1), ("num_prompts", 1), ("sites_per_completion", -2)]
)
def test_a_probe_out_of_range_is_named(field, value):
    with pytest.raises(JaxdynError, match=f"probe.{field}.*{value}"):
        ProbeConfig(**{field: value})
