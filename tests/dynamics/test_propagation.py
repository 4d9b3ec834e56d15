"""First-order propagation against full Jacobians, the model's own derivative, and real updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn.dynamics import delta_logits, measure_update, propagate

PARTS = ("representation", "gradient", "cross")
# These programs run once or a few times on tiny arrays: compiling them is what takes time.
once = functools.partial(
    jax.jit,
    static_argnums=0,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def gradient_by_path(model, params, sites, cotangents):
    """∇θ Σ_n g_nᵀ f(s_n) of the untied view."""
    view = model.view(params)
    _, pull = jax.vjp(lambda v: oracles.site_logits(model, v, sites), view)
    return pull(cotangents)[0]


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


@once
def one_step(model, params, sites, g, eta):
    """Predicted Δf by component of a plain gradient step, and the kernels times g."""
    step = jax.tree.map(lambda x: eta * x, gradient_by_path(model, params, sites, g))
    head_share = None
    if model.config.tied:
        head_share = step["classifier"]["weight"]
        step = model.fold(step)
    _, parts = delta_logits(model, params, step, sites, head_share)
    kernels = oracles.component_kernels(model, params, sites)
    return parts, {part: eta * jnp.einsum("nvmw,mw->nv", kernels[part], g) for part in PARTS}


@pytest.mark.parametrize("name", ["gpt_neox-untied", "gpt2-tied"])
def test_components_are_the_kernels_times_the_logit_gradients(name, x64):
    """Δf = η Σ_u Θ(s_o, s_u) g_u, component by component, for one plain gradient step."""
    model, params = oracles.tiny_model(name)
    g = jnp.asarray(np.random.default_rng(2).standard_normal((5, oracles.VOCAB)))
    parts, expected = one_step(model, params, oracles.tiny_sites(), g, 0.1)
    for part in PARTS:
        scale = max(float(jnp.abs(expected[part]).max()), 1.0)
        np.testing.assert_allclose(getattr(parts, part), expected[part], atol=1e-11 * scale)
    assert (float(jnp.abs(parts.cross).max()) > 0) == model.config.tied


@once
def first_order_and_actual(model, params, delta, head_share, sites, size):
    """For the update size · delta: the split, the derivative of log π along it, the change."""

    def log_probs(params):
        return jax.nn.log_softmax(oracles.site_logits(model, model.view(params), sites))

    delta = jax.tree.map(lambda x: size * x, delta)
    head_share = size * head_share if model.config.tied else None
    parts = propagate(model, params, delta, sites, head_share)
    before, derivative = jax.jvp(log_probs, (params,), (delta,))
    actual = log_probs(jax.tree.map(jnp.add, params, delta)) - before
    return parts, derivative, actual


@pytest.mark.parametrize("name", oracles.CONFIGS)
def test_split_is_exact_and_its_residual_shrinks_with_the_square_of_the_step(name, x64):
    """The parts sum to the derivative of log π along any update, and halving the step quarters
    actual − predicted: the slope on a log–log plot is 2."""
    model, params = oracles.tiny_model(name)
    delta = random_like(params, 5)
    share = random_like(params["backbone"]["embed"]["embedding"], 6)
    sizes = 1e-3 * 0.5 ** np.arange(4)
    residuals = []
    for size in sizes:
        parts, derivative, actual = first_order_and_actual(
            model, params, delta, share, oracles.tiny_sites(), size
        )
        scale = float(jnp.abs(derivative).max())
        np.testing.assert_allclose(parts.total, derivative, atol=1e-12 * scale)
        residuals.append(float(jnp.linalg.norm(actual - parts.total)))
    slope = np.polyfit(np.log(sizes), np.log(residuals), 1)[0]
    # The next term adds about 2·size·|f'''/f''| to the slope; sizes are below 1e-3.
    assert abs(slope - 2) < 0.02


@once
def by_role(model, params, delta, sites):
    """The split without a head share, the derivative of f along the whole, and along E's roles."""
    logits = lambda params: oracles.site_logits(model, model.view(params), sites)
    _, parts = delta_logits(model, params, delta, sites)
    whole = jax.jvp(logits, (params,), (delta,))[1]

    def roles(classifier, backbone):
        view = {"classifier": classifier, "backbone": backbone}
        return oracles.site_logits(model, view, sites)

    view, change = model.view(params), model.view(delta)
    still = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    at, along = (view["classifier"], view["backbone"]), (change["classifier"], change["backbone"])
    head = jax.jvp(roles, at, (along[0], still(along[1])))[1]
    body = jax.jvp(roles, at, (still(along[0]), along[1]))[1]
    return parts, whole, head, body


@pytest.mark.parametrize(
    ("name", "adapted"), [("gpt_neox-untied", True), ("llama-tied", True), ("llama-tied", False)]
)
def test_without_a_head_share_the_split_is_by_role_and_sums_to_the_whole(name, adapted, x64):
    """Of stored parameters, with every leaf moving, adapters' too; a tied matrix's two roles."""
    model, params = (oracles.adapted_model if adapted else oracles.tiny_model)(name)
    parts, whole, head, body = by_role(model, params, random_like(params, 9), oracles.tiny_sites())
    scale = float(jnp.abs(whole).max())
    for got, wanted in ((parts.total, whole), (parts.representation, head), (parts.gradient, body)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12 * scale)
    assert not parts.cross.any()
    assert min(float(jnp.abs(x).max()) for x in (head, body)) > 0.1 * scale


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
    _, parts = once(delta_logits)(model, params, delta, oracles.tiny_sites())
    np.testing.assert_allclose(parts.representation, np.tile(2 * bias, (5, 1)), atol=1e-14)
    assert float(jnp.abs(parts.gradient).max()) == 0.0


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
        exact = once(propagate)(model, params, delta, sites, share)
        wide = {part: np.asarray(getattr(exact, part)) for part in PARTS}
        total = np.asarray(exact.total)
    narrow = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), tree)
    model32, _ = oracles.tiny_model(name, jnp.float32)
    found = measure_update(
        model32,
        narrow(params),
        narrow(after),
        oracles.tiny_sites(),
        None if share is None else narrow(share),
    )
    scalars, arrays = found.scalars, found.arrays
    targets = np.asarray(oracles.tiny_sites().targets)
    scale = np.abs(total).max()
    for part in PARTS:
        picked = wide[part][np.arange(5), targets]
        np.testing.assert_allclose(arrays[part], picked, atol=1e-4 * scale)
        expected = np.sum(wide[part] * total) / np.sum(total**2)
        assert abs(scalars[f"share/{part}"] - expected) < 1e-4
    shares = [scalars[f"share/{part}"] for part in PARTS]
    assert abs(sum(shares) - 1) < 1e-5
