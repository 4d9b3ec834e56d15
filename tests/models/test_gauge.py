"""Another gauge is the same policy, and its steps are others by the law."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn.dynamics import propagate
from jaxdyn.models import LoraConfig, add_adapters, regauge
from jaxdyn.types import JaxdynError

SITES = oracles.tiny_sites()
C = 3.0


def objective(model, params):
    """Something of all logits."""
    return jnp.sum(jnp.sin(oracles.site_logits(model, model.view(params), SITES)))


@pytest.mark.parametrize("name", ["gpt_neox-untied", "llama-tied", "gemma3_text-tied"])
def test_the_policy_stays(name, x64):
    """With biases, tied, and scales of 1 + s."""
    model, params = oracles.tiny_model(name)
    twin, other = regauge(model, params, C)
    logits = lambda m, p: oracles.site_logits(m, m.view(p), SITES)
    np.testing.assert_allclose(logits(twin, other), logits(model, params), rtol=0, atol=1e-12)
    assert not twin.config.tied
    weight = model.view(params)["classifier"]["weight"]
    np.testing.assert_allclose(other["classifier"]["weight"], weight / C)


def test_adapters_are_divided_once(x64):
    model, params = oracles.tiny_model("llama-untied")
    config = LoraConfig(rank=2, alpha=4.0)
    model, params = add_adapters(
        model, params, config, jax.random.key(0), backbone=False, classifier=True
    )
    params["classifier"]["lora_b"] += 0.1
    _, other = regauge(model, params, C)
    np.testing.assert_allclose(objective(model, other), objective(model, params), rtol=1e-6)


def test_a_gradient_step_has_its_parts_scaled_by_the_law(x64):
    """c² the representation; the gradient component is as it was but for the final norm's c⁻²."""
    model, params = oracles.tiny_model("gpt_neox-untied")
    _, other = regauge(model, params, C)

    def parts(params):
        step = jax.grad(lambda p: objective(model, p))(params)
        still = jax.tree.map(jnp.zeros_like, step)
        norm = {**still, "backbone": {**still["backbone"], "norm": step["backbone"]["norm"]}}
        whole = propagate(model, params, step, SITES)
        return whole.representation, whole.gradient, propagate(model, params, norm, SITES).gradient

    (rep, body, norm), (rep_c, body_c, norm_c) = parts(params), parts(other)
    np.testing.assert_allclose(rep_c, C**2 * rep, rtol=1e-9)
    np.testing.assert_allclose(norm_c, norm / C**2, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(body_c - norm_c, body - norm, rtol=1e-9, atol=1e-12)
    assert np.abs(norm).max() > 1e-3 * np.abs(body).max()


def test_what_has_no_gauge_is_refused():
    model, params = oracles.tiny_model("llama-untied", jnp.float32)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(JaxdynError, match=r"scale must be a number above 0, got "):
            regauge(model, params, scale)
    with pytest.raises(JaxdynError, match=r"body and a classifier, got value too$"):
        regauge(model, {**params, "value": {}}, 2.0)
