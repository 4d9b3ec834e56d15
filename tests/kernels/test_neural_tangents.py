"""neural-tangents on today's jax, against full Jacobians contracted by hand."""

import functools
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn import kernels
from jaxdyn.kernels.neural_tangents import ApplyFn, empirical_ntk_fn, load, site_prefixes
from jaxdyn.types import JaxdynError

IMPLEMENTATIONS = (
    "JACOBIAN_CONTRACTION",
    "NTK_VECTOR_PRODUCTS",
    "STRUCTURED_DERIVATIVES",
    "AUTO",
)


@pytest.fixture(scope="module")
def nt():
    return load()


@pytest.fixture(autouse=True)
def its_own_habits():
    """neural-tangents promotes ranks, and warns of primitives it has no shortcut for."""
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No Jacobian rule found")
        yield


def test_load_imports_no_tensorflow_and_leaves_jax_as_it_was():
    program = """
        import sys
        import jax, jax.interpreters.ad, jax.numpy as jnp
        from jaxdyn.kernels import neural_tangents
        watched = jax, jax.core, jax.interpreters, jax.interpreters.ad
        before = [dict(vars(module)) for module in watched]
        modules = {"jax.core", "jax.util", "jax.interpreters.ad"}
        held = {name: sys.modules.get(name) for name in modules}
        assert "neural_tangents" not in sys.modules

        nt = neural_tangents.load()
        f = lambda params, x: x @ params
        kernel = nt.empirical_ntk_fn(f)(jnp.eye(2), None, jnp.ones((2, 3)))
        assert kernel.tolist() == [[1, 0], [0, 1]], kernel

        assert neural_tangents.load() is nt
        import neural_tangents as again
        assert again is nt
        assert nt.__version__ == "0.6.5"
        for module, names in zip(watched, before):
            for name, value in names.items():
                assert vars(module)[name] is value, (module, name)
            added = [name for name in vars(module) if name not in names]
            assert all(f"{module.__name__}.{name}" in sys.modules for name in added), added
        assert held == {name: sys.modules.get(name) for name in modules}
        assert "neural_tangents.experimental" not in sys.modules
        assert not hasattr(nt, "experimental")
        assert not [name for name in sys.modules if name.startswith(("tensorflow", "tf2jax"))]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_a_failed_import_before_does_no_harm():
    """What it leaves half imported is imported again."""
    program = """
        import sys, types
        stale = types.ModuleType("neural_tangents._src.utils")
        stale.__path__ = []
        sys.modules[stale.__name__] = stale
        from jaxdyn.kernels.neural_tangents import load
        load()
        assert sys.modules[stale.__name__] is not stale
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_an_import_that_fails_says_why_and_cleans_up(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "neural_tangents"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "frozendict", None)  # one of its dependencies is missing
    core, vector = jax.core, sys.modules["jax.core"]
    with pytest.raises(JaxdynError, match=rf"cannot be imported on jax {jax.__version__}.*frozend"):
        load()
    assert jax.core is core and sys.modules["jax.core"] is vector
    assert "neural_tangents.experimental" not in sys.modules


# -- our models -----------------------------------------------------------------------------------


def test_prefixes_hold_the_tokens_up_to_the_site():
    sites = oracles.tiny_sites()
    tokens = np.asarray(sites.tokens)
    expected = np.full((5, 6), -1)
    expected[0, :3] = tokens[0, :3]
    expected[1] = tokens[0]
    expected[2, 2:4] = tokens[1, 2:4]
    expected[3, 1:2] = tokens[2, 1:2]
    expected[4, 1:5] = tokens[2, 1:5]
    np.testing.assert_array_equal(site_prefixes(sites), expected)


@pytest.mark.parametrize("name", ["gpt_neox-untied", "llama-tied"])
def test_the_function_gives_the_logits_at_the_sites(name, x64):
    model, params = oracles.tiny_model(name)
    sites = oracles.tiny_sites()
    got = jax.jit(ApplyFn(model))(params, site_prefixes(sites))
    want = jax.jit(lambda view: oracles.site_logits(model, view, sites))(model.view(params))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def model_kernel(nt, name, implementation, trace_axes):
    """neural-tangents' kernel of a tiny model, and the sum of the oracle's components."""
    model, params = oracles.tiny_model(name)
    sites = oracles.tiny_sites()
    kernel_fn = nt.empirical_ntk_fn(
        ApplyFn(model),
        trace_axes=trace_axes,
        vmap_axes=0,
        implementation=nt.NtkImplementation[implementation],
    )
    got = jax.jit(kernel_fn)(site_prefixes(sites), None, params)
    return got, theta_of(name)


@functools.cache
def theta_of(name):
    """The sum of the oracle's components, in float64."""
    model, params = oracles.tiny_model(name)
    parts = jax.jit(lambda p: oracles.component_kernels(model, p, oracles.tiny_sites()))(params)
    return parts["representation"] + parts["gradient"] + parts["cross"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-untied"])
def test_ntk_vector_products_agree_and_a_trace_is_divided_by_the_vocabulary(name, nt, x64):
    got, theta = model_kernel(nt, name, "NTK_VECTOR_PRODUCTS", (-1,))
    np.testing.assert_allclose(
        got, jnp.einsum("nvmv->nm", theta) / oracles.VOCAB, rtol=1e-9, atol=1e-11
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-tied"])
def test_structured_derivatives_of_scanned_layers(name, nt, x64):
    got, theta = model_kernel(nt, name, "STRUCTURED_DERIVATIVES", (-1,))
    np.testing.assert_allclose(
        got, jnp.einsum("nvmv->nm", theta) / oracles.VOCAB, rtol=1e-9, atol=1e-11
    )


def test_linearize_is_the_first_order_expansion(nt, x64):
    model, params = oracles.tiny_model("gpt2-tied")
    x = site_prefixes(oracles.tiny_sites())
    rng = np.random.default_rng(3)
    step = jax.tree.map(lambda p: jnp.asarray(0.1 * rng.standard_normal(p.shape)), params)
    f = ApplyFn(model)
    value, tangent = jax.jit(lambda p, d: jax.jvp(lambda p: f(p, x), (p,), (d,)))(params, step)
    got = jax.jit(nt.linearize(f, params))(jax.tree.map(jnp.add, params, step), x)
    # the step comes back from a subtraction of parameters near 1
    np.testing.assert_allclose(got, value + tangent, rtol=1e-10, atol=1e-12)
    assert np.abs(tangent).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-tied"])
def test_our_kernels_answer_to_its_signature(name, x64):
    model, params = oracles.tiny_model(name)
    sites = oracles.tiny_sites()
    x = site_prefixes(sites)
    theta = theta_of(name)
    trace = jnp.einsum("nvmv->nm", theta) / oracles.VOCAB
    got = empirical_ntk_fn(ApplyFn(model))(x[:2], x[1:], params)
    np.testing.assert_allclose(got, trace[:2, 1:], rtol=1e-9, atol=1e-11)
    whole = empirical_ntk_fn(ApplyFn(model), trace_axes=(), vmap_axes=0)(x, None, params)
    np.testing.assert_allclose(whole, theta.transpose(0, 2, 1, 3), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-tied"])
def test_the_sums_of_our_components_are_its_kernel(name, nt, x64):
    """Five sites in three sequences, padded on either side; no oracle of ours in between."""
    model, params = oracles.tiny_model(name)
    sites = oracles.tiny_sites()
    x = site_prefixes(sites)
    kernel_fn = nt.empirical_ntk_fn(ApplyFn(model), trace_axes=(), vmap_axes=0)
    theta = np.asarray(jax.jit(kernel_fn)(x, None, params))  # [N, N, V, V]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)

    trace = kernels.trace_kernel(model, params, sites, mean=True)
    close(trace.total, np.trace(theta, axis1=2, axis2=3) / oracles.VOCAB)
    tokens = [7, 2]
    block = kernels.token_block(model, params, sites, token_ids=tokens, method="gram")
    close(block.total, theta[:, :, tokens][..., tokens])
    pi = jax.nn.softmax(jax.jit(ApplyFn(model))(params, x))
    score = np.eye(oracles.VOCAB)[np.asarray(sites.targets)] - np.asarray(pi)
    found = kernels.log_prob_kernel(model, params, sites, method="gram")
    close(found.total, np.einsum("nv,nmvw,mw->nm", score, theta, score))
    assert bool(found.cross.any()) == model.config.tied


def test_our_kernels_refuse_other_axes_and_other_functions():
    model, _ = oracles.tiny_model("gpt2-tied", jnp.float32)
    with pytest.raises(JaxdynError, match="must be an ApplyFn"):
        empirical_ntk_fn(lambda params, x: x)
    for axes in ({"trace_axes": (0,)}, {"diagonal_axes": (-1,)}, {"vmap_axes": 1}):
        with pytest.raises(JaxdynError, match="trace_axes must be"):
            empirical_ntk_fn(ApplyFn(model), **axes)


# -- toy functions --------------------------------------------------------------------------------


def toy(params, x):
    """Two outputs of a layer with a bias, a reshape, a scale used twice and a softmax."""
    hidden = jnp.tanh(x @ params["w"] + params["b"]).reshape(-1, 2, 3).sum(axis=1) * params["s"]
    return jnp.concatenate([hidden * params["s"], jax.nn.softmax(hidden @ params["v"])], axis=1)


def toy_inputs():
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    return {"w": draw(4, 6), "b": draw(6), "s": draw(3), "v": draw(3, 2)}, draw(3, 4), draw(2, 4)


def full_kernel(f, params, x1, x2):
    def jacobian(x):
        leaves = jax.tree.leaves(jax.jacrev(f)(params, x))
        return jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=-1)

    outer = lambda x1, x2: jnp.einsum("nvp,mwp->nmvw", jacobian(x1), jacobian(x2))
    return jax.jit(outer)(x1, x2)


WAYS = [(name, 0, True) for name in IMPLEMENTATIONS]
WAYS += [("JACOBIAN_CONTRACTION", None, True), ("STRUCTURED_DERIVATIVES", None, True)]
WAYS += [("NTK_VECTOR_PRODUCTS", 0, False), ("AUTO", 0, False)]


@pytest.mark.parametrize(("implementation", "vmap_axes", "compiled"), WAYS)
def test_every_implementation_on_two_batches(implementation, vmap_axes, compiled, nt, x64):
    params, x1, x2 = toy_inputs()
    kernel_fn = nt.empirical_ntk_fn(
        toy,
        trace_axes=(),
        vmap_axes=vmap_axes,
        implementation=nt.NtkImplementation[implementation],
    )
    got = (jax.jit(kernel_fn) if compiled else kernel_fn)(x1, x2, params)
    np.testing.assert_allclose(got, full_kernel(toy, params, x1, x2), rtol=1e-11, atol=1e-12)


def scanned(params, x):
    step = lambda h, _: (jnp.tanh(h @ params["w"][:, :4]), h.sum(axis=1))
    last, sums = jax.lax.scan(step, x, None, length=2)
    return last + sums.sum(axis=0)[:, None]


def structured_cases():
    square = jax.custom_vjp(lambda x: x**2)
    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    return {
        "scan": scanned,
        "remat": jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T),
        "custom": lambda p, x: square(x @ p["w"]),
        "embedding": lambda p, x: p["w"][jnp.argmax(x, axis=1)] * p["b"],
        "sorted": lambda p, x: jnp.sort(x @ p["w"], axis=1),
        "no parameter": lambda p, x: x,
    }


@pytest.mark.parametrize("case", structured_cases())
def test_structured_derivatives_of_control_flow_and_calls(case, nt, x64):
    f = structured_cases()[case]
    params, x1, x2 = toy_inputs()
    kernel_fn = nt.empirical_ntk_fn(
        f,
        trace_axes=(),
        vmap_axes=0,
        implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    )
    want = full_kernel(f, params, x1, x2)
    got = jax.jit(kernel_fn)(x1, x2, params)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def two_outputs(params, x):
    hidden, out = jax.checkpoint(lambda w: (jnp.tanh(x @ w), x @ w))(params["w"])
    return hidden + out


def test_what_structured_derivatives_cannot_follow_is_named_and_auto_goes_without(nt, x64):
    params, x1, _ = toy_inputs()
    make = lambda name: nt.empirical_ntk_fn(
        two_outputs, trace_axes=(), vmap_axes=0, implementation=nt.NtkImplementation[name]
    )
    with pytest.raises(JaxdynError, match=r"STRUCTURED_DERIVATIVES cannot follow .*2 outputs"):
        make("STRUCTURED_DERIVATIVES")(x1, None, params)
    want = full_kernel(two_outputs, params, x1, x1)
    np.testing.assert_allclose(make("AUTO")(x1, None, params), want, rtol=1e-11, atol=1e-12)


def test_auto_takes_the_fewest_flops(nt, capsys, x64):
    """It prints what it compares."""
    params, x1, _ = toy_inputs()
    auto = nt.NtkImplementation.AUTO
    nt.empirical_ntk_fn(toy, trace_axes=(), vmap_axes=0, implementation=auto)(x1, None, params)
    flops = [float(line.rpartition("=")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(flops) == 3
    assert all(np.isfinite(flops)) and min(flops) > 0


def test_predict_batch_and_stax(nt, x64):
    """Gradient flow on the NTK's own linear model, its kernel computed in tiles."""
    params, x1, _ = toy_inputs()
    x1 = jnp.concatenate([x1, -x1[:1]])
    kernel_fn = nt.empirical_ntk_fn(toy, trace_axes=(), vmap_axes=0)
    kernel = nt.batch(kernel_fn, batch_size=2, device_count=0)(x1, None, params)
    np.testing.assert_allclose(kernel, full_kernel(toy, params, x1, x1), rtol=1e-11, atol=1e-12)
    target, start = jnp.ones((4, 5)), toy(params, x1)
    predict = nt.predict.gradient_descent_mse(kernel, target, trace_axes=())
    got, _ = predict(2.0, start, jnp.zeros_like(start), kernel)
    # d/dt f = -K (f - y) / (N O)
    matrix = kernel.transpose(0, 2, 1, 3).reshape(20, 20) / 20
    decay = jax.scipy.linalg.expm(-2.0 * matrix)
    want = target + (decay @ (start - target).ravel()).reshape(4, 5)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)
    _, _, analytic = nt.stax.serial(nt.stax.Dense(8), nt.stax.Relu(), nt.stax.Dense(1))
    one = analytic(x1, None, "ntk")
    # Two layers of a unit-variance Dense: K = |x|²/d, and a ReLU halves it: Θ = K/2 + K/2.
    # Its arc cosine of a correlation of 1 is good to half the digits.
    np.testing.assert_allclose(jnp.diagonal(one), (x1**2).mean(axis=1), rtol=1e-7)
