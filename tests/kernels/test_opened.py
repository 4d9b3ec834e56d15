"""The decoder's hooks: what they hand back, and that they cost nothing when nobody asks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax.traverse_util import flatten_dict

from jaxdyn.models import opened

FAMILIES = ["gpt_neox-untied", "llama-untied", "gpt2-tied", *oracles.NORMED]


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_and_cotangents_make_every_gradient(name, x64):
    """Σ over slots of input times cotangent is the gradient of kernel, scale, bias and table."""
    model, params = oracles.tiny_model(name)
    sites = oracles.tiny_sites()
    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 8)))

    @jax.jit
    def both(backbone):
        phi, pull = jax.vjp(lambda b: model.features(b, sites.tokens, sites.mask), backbone)
        opened, inputs, pull_outputs = model.opened(backbone, sites.tokens, sites.mask)
        return phi, pull(cotangent)[0], opened, inputs, pull_outputs(cotangent)

    phi, gradient, opened, inputs, outputs = both(params["backbone"])
    np.testing.assert_array_equal(opened, phi)
    inputs, outputs = flatten_dict(inputs), flatten_dict(outputs)
    table = lambda ids, d, size: jnp.zeros((size, 8)).at[ids].add(d)
    for (*layer, parameter), expected in flatten_dict(gradient).items():
        a, d = inputs[tuple(layer)], outputs[tuple(layer)]
        made = {
            "kernel": lambda a, d: jnp.einsum("...bti,...bto->...io", a, d),
            "scale": lambda a, d: jnp.einsum("...bti,...bti->...i", a, d),
            "bias": lambda a, d: jnp.einsum("...bti->...i", d),
            "embedding": functools.partial(table, size=len(expected)),
        }[parameter](a, d)
        np.testing.assert_allclose(made, expected, atol=1e-11, err_msg=f"{layer} {parameter}")


def test_what_opens_an_output_is_never_read():
    """Zeros as large as every layer's output would be: NaN changes nothing."""
    x, shift = jnp.arange(3.0), jnp.full(3, jnp.nan)
    np.testing.assert_array_equal(jax.jit(opened.shifted)(x, shift), x)
    found = jax.jvp(opened.shifted, (x, shift), (x, 10 * x))
    np.testing.assert_array_equal(found, [x, 11 * x])
    pulled = jax.vjp(opened.shifted, x, shift)[1](x)
    np.testing.assert_array_equal(pulled, [x, x])


@pytest.mark.parametrize("name", ["gpt2-tied", "olmo2-untied"])
def test_closed_hooks_leave_the_program_as_it_is(name, monkeypatch):
    """The jaxpr of the features is, letter by letter, that of layers without hooks."""
    model, params = oracles.tiny_model(name, jnp.float32)
    sites = oracles.tiny_sites()
    run = lambda b: model.features(b, sites.tokens, sites.mask)
    hooked = str(jax.make_jaxpr(run)(params["backbone"]))
    monkeypatch.setattr(opened, "_sow_input", lambda layer, x, *where: None)
    monkeypatch.setattr("jaxdyn.models.decoder.leave", lambda block, x: x)
    monkeypatch.setattr(opened, "_open_output", lambda layer, read, x, *scale: x)
    monkeypatch.setattr(opened, "_placed", lambda layer, name, x: x)
    jax.clear_caches()  # else what was traced with hooks would be found again
    bare = str(jax.make_jaxpr(run)(params["backbone"]))
    assert hooked == bare


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["gpt2-tied", "olmo2-untied", "gemma3_text-tied"])
def test_every_parameter_hands_back_what_its_change_does(name, adapted, x64):
    """Against each text's whole gradient at θ + t Δ, times the change."""
    model, params = (oracles.adapted_model if adapted else oracles.tiny_model)(name, jnp.float64)
    backbone, sites, t = params["backbone"], oracles.tiny_sites(), 0.3
    draws = np.random.default_rng(3)
    change = jax.tree.map(lambda x: jnp.asarray(0.1 * draws.standard_normal(x.shape)), backbone)
    place = jax.tree.map(lambda x, d: x + t * d, backbone, change)
    features = lambda b: model.features(b, sites.tokens, sites.mask)
    phi, pull = model.itemized(backbone, change, t, sites.tokens, sites.mask)
    np.testing.assert_allclose(phi, features(place), atol=1e-12)

    cotangent = jnp.asarray(draws.standard_normal(phi.shape))
    each = jax.jacobian(lambda b: jnp.sum(cotangent * features(b), axis=(1, 2)))(place)

    def check(path, item, gradient, delta):
        by_layer = path[0].key == "layers"
        by_text = gradient * delta[None]
        wanted = jnp.sum(by_text, axis=tuple(range(1 + by_layer, by_text.ndim))).T
        np.testing.assert_allclose(item, wanted, atol=1e-10, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, pull(cotangent), each, change)
