"""Kernels in float32 and bfloat16 against the float64 oracle."""

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracles import (
    NAMES,
    PARTS,
    A,
    B,
    all_sites,
    assert_components,
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

CHOSEN = [7, 2]
# Every architecture, half of them tied.
QUICK = ("gpt_neox-untied", "llama-tied")
FOUR = [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2-untied", "gpt2-tied"))]


def both():
    return some(all_sites(), A), some(all_sites(), B)


@pytest.mark.parametrize("name", FOUR)
def test_float32(name):
    model, params = tiny_model(name, jnp.float32)
    g = jnp.asarray(random_cotangents(), jnp.float32)
    result = kernels.update_kernel(
        model, params, *both(), cotangents_a=g[A], cotangents_b=g[B], method="gram"
    )
    assert all(getattr(result, part).dtype == jnp.float32 for part in PARTS)
    assert_components(result, scalars(name, random_cotangents(), A, B), 1e-4)
    result = kernels.trace_kernel(model, params, *both())
    assert all(getattr(result, part).dtype == jnp.float32 for part in PARTS)
    assert_components(result, traces(name, A, B), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_in_float32(name):
    model, params = tiny_model(name, jnp.float32)
    p, score = metric(name, jnp.float32), theta(name)[1]
    gram = {"method": "gram", "preconditioner": p}
    result = kernels.log_prob_kernel(model, params, *both(), **gram)
    assert_components(result, scalars(name, score, A, B, preconditioned=True), 1e-4)
    result = kernels.log_prob_kernel(model, params, *both(), method="plain", preconditioner=p)
    assert_components(result, scalars(name, score, A, B, preconditioned=True), 1e-4)
    result = kernels.token_block(model, params, *both(), token_ids=CHOSEN, **gram)
    assert_components(result, token_blocks(name, A, B, CHOSEN, preconditioned=True), 1e-4)
    weights = [sequence_weights(seed) for seed in (5, 6)]
    result = kernels.sequence_kernel(
        model, params, rollout(), rollout(), weights_a=jnp.asarray(weights[0], jnp.float32),
        weights_b=jnp.asarray(weights[1], jnp.float32), **gram,
    )  # fmt: skip
    assert_components(result, sequence_scalars(name, *weights, preconditioned=True), 1e-4)
    result = kernels.trace_kernel(model, params, *both(), preconditioner=p)
    assert_components(result, traces(name, A, B, preconditioned=True), 1e-4)


def assert_rounded(result, expected, layers):
    """Off by about as much as bfloat16 rounds: float32 results of which no more is known.

    Some ten roundings a layer and direction, each up to 2⁻⁸ of its value and independent, make
    √(20 L) 2⁻⁸ for a gradient, and twice that for a product of two. Float32 would be off by less
    than a hundredth of one of these roundings.
    """
    for part in PARTS:
        got, wanted = np.asarray(getattr(result, part)), np.asarray(expected[part])
        assert got.dtype == np.float32
        off = np.linalg.norm(got - wanted)
        assert off <= 2 * np.sqrt(20 * layers) * 2**-8 * np.linalg.norm(wanted), part
        assert not wanted.any() or off > 2**-8 / 100 * np.linalg.norm(wanted), part


@pytest.mark.parametrize(
    "name", ["gpt2-tied", pytest.param("llama-untied", marks=pytest.mark.slow)]
)
def test_bfloat16_computation_of_float32_parameters(name):
    model, params = tiny_model(name, jnp.float32)
    half = type(model)(model.config, jnp.bfloat16)
    depth = model.config.num_layers
    result = kernels.log_prob_kernel(half, params, *both(), method="gram")
    assert_rounded(result, scalars(name, theta(name)[1], A, B), depth)
    if model.config.tied:
        assert_rounded(kernels.trace_kernel(half, params, *both()), traces(name, A, B), depth)
