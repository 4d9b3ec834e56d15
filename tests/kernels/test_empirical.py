"""Every kernel against contractions of float64 Jacobians, for every architecture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from kernel_oracles import (
    BIASED,
    NAMES,
    A,
    B,
    all_sites,
    assert_components,
    random_cotangents,
    rollout,
    scalars,
    some,
    theta,
    tiny_model,
)

from jaxdyn import kernels
from jaxdyn.kernels import blocks, empirical, gram
from jaxdyn.types import JaxdynError


# Everything on every architecture; each once, half of them tied, where time matters.
def every(*quick):
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in NAMES]


FOUR = every("gpt_neox-untied", "llama-tied", "qwen2-untied", "gpt2-tied")
TWO = every("gpt_neox-untied", "gpt2-tied")
CHOSEN = [7, 2]


@pytest.fixture(autouse=True)
def quick_compilation():
    """The arrays are tiny: what takes time here is compiling, not running."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def update(name, method, dtype=jnp.float64, function=kernels.update_kernel):
    model, params = tiny_model(name, dtype)
    sites, g = all_sites(), jnp.asarray(random_cotangents(), dtype)
    return function(
        model, params, some(sites, A), some(sites, B), cotangents_a=g[A], cotangents_b=g[B],
        method=method,
    )  # fmt: skip


def trace_oracle(name, rows, columns):
    return {k: np.einsum("nvmv->nm", x)[rows][:, columns] for k, x in theta(name)[0].items()}


def block_oracle(name, rows, columns):
    pick = lambda x: x.transpose(0, 2, 1, 3)[rows][:, columns][:, :, CHOSEN][..., CHOSEN]
    return {k: pick(x) for k, x in theta(name)[0].items()}


def sequence_weights(seed):
    return np.random.default_rng(seed).standard_normal((3, 3))


def sequence_oracle(name, left, right):
    """Σ over the pairs of two completions' sites of the weighted log-prob kernel."""
    mask = np.asarray(rollout().completion_mask)
    member = lambda w: np.eye(3)[:, np.nonzero(mask)[0]] * w[mask][None]
    inner = scalars(name, theta(name)[1])
    return {k: member(left) @ x @ member(right).T for k, x in inner.items()}


def sequences(name, method, dtype=jnp.float64):
    model, params = tiny_model(name, dtype)
    weights = [jnp.asarray(sequence_weights(seed), dtype) for seed in (5, 6)]
    return kernels.sequence_kernel(
        model, params, rollout(), rollout(), weights_a=weights[0], weights_b=weights[1],
        method=method,
    )  # fmt: skip


@pytest.mark.parametrize("name", FOUR)
def test_update_kernel_and_its_parts(name, x64):
    result = update(name, "gram")
    assert_components(result, scalars(name, random_cotangents(), A, B), 1e-9)
    parts = update(name, "gram", function=kernels.update_kernel_by_part)
    total = sum(x.sum(axis=0) for x in parts.values())
    scale = float(jnp.abs(result.gradient).max())
    np.testing.assert_allclose(total, result.gradient, rtol=0, atol=1e-14 * scale)


@pytest.mark.parametrize("name", FOUR)
def test_trace_kernel(name, x64):
    model, params = tiny_model(name)
    sites = all_sites()
    result = kernels.trace_kernel(model, params, some(sites, A), some(sites, B))
    assert_components(result, trace_oracle(name, A, B), 1e-9)


@pytest.mark.parametrize("name", TWO)
def test_token_block(name, x64):
    model, params = tiny_model(name)
    sites = some(all_sites(), A)
    result = kernels.token_block(model, params, sites, token_ids=CHOSEN, method="gram")
    assert_components(result, block_oracle(name, A, A), 1e-9)


@pytest.mark.parametrize("name", TWO)
def test_sequence_kernel(name, x64):
    expected = sequence_oracle(name, sequence_weights(5), sequence_weights(6))
    assert_components(sequences(name, "gram"), expected, 1e-9)


@pytest.mark.parametrize("name", ["gpt_neox-untied"])
def test_log_prob_kernel_with_longer_padding(name, x64):
    """The columns' sequences get two slots of padding more on each side, which changes nothing."""
    model, params = tiny_model(name)
    sites = all_sites()
    longer = dataclasses.replace(
        sites,
        tokens=jnp.pad(sites.tokens, ((0, 0), (2, 2)), constant_values=3),
        mask=jnp.pad(sites.mask, ((0, 0), (2, 2))),
        positions=sites.positions + 2,
    )
    result = kernels.log_prob_kernel(model, params, sites, some(longer, B), method="gram")
    assert_components(result, scalars(name, theta(name)[1], columns=B), 1e-9)


@pytest.mark.parametrize("name", ["gpt2-tied", BIASED])
def test_the_plain_method(name, x64):
    model, params = tiny_model(name)
    sites = all_sites()
    assert_components(update(name, "plain"), scalars(name, random_cotangents(), A, B), 1e-9)
    result = kernels.trace_kernel(model, params, some(sites, A), method="plain", mean=True)
    mean = {k: x / oracles.VOCAB for k, x in trace_oracle(name, A, A).items()}
    assert_components(result, mean, 1e-9)
    expected = sequence_oracle(name, sequence_weights(5), sequence_weights(6))
    assert_components(sequences(name, "plain"), expected, 1e-9)


@pytest.mark.parametrize("name", ["gpt_neox-untied", "llama-tied"])
def test_float32(name):
    model, params = tiny_model(name, jnp.float32)
    result = update(name, "gram", jnp.float32)
    assert result.gradient.dtype == jnp.float32
    assert_components(result, scalars(name, random_cotangents(), A, B), 1e-4)
    result = kernels.trace_kernel(model, params, some(all_sites(), A), mean=True)
    mean = {k: x / oracles.VOCAB for k, x in trace_oracle(name, A, A).items()}
    assert_components(result, mean, 1e-4)


def gradients_by_kind(name):
    """∂(g_nᵀ f_n)/∂ψ of the rollout's sites, flattened to [8, l, P] by kind; l layers or 1."""
    model, params = tiny_model(name)
    view, sites, g = model.view(params), all_sites(), jnp.asarray(random_cotangents())

    @jax.jit
    def jacobian(backbone):
        f = lambda b: oracles.site_logits(model, {**view, "backbone": b}, sites)
        return jax.jacrev(lambda b: jnp.sum(g * f(b), axis=1))(backbone)

    j = jacobian(view["backbone"])
    layered = lambda *trees: np.concatenate(
        [x.reshape(8, 2, -1) for tree in trees for x in jax.tree.leaves(tree)], axis=2
    )
    whole = lambda tree: np.concatenate(
        [x.reshape(8, 1, -1) for x in jax.tree.leaves(tree)], axis=2
    )
    layers = j["layers"]
    return {
        "attention": layered(layers["attention"]),
        "mlp": layered(layers["mlp"]),
        "norms": layered(layers["attention_norm"], layers["mlp_norm"]),
        "embedding": whole([j["embed"], j.get("position", {})]),
        "final_norm": whole(j["norm"]),
    }


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-untied"])
def test_each_part_is_the_kernel_of_its_parameters(name, x64):
    expected = gradients_by_kind(name)
    for method in ("gram", "plain"):
        parts = update(name, method, function=kernels.update_kernel_by_part)
        assert parts.keys() == expected.keys()
        for kind, j in expected.items():
            kernel = np.einsum("nlp,mlp->lnm", j[A], j[B])
            np.testing.assert_allclose(parts[kind], kernel, rtol=0, atol=1e-9 * abs(kernel).max())


@pytest.fixture
def tiles_of_three(monkeypatch):
    for module in (empirical, kernels.trace):
        monkeypatch.setattr(module, "tile_size", lambda *_: 3)


# Tiles of three of eight sites, and so little workspace that every block is the smallest.
def test_tiles_of_one_set_change_nothing_and_compile_once(x64, tiles_of_three):
    model, params = tiny_model("gpt2-tied")
    sites = all_sites()
    compiled = lambda: (gram.factorize._cache_size(), gram.contract._cache_size())
    before = compiled()
    tiled = kernels.log_prob_kernel(model, params, sites, method="gram", memory_budget=8)
    assert_components(tiled, scalars("gpt2-tied", theta("gpt2-tied")[1]), 1e-12)
    # On the diagonal the columns are the rows: a program of its own.
    assert compiled() == (before[0] + 1, before[1] + 2)


def test_tiles_of_two_sets_change_nothing(x64, tiles_of_three):
    model, params = tiny_model("gpt2-tied")
    sites = all_sites()
    tiled = kernels.trace_kernel(model, params, sites, some(sites, B), memory_budget=8)
    assert_components(tiled, trace_oracle("gpt2-tied", slice(None), B), 1e-12)


def test_tile_size_fills_the_budget():
    assert blocks.tile_size((10, 10), square=True, one_row=100, budget=1000) == 10
    assert blocks.tile_size((10, 10), square=True, one_row=100, budget=999) == 4
    assert blocks.tile_size((3, 7), square=False, one_row=100, budget=10**6) == 7
    with pytest.raises(JaxdynError, match=r"too small for one site.* 200 bytes.* got 199"):
        blocks.tile_size((10, 10), square=True, one_row=100, budget=199)
