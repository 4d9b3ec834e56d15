"""Propagation and kernels of low-rank adapters, against full Jacobians and real updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from jaxdyn.dynamics import delta_logits
from jaxdyn.kernels import (
    adam_preconditioner,
    apply_kernel,
    log_prob_kernel,
    sketch_gradients,
    trace_kernel,
    update_kernel,
)
from jaxdyn.types import JaxdynError

PARTS = ("representation", "gradient", "cross")
once = functools.partial(
    jax.jit,
    static_argnums=0,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def of_adapters(tree, function):
    """`function` of the adapters' leaves, zero elsewhere."""
    is_adapter = lambda path: path[-1].key in ("lora_a", "lora_b")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: function(x) if is_adapter(path) else jnp.zeros_like(x), tree
    )


def random_update(params, seed=5):
    rng = np.random.default_rng(seed)
    return of_adapters(params, lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype))


@once
def split_and_actual(model, params, delta, size, sites):
    """For size · delta: Δf by component, the whole model's derivative, and the change."""
    logits = lambda params: oracles.site_logits(model, model.view(params), sites)
    delta = jax.tree.map(lambda x: size * x, delta)
    nothing = jnp.zeros_like(params["backbone"]["embed"]["embedding"])
    _, parts = delta_logits(model, params, delta, sites, nothing)
    before, derivative = jax.jvp(logits, (params,), (delta,))
    actual = logits(jax.tree.map(jnp.add, params, delta)) - before
    view = model.view(params)
    phi = model.features(view["backbone"], sites.tokens, sites.mask)[sites.rows, sites.positions]
    head, change, s = view["classifier"], delta["classifier"], model.config.lora_scale
    moved = change["lora_b"] @ head["lora_a"] + head["lora_b"] @ change["lora_a"]
    return parts, derivative, actual, s * phi @ moved.T


@pytest.mark.parametrize("name", ["gpt_neox-untied", "llama-tied"])
def test_split_is_exact_and_its_residual_shrinks_with_the_square_of_the_step(name, x64):
    """representation = s (δB A + B δA) φ, and with the gradient component it is the derivative of
    the logits along the adapters' update; halving the update quarters what is left."""
    model, params = oracles.adapted_model(name)
    delta, sizes, residuals = random_update(params), 1e-3 * 0.5 ** np.arange(4), []
    for size in sizes:
        parts, derivative, actual, through_head = split_and_actual(
            model, params, delta, size, oracles.tiny_sites()
        )
        scale = float(jnp.abs(derivative).max())
        np.testing.assert_allclose(parts.representation, through_head, atol=1e-12 * scale)
        np.testing.assert_allclose(parts.total, derivative, atol=1e-12 * scale)
        assert float(jnp.abs(parts.gradient).max()) > 0.1 * scale
        assert not parts.cross.any()
        residuals.append(float(jnp.linalg.norm(actual - parts.total)))
    slope = np.polyfit(np.log(sizes), np.log(residuals), 1)[0]
    # The cubic term adds about size · |f'''/f''| to the slope; sizes are at most 1e-3.
    assert abs(slope - 2) < 0.01


@once
def lora_theta(model, params, sites):
    """Θ [N, V, N, V] of the adapters alone, by part of the model: full Jacobians, contracted."""
    jacobian = jax.jacrev(lambda p: oracles.site_logits(model, model.view(p), sites))(params)
    n = len(sites.rows)

    def kernel(part):
        leaves = [
            x.reshape(n, oracles.VOCAB, -1)
            for path, x in jax.tree_util.tree_leaves_with_path(jacobian[part])
            if path[-1].key in ("lora_a", "lora_b")
        ]
        j = jnp.concatenate(leaves, axis=-1)
        return jnp.einsum("nvp,mwp->nvmw", j, j)

    found = {"representation": kernel("classifier"), "gradient": kernel("backbone")}
    return {**found, "cross": jnp.zeros_like(found["gradient"])}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox-untied", "llama-tied"])
def test_kernels_of_adapters_have_p_zero_at_what_is_frozen(name, x64):
    """Θ v, and gᵀ Θ g of pairs of sites, by component."""
    model, params = oracles.adapted_model(name)
    sites = oracles.tiny_sites()
    theta = lora_theta(model, params, sites)
    p = of_adapters(params, jnp.ones_like)
    g = jnp.asarray(np.random.default_rng(2).standard_normal((5, oracles.VOCAB)))
    applied = apply_kernel(model, params, sites, g, preconditioner=p)
    pairs = update_kernel(model, params, sites, cotangents_a=g, preconditioner=p)
    for part in PARTS:
        for got, spec, fields in (
            (applied, "nvmw,mw->nv", (g,)),
            (pairs, "nvmw,nv,mw->nm", (g, g)),
        ):
            wanted = np.einsum(spec, theta[part], *fields)
            scale = max(np.abs(wanted).max(), 1.0)
            np.testing.assert_allclose(getattr(got, part), wanted, rtol=0, atol=1e-11 * scale)


@once
def adapters_gradient(model, params, g, sites):
    """∇ Σ_n g_nᵀ f(s_n) of the adapters, zero elsewhere."""
    pull = jax.vjp(lambda p: oracles.site_logits(model, p, sites), params)[1]
    return of_adapters(pull(g)[0], lambda x: x)


@pytest.mark.slow
def test_an_update_of_adapters_is_their_kernel_times_the_cotangents(x64):
    """Δf = η Σ_u Θ(s, s_u) g_u by component, in the plain metric and in that of Adam's state."""
    model, params = oracles.adapted_model("gpt_neox-untied")
    sites = oracles.tiny_sites()
    g = jnp.asarray(np.random.default_rng(2).standard_normal((5, oracles.VOCAB)))
    gradient = adapters_gradient(model, params, g, sites)

    # Adam's state holds the moving leaves alone, as a run's does: here those of the classifier.
    adam = optax.scale_by_adam()
    moving = {name: gradient["classifier"][name] for name in ("lora_a", "lora_b")}
    p = adam_preconditioner({"classifier": adam.update(moving, adam.init(moving))[1]}, params)
    assert not any(np.any(x) for x in jax.tree.leaves(p["backbone"]))
    assert not np.any(p["classifier"]["weight"]) and np.all(p["classifier"]["lora_b"] > 0)

    for metric in (of_adapters(params, jnp.ones_like), p):
        step = jax.tree.map(lambda x, p: 0.1 * x * p, gradient, metric)
        moved = once(delta_logits)(model, params, step, sites)[1]
        applied = apply_kernel(model, params, sites, 0.1 * g, preconditioner=metric)
        for part in PARTS:
            wanted = getattr(moved, part)
            scale = max(float(jnp.abs(wanted).max()), 1.0)
            np.testing.assert_allclose(getattr(applied, part), wanted, atol=1e-11 * scale)


def test_a_metric_that_moves_adapters_alone_forms_no_other_gradient(x64):
    """Within a budget that the whole gradients exceed; against the Jacobian of log π."""
    model, params = oracles.adapted_model("llama-tied", jnp.float64)
    sites = oracles.tiny_sites()
    metric = of_adapters(params, lambda x: 0.5 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape))

    def log_probs(params):
        logits = oracles.site_logits(model, model.view(params), sites)
        return jax.nn.log_softmax(logits)[jnp.arange(len(logits)), sites.targets]

    jacobian = once(lambda _, params: jax.jacrev(log_probs)(params))(None, params)
    flat = lambda tree: np.concatenate(
        [np.asarray(x).reshape(len(sites.rows), -1) for x in jax.tree.leaves(tree)], axis=1
    )
    rows = flat(jacobian)
    one = jax.tree.map(lambda p: jnp.broadcast_to(p, (len(sites.rows), *p.shape)), metric)
    wanted = (rows * flat(one)) @ rows.T
    bytes_moved = 8 * sum(int((p != 0).sum()) for p in jax.tree.leaves(metric)) * len(sites.rows)
    given = {"preconditioner": metric, "memory_budget": bytes_moved}
    found = log_prob_kernel(model, params, sites, **given).total
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11 * np.abs(wanted).max())
    with pytest.raises(JaxdynError, match=f"holds {bytes_moved} bytes .* is {bytes_moved - 1}"):
        less = bytes_moved - 1
        given |= {"memory_budget": less, "method": "plain"}
        log_prob_kernel(model, params, sites, **given)


def test_engines_without_a_form_for_adapters_say_so():
    model, params = oracles.adapted_model("gpt_neox-untied", jnp.float32)
    sites = oracles.tiny_sites()
    for refused in (
        lambda: log_prob_kernel(model, params, sites, method="gram"),
        lambda: trace_kernel(model, params, sites),
        lambda: sketch_gradients(model, params, sites, jax.random.key(0)),
    ):
        with pytest.raises(JaxdynError, match="merge_adapters gives the same function") as error:
            refused()
        assert "\n" not in str(error.value)
