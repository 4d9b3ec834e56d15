"""bfloat16: what adds up over tokens does so in float32, whatever the tokens' frequencies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax.traverse_util import flatten_dict

from jaxdyn.models.decoder import Backbone
from jaxdyn.models.opened import Dense, Embed, LayerNorm, RMSNorm
from jaxdyn.models.products import rows_product

U = 2.0**-8
"""bfloat16 keeps 8 bits: it rounds by at most this share."""

MANY = 20_000


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Embed(3, 2, dtype=jnp.bfloat16), "embedding"),
        (Dense(2, use_bias=False, biased=True, dtype=jnp.bfloat16), "bias"),
        (LayerNorm(dtype=jnp.bfloat16), "bias"),
        (LayerNorm(dtype=jnp.bfloat16), "scale"),
        (RMSNorm(dtype=jnp.bfloat16), "scale"),
    ],
)
def test_20000_unit_cotangents_are_20000(layer, name, stored):
    """In bfloat16 the sum of ones stays at 256. Here x̂ = (1, −1) or (1, 1)."""
    ids = jnp.ones((100, MANY // 100), jnp.int32)
    of_norm = jnp.asarray([1.0, -1.0] if isinstance(layer, LayerNorm) else [1.0, 1.0])
    x = ids if name == "embedding" else jnp.broadcast_to(of_norm, (*ids.shape, 2))
    params = jax.tree.map(lambda p: p.astype(stored), layer.init(jax.random.key(0), x)["params"])
    total = lambda params: jnp.sum(layer.apply({"params": params}, x).astype(jnp.float32))
    gradient = jax.jit(jax.grad(total))(params)[name]
    assert gradient.dtype == stored
    size = np.abs(np.asarray(gradient, np.float64)[1 if name == "embedding" else ...])
    # Stored in bfloat16 it is rounded once; the norm's ε of 1e-6 moves x̂ by half of that.
    np.testing.assert_allclose(size, MANY, rtol=U if stored == jnp.bfloat16 else 1e-6)


def test_gradients_are_the_sums_of_the_factors_that_the_pass_had():
    """Of 4096 tokens every second is the same one; every gradient against its sum in float64.

    Tables and biases add cotangents up as they are: float32's rounding of 4096 terms at worst. A
    kernel's and an adapter's gradient is a matrix product's, rounded once; a scale's factor x̂ is
    rounded where it is recorded. An adapter's passes two roundings more: the inner product's and
    the scaled cotangent's.
    """
    model, params = oracles.adapted_model("gpt2-tied", jnp.float32, classifier=False)
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, oracles.VOCAB, (128, 32))
    tokens = jnp.asarray(np.where(rng.random(draws.shape) < 0.5, 3, draws), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(32), tokens.shape)
    causal = jnp.tril(jnp.ones((1, 1, 32, 32), bool)) & jnp.ones((128, 1, 1, 1), bool)
    module = Backbone(model.config, jnp.bfloat16)
    inputs = tokens, places, causal[None]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["perturbations"]
    still = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # As an objective's are: of one sign mostly, so that sums are large.
    cotangent = jnp.asarray(rng.normal(1, 1, (*tokens.shape, 8)), jnp.bfloat16)

    @jax.jit
    def one_pass(backbone):
        def run(backbone, shifts):
            variables = {"params": backbone, "perturbations": shifts}
            (phi, _), recorded = module.apply(variables, *inputs, mutable=["intermediates"])
            return phi, recorded["intermediates"]

        _, pull, recorded = jax.vjp(run, backbone, still, has_aux=True)
        return *pull(cotangent), recorded

    gradient, outputs, seen = map(flatten_dict, one_pass(params["backbone"]))
    kinds = set()
    stored = flatten_dict(params["backbone"])
    for path, got in gradient.items():
        *layer, kind = path
        (a,) = (x for p, x in seen.items() if list(p[:-1]) == layer)
        (d,) = (x for p, x in outputs.items() if list(p[:-1]) == layer)
        stacked = path[0] == "layers"
        kinds.add(kind)
        d = _flat(d, stacked)
        if kind == "embedding":
            ids, want, size = np.asarray(a).reshape(-1), np.zeros(got.shape), np.zeros(got.shape)
            np.add.at(want, ids, d)
            np.add.at(size, ids, np.abs(d))
            bound = 4096 * 2.0**-24 * size
        elif kind == "bias":
            want, bound = d.sum(-2), 4096 * 2.0**-24 * np.abs(d).sum(-2)
        elif kind == "scale":
            x = _flat(a, stacked)
            want, bound = (x * d).sum(-2), 2 * U * np.abs(x * d).sum(-2)
        else:
            x, roundings = _flat(a, stacked), 1
            if kind != "kernel":
                down, up = (
                    np.asarray(stored[(*layer, n)].astype(jnp.bfloat16), np.float64)
                    for n in ("lora_a", "lora_b")
                )
                roundings, d = 3, model.config.lora_scale * d
                if kind == "lora_b":
                    x, wide = x @ down, np.abs(x) @ np.abs(down)
                    sizes = wide, np.abs(d)
                else:
                    d, wide = d @ up.swapaxes(-1, -2), np.abs(d) @ np.abs(up).swapaxes(-1, -2)
                    sizes = np.abs(x), wide
            else:
                sizes = np.abs(x), np.abs(d)
            want = x.swapaxes(-1, -2) @ d
            bound = 1.1 * roundings * U * (sizes[0].swapaxes(-1, -2) @ sizes[1])
        error = np.abs(np.asarray(got, np.float64) - want)
        assert (error <= bound + 1e-30).all(), (path, (error / bound).max())
    assert kinds == {"embedding", "kernel", "bias", "scale", "lora_a", "lora_b"}


def _flat(x, stacked):
    """[..., O] in float64 with all slots along one axis, and layers before it."""
    return np.asarray(x, np.float64).reshape(*x.shape[:stacked], -1, x.shape[-1])


def test_products_with_the_classifier_take_bfloat16_and_add_up_in_float32():
    """Forward, back to features and to W, and along both; each against float64.

    The cotangent is rounded and so is what comes back; the sums between are in float32.
    """
    rng = np.random.default_rng(0)
    x, dx = (jnp.asarray(rng.normal(1, 1, (300, 16)), jnp.bfloat16) for _ in range(2))
    w, dw = (jnp.asarray(rng.normal(1, 1, (40, 16)), jnp.float32) for _ in range(2))
    g = jnp.asarray(rng.normal(1, 1, (300, 40)), jnp.float32)
    product = lambda x, w: rows_product(x, w, jnp.bfloat16)

    def both(x, w):
        y, pull = jax.vjp(product, x, w)
        return y, jax.jvp(product, (x, w), (dx, dw))[1], *pull(g)

    y, along, back, d_w = jax.jit(both)(x, w)
    assert (y.dtype, along.dtype, back.dtype, d_w.dtype) == (g.dtype, g.dtype, x.dtype, w.dtype)
    exact = lambda x: np.asarray(x.astype(jnp.bfloat16), np.float64)
    wide = lambda x: np.asarray(x, np.float64)
    np.testing.assert_allclose(y, exact(x) @ exact(w).T, rtol=1e-5, atol=1e-5)
    for got, terms, share in (
        (along, [(exact(dx), exact(w).T), (exact(x), exact(dw).T)], 1),
        (back, [(wide(g), exact(w))], 2),
        (d_w, [(wide(g).T, exact(x))], 2),
    ):
        want = sum(a @ b for a, b in terms)
        size = sum(np.abs(a) @ np.abs(b) for a, b in terms)
        assert (np.abs(wide(got) - want) <= 1.1 * share * U * size).all()
    dots = [e for e in _equations(jax.make_jaxpr(both)(x, w).jaxpr) if "dot_general" in str(e[0])]
    assert len(dots) == 6
    assert {v for _, types in dots for v in types} == {jnp.dtype(jnp.bfloat16)}


def test_what_does_not_move_costs_no_product():
    x, w = jnp.ones((5, 4), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)
    total = lambda x, w: jnp.sum(rows_product(x, w, jnp.bfloat16))
    for which in (0, 1):
        jaxpr = jax.make_jaxpr(jax.grad(total, which))(x, w).jaxpr
        assert sum("dot_general" in str(e[0]) for e in _equations(jaxpr)) == 2


def _equations(jaxpr):
    """(primitive, operand types) of a program and all within."""
    for e in jaxpr.eqns:
        inner = [
            sub
            for v in e.params.values()
            if (sub := getattr(v, "jaxpr", v if hasattr(v, "eqns") else None)) is not None
        ]
        yield from (x for sub in inner for x in _equations(sub))
        if not inner:
            yield e.primitive, [v.aval.dtype for v in e.invars]


def test_a_model_of_bfloat16_parameters_looks_up_and_adds_the_same_numbers():
    """Rows cast after the look-up are the rows of a table cast before it; so are biases."""
    model, params = oracles.tiny_model("gpt2-tied", jnp.float32)
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
    sites = oracles.tiny_sites()
    run = jax.jit(model.features)
    narrow = jax.tree_util.tree_map_with_path(
        lambda path, x: x if "norm" in str(path) else x.astype(jnp.bfloat16), params["backbone"]
    )
    given = sites.tokens, sites.mask
    np.testing.assert_array_equal(run(narrow, *given), run(params["backbone"], *given))
