"""The optimizer's directions against the rules written out in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxdyn.optim import OptimConfig, enter_stage, learning_rate, make_optimizer
from jaxdyn.types import JaxdynError

BODY = [np.array([0.3, -1.0]), np.array([2.0, 0.5]), np.array([-0.1, 0.2])]
HEAD = [np.array([[1.0, 2.0]]), np.array([[-3.0, 0.1]]), np.array([[0.4, 0.4]])]


def tree(body=None, head=None):
    """A parameter-shaped tree of the parts that are given."""
    parts = {}
    if body is not None:
        parts["backbone"] = {"x": jnp.asarray(body)}
    if head is not None:
        parts["classifier"] = {"weight": jnp.asarray(head)}
    return parts


def adam(gradients, b1=0.9, b2=0.999, eps=1e-8):
    """The directions of Adam, from Kingma & Ba's algorithm 1."""
    m = v = 0.0
    out = []
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        out.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return out


def test_the_parts_keep_their_own_moments_and_counts(x64):
    """The classifier moves twice alone, then both: W's Adam is at step 3, the body's at step 1."""
    optimizer = make_optimizer(OptimConfig(max_grad_norm=0.0))
    alone = tree(head=HEAD[0])
    state = enter_stage(optimizer, alone, None, reset=False)
    for g in HEAD[:2]:
        direction, state = optimizer.update(tree(head=g), state, alone)
    np.testing.assert_allclose(direction["classifier"]["weight"], adam(HEAD[:2])[1], rtol=1e-12)

    both = tree(BODY[0], HEAD[0])
    state = enter_stage(optimizer, both, state, reset=False)
    for i, g in enumerate(BODY[:2]):
        direction, state = optimizer.update(tree(g, HEAD[2]), state, both)
        np.testing.assert_allclose(direction["backbone"]["x"], adam(BODY)[i], rtol=1e-12)
        head = adam([*HEAD, HEAD[2]])[2 + i]
        np.testing.assert_allclose(direction["classifier"]["weight"], head, rtol=1e-12)


def test_reset_starts_the_classifier_afresh_too(x64):
    optimizer = make_optimizer(OptimConfig(max_grad_norm=0.0))
    alone, both = tree(head=HEAD[0]), tree(BODY[0], HEAD[0])
    _, state = optimizer.update(tree(head=HEAD[0]), optimizer.init(alone), alone)
    state = enter_stage(optimizer, both, state, reset=True)
    direction, _ = optimizer.update(tree(BODY[0], HEAD[1]), state, both)
    np.testing.assert_allclose(direction["classifier"]["weight"], adam(HEAD[1:])[0], rtol=1e-12)
    np.testing.assert_allclose(direction["backbone"]["x"], adam(BODY)[0], rtol=1e-12)


def test_sgd_with_momentum_and_weight_decay(x64):
    """m_t = 0.5 m_{t-1} + g_t; the direction is m_t + 0.1 θ."""
    config = OptimConfig(optimizer="sgd", momentum=0.5, weight_decay=0.1, max_grad_norm=0.0)
    optimizer = make_optimizer(config)
    params = tree(BODY[2], HEAD[2])
    state = optimizer.init(params)
    for g, h in zip(BODY[:2], HEAD[:2], strict=True):
        direction, state = optimizer.update(tree(g, h), state, params)
    body = 0.5 * BODY[0] + BODY[1] + 0.1 * BODY[2]
    head = 0.5 * HEAD[0] + HEAD[1] + 0.1 * HEAD[2]
    np.testing.assert_allclose(direction["backbone"]["x"], body, rtol=1e-14)
    np.testing.assert_allclose(direction["classifier"]["weight"], head, rtol=1e-14)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_classifiers_multiplier_is_of_its_learning_rate(optimizer, x64):
    """The classifier goes m times as far, its decay with it, and nothing else changes."""
    plain = OptimConfig(optimizer=optimizer, momentum=0.5, weight_decay=0.1)
    config = dataclasses.replace(plain, classifier_multiplier=7.0, learning_rate=0.3)
    params, ends = tree(BODY[2], HEAD[2]), []
    for given in (plain, config):
        state = make_optimizer(given).init(params)
        for g, h in zip(BODY[:2], HEAD[:2], strict=True):
            direction, state = make_optimizer(given.rule).update(tree(g, h), state, params)
        ends.append((direction, state))
    (before, state), (after, other) = ends
    np.testing.assert_allclose(
        after["classifier"]["weight"], 7 * before["classifier"]["weight"], rtol=1e-14
    )
    np.testing.assert_array_equal(after["backbone"]["x"], before["backbone"]["x"])
    jax.tree.map(np.testing.assert_array_equal, other, state)
    # In its stage it is its own rate where one is given, and m times the joint one where not.
    assert learning_rate(config, "classifier", 0, 4) == pytest.approx(0.3)
    own = dataclasses.replace(config, classifier_learning_rate=0.7)
    assert 7 * learning_rate(own, "classifier", 0, 4) == pytest.approx(0.7)
    assert learning_rate(own, "joint", 0, 4) == pytest.approx(0.3)


@pytest.mark.parametrize("limit, scale", [(0.0, 1.0), (1.0, 1 / 5), (10.0, 1.0)])
def test_the_clip_is_of_the_norm_over_both_parts(limit, scale, x64):
    """‖(3, 4)‖ = 5, with the 3 in the body and the 4 in the classifier."""
    optimizer = make_optimizer(OptimConfig(optimizer="sgd", max_grad_norm=limit))
    gradient = tree(np.array([3.0, 0.0]), np.array([[0.0, 4.0]]))
    direction, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    expected = jax.tree.map(lambda g: scale * g, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), direction, expected)


RATES = {
    "constant": [1.0, 1.0, 1.0, 1.0],
    "linear": [1.0, 0.75, 0.5, 0.25],
    "cosine": [0.5 * (1 + np.cos(np.pi * i / 4)) for i in range(4)],
}


@pytest.mark.parametrize("decay", RATES)
def test_warm_up_then_decay_over_the_rest_of_the_stage(decay):
    """Two warm-up steps reach a third and two thirds of the peak; four steps decay from it."""
    config = OptimConfig(learning_rate=0.3, warmup_steps=2, decay=decay)
    got = [learning_rate(config, "joint", step, 6) for step in range(6)]
    np.testing.assert_allclose(got, 0.3 * np.array([1 / 3, 2 / 3, *RATES[decay]]), rtol=1e-6)


def test_the_classifier_stage_has_its_own_peak_when_given():
    own = OptimConfig(learning_rate=0.3, classifier_learning_rate=0.7)
    assert learning_rate(own, "classifier", 0, 4) == pytest.approx(0.7)
    assert learning_rate(own, "joint", 0, 4) == pytest.approx(0.3)
    assert learning_rate(OptimConfig(learning_rate=0.3), "classifier", 0, 4) == pytest.approx(0.3)


def test_a_stage_shorter_than_the_warm_up_only_warms_up():
    config = OptimConfig(learning_rate=1.0, warmup_steps=9)
    assert [learning_rate(config, "joint", s, 3) for s in range(3)] == [0.25, 0.5, 0.75]


def test_rule_keeps_what_shapes_the_update_and_drops_the_rest():
    config = OptimConfig(
        schedule="classifier_first", learning_rate=3.0, warmup_steps=4, decay="linear", b1=0.5
    )
    assert config.rule == OptimConfig(b1=0.5)
    for name, value in {"optimizer": "sgd", "weight_decay": 0.1, "max_grad_norm": 7.0}.items():
        assert getattr(OptimConfig(**{name: value}).rule, name) == value


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("classifier_learning_rate", -1.0),
        ("classifier_multiplier", 0.0),
        ("b1", 1.0),
        ("momentum", -0.1),
        ("max_grad_norm", -1.0),
        ("warmup_steps", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(JaxdynError, match=f"optim.{field} must .*got {value}"):
        OptimConfig(**{field: value})
