"""Kernels in an optimizer's metric against D P Dᵀ of full Jacobians, and P against real steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import scipy
from kernel_oracles import (
    BIASED,
    A,
    B,
    all_sites,
    assert_components,
    kernels_by_kind,
    metric,
    random_cotangents,
    rollout,
    scalars,
    sequence_scalars,
    sequence_weights,
    some,
    theta,
    tiny_model,
    token_blocks,
    traces,
)

from jaxdyn import kernels
from jaxdyn.kernels import trace_probed
from jaxdyn.optim import OptimConfig, enter_stage, make_optimizer, trainable
from jaxdyn.types import JaxdynError

TWO = ["gpt2-tied", BIASED]
# Every architecture, half of them tied.
SLOW = ["llama-tied", "qwen2-untied"]
FOUR = [*TWO, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
CHOSEN = [7, 2]


# -- kernels in a metric --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
def test_log_prob_kernel_and_its_parts(name, x64):
    model, params = tiny_model(name)
    both = some(all_sites(), A), some(all_sites(), B)
    score = theta(name)[1]
    expected = scalars(name, score, A, B, preconditioned=True)
    by_kind = kernels_by_kind(name, score, A, B, preconditioned=True)
    for method in ("gram", "plain") if name in TWO else ("gram",):
        options = {"preconditioner": metric(name), "method": method}
        result = kernels.log_prob_kernel(model, params, *both, **options)
        assert_components(result, expected, 1e-9)
        assert result.representation_form == "diagonal"
        parts = kernels.update_kernel_by_part(model, params, *both, **options)
        assert parts.keys() == by_kind.keys()
        for kind, kernel in by_kind.items():
            np.testing.assert_allclose(parts[kind], kernel, rtol=0, atol=1e-9 * abs(kernel).max())


@pytest.mark.parametrize("name", TWO)
def test_update_kernel_with_the_metric_of_a_view(name, x64):
    """P may be shaped as the view, like the parameters."""
    model, params = tiny_model(name)
    view, p = model.view(params), model.view(metric(name))
    g = random_cotangents()
    options = {"cotangents_a": jnp.asarray(g), "method": "gram", "preconditioner": p}
    result = kernels.update_kernel(model, view, all_sites(), **options)
    assert_components(result, scalars(name, g, preconditioned=True), 1e-9)


@pytest.mark.parametrize(
    "name, method", [("gpt2-tied", "gram"), ("gpt2-tied", "plain"), (BIASED, "gram")]
)
def test_the_representation_of_a_token_block_is_a_diagonal_that_varies(name, method, x64):
    model, params = tiny_model(name)
    sites, p = all_sites(), metric(name)
    result = kernels.token_block(
        model, params, some(sites, A), some(sites, B), token_ids=CHOSEN, preconditioner=p,
        method=method,
    )  # fmt: skip
    assert_components(result, token_blocks(name, A, B, CHOSEN, preconditioned=True), 1e-9)
    features = jax.jit(model.features)(params["backbone"], sites.tokens, sites.mask)
    phi = np.asarray(features[sites.rows, sites.positions])
    head = jax.tree.map(lambda x: np.asarray(x)[CHOSEN], model.view(p)["classifier"])
    diagonal = np.einsum("kd,nd,md->nmk", head["weight"], phi[A], phi[B])
    diagonal += head.get("bias", np.zeros(2))
    expected = diagonal[..., None] * np.eye(2)
    scale = abs(expected).max()
    np.testing.assert_allclose(result.representation, expected, rtol=0, atol=1e-12 * scale)
    assert np.abs(diagonal[..., 0] - diagonal[..., 1]).max() > 0.1 * scale


@pytest.mark.parametrize("name", TWO)
def test_sequence_kernel(name, x64):
    model, params = tiny_model(name)
    weights = [sequence_weights(seed) for seed in (5, 6)]
    result = kernels.sequence_kernel(
        model, params, rollout(), rollout(), weights_a=jnp.asarray(weights[0]),
        weights_b=jnp.asarray(weights[1]), preconditioner=metric(name), method="gram",
    )  # fmt: skip
    assert_components(result, sequence_scalars(name, *weights, preconditioned=True), 1e-9)


@pytest.mark.parametrize("name", FOUR)
def test_trace_kernel(name, x64):
    model, params = tiny_model(name)
    both = some(all_sites(), A), some(all_sites(), B)
    result = kernels.trace_kernel(model, params, *both, preconditioner=metric(name))
    assert_components(result, traces(name, A, B, preconditioned=True), 1e-9)
    assert result.representation_form == "diagonal"


@pytest.mark.parametrize("name", TWO)
def test_trace_by_probes(name, x64, monkeypatch):
    """Probes whose second moments are the identity give the exact trace: 16 rows of signs."""
    signs = jnp.asarray(scipy.linalg.hadamard(16)[:, : oracles.VOCAB], jnp.float64)
    probes = lambda key, count, weight: (signs @ weight, signs)
    monkeypatch.setattr(trace_probed, "draw_probes", probes)
    model, params = tiny_model(name)
    result = kernels.trace_kernel(
        model, params, some(all_sites(), A), some(all_sites(), B), num_probes=16,
        key=jax.random.key(0), preconditioner=metric(name),
    )  # fmt: skip
    assert_components(result, traces(name, A, B, preconditioned=True), 1e-9)


def test_the_plain_trace(x64):
    model, params = tiny_model("gpt2-tied")
    sites = some(all_sites(), A)
    result = kernels.trace_kernel(
        model, params, sites, preconditioner=metric("gpt2-tied"), method="plain", mean=True
    )
    expected = traces("gpt2-tied", A, A, preconditioned=True)
    assert_components(result, {k: x / oracles.VOCAB for k, x in expected.items()}, 1e-9)


# -- P of a live optimizer ------------------------------------------------------------------------

RATE, DECAY, EPS = 1e-3, 0.99, 1e-6
ADAM = {"b2": DECAY, "eps": EPS}


@functools.cache
def programs(name):
    """The gradient of −Σ_n w_n log π(y_n), and the change of the log-probs along a direction."""
    model, _ = tiny_model(name)
    sites = all_sites()

    def log_probs(params):
        f = oracles.site_logits(model, model.view(params), sites)
        return jnp.take_along_axis(jax.nn.log_softmax(f), sites.targets[:, None], axis=1)[:, 0]

    loss_gradient = jax.jit(jax.grad(lambda params, w: -(w @ log_probs(params))))
    along = jax.jit(lambda params, direction: jax.jvp(log_probs, (params,), (direction,))[1])
    return loss_gradient, along


def three_steps(name, optimizer, state, parts):
    """Parameters and weights of the last of three steps, its gradient and direction, the state."""
    _, params = tiny_model(name)
    moving = {part: params[part] for part in parts}
    for seed in range(3):
        weights = jnp.asarray(np.random.default_rng(seed).standard_normal(8))
        before = {**params, **moving}
        gradient = {part: programs(name)[0](before, weights)[part] for part in parts}
        direction, state = optimizer.update(gradient, state, moving)
        moving = jax.tree.map(lambda x, d: x - RATE * d, moving, direction)
    return before, weights, gradient, direction, state


def whole_tree(name):
    """Plain optax.adamw, whose updates come with −η."""
    adamw = optax.adamw(RATE, b1=0.0, weight_decay=0.0, **ADAM)
    without_rate = optax.chain(adamw, optax.scale(-1 / RATE))
    params = tiny_model(name)[1]
    return three_steps(name, without_rate, without_rate.init(params), params)


def part_wise(name, stage):
    optimizer = make_optimizer(OptimConfig(b1=0.0, max_grad_norm=0.0, **ADAM))
    moving, _ = trainable(OptimConfig(), stage, tiny_model(name)[1])
    return three_steps(name, optimizer, enter_stage(optimizer, moving, None, False), moving)


@pytest.mark.parametrize(
    "name, steps",
    [
        ("gpt2-tied", whole_tree),
        ("gpt2-tied", functools.partial(part_wise, stage="joint")),
        (BIASED, functools.partial(part_wise, stage="classifier")),
    ],
    ids=["whole", "by part", "classifier only"],
)
def test_the_kernel_predicts_a_step_of_the_live_optimizer(name, steps, x64):
    """Without momentum a step is η P g, P at the second moments after it, to the last digits."""
    params, weights, gradient, direction, state = steps(name)
    p = kernels.adam_preconditioner(state, params, **ADAM)
    assert jax.tree.map(jnp.shape, p) == jax.tree.map(jnp.shape, params)
    for part, expected in direction.items():
        jax.tree.map(
            lambda x, r, g: np.testing.assert_allclose(x, r * g, rtol=1e-12),
            expected, p[part], gradient[part],
        )  # fmt: skip
    still = {part: tree for part, tree in p.items() if part not in direction}
    assert not any(x.any() for x in jax.tree.leaves(still))

    model, _ = tiny_model(name)
    sites = all_sites()
    kernel = kernels.log_prob_kernel(model, params, sites, preconditioner=p, method="plain")
    applied = jax.tree.map(jnp.zeros_like, params) | jax.tree.map(lambda x: -RATE * x, direction)
    change = programs(name)[1](params, applied)
    predicted = RATE * (kernel.total @ weights)
    np.testing.assert_allclose(predicted, change, rtol=0, atol=1e-9 * jnp.abs(change).max())
    assert bool(kernel.gradient.any()) == ("backbone" in direction)


def shrunk(tree):
    return jax.tree.map(lambda x: x[:1], tree)


def test_states_that_are_refused():
    params = {
        "backbone": {"kernel": jnp.zeros((3, 2))},
        "classifier": {"weight": jnp.zeros((3, 2))},
    }
    adam, parted = optax.adamw(RATE), make_optimizer(OptimConfig())
    stepped = lambda optimizer, tree: optimizer.update(tree, optimizer.init(tree), tree)[1]
    for state, message in [
        (optax.sgd(RATE, momentum=0.9).init(params), "holds no Adam moments"),
        (adam.init(params), "has taken no step"),
        (parted.init(params), "has taken no step"),
        (stepped(adam, shrunk(params)), "other shapes than .* another model"),
        (stepped(parted, shrunk(params)), "backbone have other shapes than .* another model"),
        (stepped(adam, params["backbone"]), "other shapes than .* another model"),
    ]:
        with pytest.raises(JaxdynError, match=message) as refused:
            kernels.adam_preconditioner(state, params)
        assert "\n" not in str(refused.value)


def test_metrics_that_are_refused():
    model, params = tiny_model("gpt2-tied", jnp.float32)
    ones = jax.tree.map(jnp.ones_like, params)
    negative = jax.tree.map(jnp.ones_like, params)
    layers = negative["backbone"]["layers"]
    layers["mlp"]["up"]["bias"] = layers["mlp"]["up"]["bias"].at[1, 2].set(-0.5)
    nan = jax.tree.map(jnp.ones_like, params)
    nan["backbone"]["norm"]["scale"] = nan["backbone"]["norm"]["scale"].at[0].set(jnp.nan)
    for p, message in [
        (shrunk(ones), "tree of the parameters' own shapes"),
        (ones["backbone"], "tree of the parameters' own shapes"),
        (negative, r"not be negative, got -0\.5 in backbone/layers/mlp/up/bias"),
        (nan, "got nan in backbone/norm/scale"),
    ]:
        for function in (kernels.log_prob_kernel, kernels.trace_kernel):
            with pytest.raises(JaxdynError, match=message):
                function(model, params, all_sites(), preconditioner=p)
