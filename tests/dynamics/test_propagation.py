"""First-order propagation against full Jacobians, the model's own derivative, and real updates."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn.dynamics import delta_logits, measure_update, propagate

PARTS = ("representation", "gradient", "cross")


def gradient_by_path(model, params, sites, cotangents):
    """∇θ Σ_n g_nᵀ f(s_n) of the untied view."""
    view = model.view(params)
    _, pull = jax.vjp(lambda v: oracles.site_logits(model, v, sites), view)
    return pull(cotangents)[0]


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


@pytest.mark.parametrize("name", oracles.CONFIGS)
def test_components_are_the_kernels_times_the_logit_gradients(name, x64):
    """Δf = η Σ_u Θ(s_o, s_u) g_u, component by component, for one plain gradient step."""
    model, params = oracles.tiny_model(name)
    sites = oracles.tiny_sites()
    g = jnp.asarray(np.random.default_rng(2).standard_normal((5, oracles.VOCAB)))
    eta = 0.1
    step = jax.tree.map(lambda x: eta * x, gradient_by_path(model, params, sites, g))
    head_share = None
    if model.config.tied:
        head_share = step["classifier"]["weight"]
        step = model.view(model.fold(step))
    _, parts = delta_logits(model, model.view(params), step, sites, head_share)
    kernels = oracles.component_kernels(model, params, sites)
    for part in PARTS:
        expected = eta * jnp.einsum("nvmw,mw->nv", kernels[part], g)
        scale = max(float(jnp.abs(expected).max()), 1.0)
        np.testing.assert_allclose(getattr(parts, part), expected, atol=1e-11 * scale)
    assert (float(jnp.abs(parts.cross).max()) > 0) == model.config.tied


@pytest.mark.parametrize("name", oracles.CONFIGS)
def test_split_sums_to_the_derivative_of_log_probs_along_any_update(name, x64):
    model, params = oracles.tiny_model(name)
    sites = oracles.tiny_sites()
    delta = random_like(params, 3)
    head_share = random_like(params["backbone"]["embed"]["embedding"], 4)

    def log_probs(params):
        return jax.nn.log_softmax(oracles.site_logits(model, model.view(params), sites))

    _, expected = jax.jvp(log_probs, (params,), (delta,))
    share = head_share if model.config.tied else None
    parts = propagate(model, model.view(params), model.view(delta), sites, share)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(parts.total, expected, atol=1e-12 * scale)


def test_a_classifier_bias_belongs_to_the_representation_component(x64):
    import dataclasses

    model, params = oracles.tiny_model("gpt_neox-untied")
    model = dataclasses.replace(
        model, config=dataclasses.replace(model.config, classifier_bias=True)
    )
    bias = jnp.linspace(-1.0, 1.0, oracles.VOCAB)
    params = {**params, "classifier": {**params["classifier"], "bias": bias}}
    still = jax.tree.map(jnp.zeros_like, params)
    delta = {**still, "classifier": {**still["classifier"], "bias": 2 * bias}}
    _, parts = delta_logits(model, params, delta, oracles.tiny_sites())
    np.testing.assert_allclose(parts.representation, np.tile(2 * bias, (5, 1)), atol=1e-14)
    assert float(jnp.abs(parts.gradient).max()) == 0.0


@pytest.mark.parametrize("name", oracles.CONFIGS)
def test_residual_shrinks_with_the_square_of_the_step(name, x64):
    """Halving the step quarters actual − predicted; the slope on a log–log plot is 2."""
    model, params = oracles.tiny_model(name)
    sites = oracles.tiny_sites()
    view, direction = model.view(params), random_like(params, 5)
    share = random_like(params["backbone"]["embed"]["embedding"], 6)
    sizes = 1e-3 * 0.5 ** np.arange(4)

    def residual(size):
        delta = jax.tree.map(lambda x: size * x, direction)
        after = jax.tree.map(jnp.add, params, delta)
        head_share = size * share if model.config.tied else None
        predicted = propagate(model, view, model.view(delta), sites, head_share).total
        log_probs = lambda v: jax.nn.log_softmax(oracles.site_logits(model, v, sites))
        actual = log_probs(model.view(after)) - log_probs(view)
        return float(jnp.linalg.norm(actual - predicted))

    slope = np.polyfit(np.log(sizes), np.log([residual(s) for s in sizes]), 1)[0]
    # The next term adds about 2·size·|f'''/f''| to the slope; sizes are below 1e-3.
    assert abs(slope - 2) < 0.02


@pytest.mark.parametrize("name", ["gpt_neox-untied", "llama-tied"])
def test_measured_update_in_float32_agrees_with_float64(name):
    """Sums of a few hundred products: relative error below 1e-4 of the largest entry."""
    with jax.enable_x64(True):
        model, params = oracles.tiny_model(name)
        delta = jax.tree.map(lambda x: 1e-2 * x, random_like(params, 7))
        after = jax.tree.map(jnp.add, params, delta)
        share = 1e-2 * random_like(params["backbone"]["embed"]["embedding"], 8)
        share = share if model.config.tied else None
        sites = oracles.tiny_sites()
        exact = propagate(model, model.view(params), model.view(delta), sites, share)
        wide = {part: np.asarray(getattr(exact, part)) for part in PARTS}
        total = np.asarray(exact.total)
    narrow = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), tree)
    model32, _ = oracles.tiny_model(name, jnp.float32)
    scalars, arrays = measure_update(
        model32,
        model32.view(narrow(params)),
        model32.view(narrow(after)),
        oracles.tiny_sites(),
        None if share is None else narrow(share),
    )
    targets = np.asarray(oracles.tiny_sites().targets)
    scale = np.abs(total).max()
    for part in PARTS:
        picked = wide[part][np.arange(5), targets]
        np.testing.assert_allclose(arrays[part], picked, atol=1e-4 * scale)
        expected = np.sum(wide[part] * total) / np.sum(total**2)
        assert abs(scalars[f"share/{part}"] - expected) < 1e-4
    shares = [scalars[f"share/{part}"] for part in PARTS]
    assert abs(sum(shares) - 1) < 1e-5


def test_squeezing_a_linear_softmax(x64):
    """Pushing an unlikely token down moves the mass to the likeliest one, and the kernel says so.

    With fixed features only the representation component exists: Δf = η ⟨φ, φ'⟩ A (e_y − π).
    """
    logits = jnp.array([3.0, 1.0, 0.0, -2.0])
    pi = jax.nn.softmax(logits)
    unlikely = jnp.eye(4)[3]
    step = -0.5 * (unlikely - pi)
    after = jax.nn.softmax(logits + step)
    assert int(jnp.argmax(after - pi)) == int(jnp.argmax(pi))
