"""Every kernel against contractions of float64 Jacobians, for every architecture."""

import dataclasses

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
    kernels_by_kind,
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
from jaxdyn.kernels import blocks, gram


# Everything on every architecture; half of them tied, each once where time matters.
def slow_but(names, *quick):
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in names]


FOUR = ("gpt_neox-untied", "llama-tied", "qwen2-untied", "gpt2-tied")
ALL = slow_but(NAMES, *FOUR)
EACH = slow_but(NAMES, "gpt_neox-untied", "gpt2-tied")
CHOSEN = [7, 2]


def update(name, method, dtype=jnp.float64, function=kernels.update_kernel):
    model, params = tiny_model(name, dtype)
    sites, g = all_sites(), jnp.asarray(random_cotangents(), dtype)
    return function(
        model, params, some(sites, A), some(sites, B), cotangents_a=g[A], cotangents_b=g[B],
        method=method,
    )  # fmt: skip


def sequences(name, method, dtype=jnp.float64):
    model, params = tiny_model(name, dtype)
    weights = [jnp.asarray(sequence_weights(seed), dtype) for seed in (5, 6)]
    return kernels.sequence_kernel(
        model, params, rollout(), rollout(), weights_a=weights[0], weights_b=weights[1],
        method=method,
    )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_update_kernel_and_its_parts(name, x64):
    result = update(name, "gram")
    assert_components(result, scalars(name, random_cotangents(), A, B), 1e-9)
    parts = update(name, "gram", function=kernels.update_kernel_by_part)
    total = sum(x.sum(axis=0) for x in parts.values())
    scale = float(jnp.abs(result.gradient).max())
    np.testing.assert_allclose(total, result.gradient, rtol=0, atol=1e-14 * scale)


@pytest.mark.parametrize("name", ALL)
def test_trace_kernel(name, x64):
    model, params = tiny_model(name)
    sites = all_sites()
    result = kernels.trace_kernel(model, params, some(sites, A), some(sites, B))
    assert_components(result, traces(name, A, B), 1e-9)


@pytest.mark.parametrize("name", EACH)
def test_token_block(name, x64):
    model, params = tiny_model(name)
    sites = some(all_sites(), A)
    result = kernels.token_block(model, params, sites, token_ids=CHOSEN, method="gram")
    assert_components(result, token_blocks(name, A, A, CHOSEN), 1e-9)


@pytest.mark.parametrize("name", EACH)
def test_sequence_kernel(name, x64):
    expected = sequence_scalars(name, sequence_weights(5), sequence_weights(6))
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
    mean = {k: x / oracles.VOCAB for k, x in traces(name, A, A).items()}
    assert_components(result, mean, 1e-9)
    expected = sequence_scalars(name, sequence_weights(5), sequence_weights(6))
    assert_components(sequences(name, "plain"), expected, 1e-9)


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-untied"])
def test_each_part_is_the_kernel_of_its_parameters(name, x64):
    expected = kernels_by_kind(name, random_cotangents(), A, B)
    for method in ("gram", "plain"):
        parts = update(name, method, function=kernels.update_kernel_by_part)
        assert parts.keys() == expected.keys()
        for kind, kernel in expected.items():
            np.testing.assert_allclose(parts[kind], kernel, rtol=0, atol=1e-9 * abs(kernel).max())


@pytest.fixture
def tiles_of_three(monkeypatch):
    monkeypatch.setattr(blocks, "tile_size", lambda *_: 3)


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
    assert_components(tiled, traces("gpt2-tied", slice(None), B), 1e-12)
