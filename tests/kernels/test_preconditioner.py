"""P of a live optimizer, against its real steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from kernel_oracles import BIASED, all_sites, tiny_model

from jaxdyn import kernels
from jaxdyn.optim import OptimConfig, enter_stage, make_optimizer, trainable
from jaxdyn.types import JaxdynError

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

    @jax.jit
    def step(gradient, state, moving):
        direction, state = optimizer.update(gradient, state, moving)
        return direction, state, jax.tree.map(lambda x, d: x - RATE * d, moving, direction)

    for seed in range(3):
        weights = jnp.asarray(np.random.default_rng(seed).standard_normal(8))
        before = {**params, **moving}
        gradient = {part: programs(name)[0](before, weights)[part] for part in parts}
        direction, state, moving = step(gradient, state, moving)
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
