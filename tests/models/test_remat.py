"""What the backward pass computes again: the same numbers, in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn.models import LanguageModel

KINDS = ["none", "dots", "full"]


@pytest.mark.parametrize("name", ["gpt_neox-untied", "llama-tied", "gpt2-tied"])
def test_remat_changes_no_number(name, x64):
    model, params = oracles.tiny_model(name)
    sites = oracles.tiny_sites()

    def both(remat):
        again = dataclasses.replace(model, remat=remat)
        loss = lambda b: jnp.sum(jnp.tanh(again.features(b, sites.tokens, sites.mask)))
        return jax.jit(jax.value_and_grad(loss))(params["backbone"])

    value, gradient = both("none")
    for remat in ("dots", "full"):
        again, same = both(remat)
        np.testing.assert_allclose(again, value, rtol=1e-13)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), same, gradient)


def test_memory_falls_from_none_to_dots_to_full():
    """By the compiler's account, for 12 layers, of which "full" keeps one array each."""
    config = dataclasses.replace(
        oracles.CONFIGS["llama-untied"], num_layers=12, width=64, head_dim=32, mlp_width=256
    )
    tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    mask = jax.ShapeDtypeStruct((8, 32), bool)

    def peak(remat):
        model = LanguageModel(config, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0))["backbone"]
        loss = lambda b, tokens, mask: jnp.sum(model.features(b, tokens, mask) ** 2)
        compiled = jax.jit(jax.grad(loss)).lower(params, tokens, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = map(peak, KINDS)
    assert none > dots > full
    # Every layer's input, and what one layer holds when it is computed again.
    inputs = 12 * 8 * 32 * 64 * 4
    assert inputs < full < inputs + 1.5 * none / 12
