"""The battery that every quantity of the kernel passes: float64 oracles, precision, metrics.

A quantity is a call and what the full Jacobians say of it, both arrays by name.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy
from kernel_oracles import (
    BIASED,
    PARTS,
    A,
    B,
    all_sites,
    kernels_by_kind,
    metric,
    policy_scalars,
    policy_weights,
    random_cotangents,
    rollout,
    scalars,
    scores,
    sequence_scalars,
    sequence_weights,
    some,
    tiny_model,
    token_blocks,
    traces,
)

from jaxdyn import kernels
from jaxdyn.kernels import blocks, gram, trace_probed

CHOSEN = [7, 2]
SIGNS = scipy.linalg.hadamard(16)[:, : oracles.VOCAB]
"""Sixteen probes whose second moments are the identity: they give the exact trace."""


def both():
    return some(all_sites(), A), some(all_sites(), B)


def update(model, params, function=kernels.update_kernel, **options):
    g = jnp.asarray(random_cotangents(), model.dtype)
    return function(model, params, *both(), cotangents_a=g[A], cotangents_b=g[B], **options)


def by_part(model, params, **options):
    return update(model, params, by_part=True, **options).parts


def log_prob_by_part(model, params, **options):
    return kernels.log_prob_kernel(model, params, *both(), by_part=True, **options).parts


def sequences(model, params, **options):
    weights = [jnp.asarray(sequence_weights(seed), model.dtype) for seed in (5, 6)]
    return kernels.sequence_kernel(
        model, params, rollout(), rollout(), weights_a=weights[0], weights_b=weights[1], **options
    )


def mean_trace(model, params, **options):
    return kernels.trace_kernel(model, params, both()[0], mean=True, **options)


def probed(model, params, **options):
    key = jax.random.key(0)
    return kernels.trace_kernel(model, params, *both(), num_probes=16, key=key, **options)


def policies(model, params, places=None, **options):
    weights = jnp.asarray(policy_weights(), model.dtype)
    given = {"weights": weights, "temperature": 0.7, "places": places, **options}
    return kernels.policy_kernel(model, params, both()[0], rollout(), **given)


PLACES = [(1, 0), (0, 2), (2, 1)]
policy_tokens = functools.partial(policies, places=np.array(PLACES))


@dataclasses.dataclass(frozen=True)
class Quantity:
    """`call(model, params, **options)`, and `expected(name, preconditioned=...)` in float64."""

    call: Callable
    expected: Callable
    plain: bool = True  # whether method "plain" knows it


per_site = lambda function: lambda model, params, **o: function(model, params, *both(), **o)
of_score = lambda function, name, **p: function(name, scores(name), A, B, **p)
QUANTITIES = {
    "log_prob": Quantity(per_site(kernels.log_prob_kernel), functools.partial(of_score, scalars)),
    "log_prob by part": Quantity(log_prob_by_part, functools.partial(of_score, kernels_by_kind)),
    "update": Quantity(update, lambda name, **p: scalars(name, random_cotangents(), A, B, **p)),
    "update by part": Quantity(
        by_part, lambda name, **p: kernels_by_kind(name, random_cotangents(), A, B, **p)
    ),
    "tokens": Quantity(
        per_site(functools.partial(kernels.token_block, token_ids=CHOSEN)),
        lambda name, **p: token_blocks(name, A, B, CHOSEN, **p),
    ),
    "sequences": Quantity(
        sequences,
        lambda name, **p: sequence_scalars(name, sequence_weights(5), sequence_weights(6), **p),
    ),
    "policy": Quantity(policies, lambda name, **p: policy_scalars(name, 0.7, A, **p)),
    "policy by token": Quantity(
        policy_tokens, lambda name, **p: policy_scalars(name, 0.7, A, PLACES, **p)
    ),
    "trace": Quantity(per_site(kernels.trace_kernel), lambda name, **p: traces(name, A, B, **p)),
    "mean trace": Quantity(
        mean_trace,
        lambda name, **p: {k: x / oracles.VOCAB for k, x in traces(name, A, A, **p).items()},
    ),
    "probed trace": Quantity(probed, lambda name, **p: traces(name, A, B, **p), plain=False),
}
# The product with given cotangents meets every architecture tied and untied, with a metric or
# without one; the others, made of the same passes and factors, some tied and untied, and one with a
# bias. What later families add to the decoder is all in two of them.
LATER = ("gemma3_text-tied", "olmo2-untied")
TWO = ("gpt2-tied", BIASED)
MODELS = {
    "log_prob": ("gpt2-tied",),
    "log_prob by part": ("gpt2-tied", *LATER),
    "update": (*oracles.CONFIGS, BIASED),
    "update by part": ("llama-tied", BIASED),
    "tokens": ("gpt2-tied",),
    "sequences": ("gemma3_text-tied",),
    "policy": (BIASED,),
    "policy by token": ("olmo2-untied",),
    "trace": LATER,
    "mean trace": ("gpt2-tied",),
    "probed trace": (BIASED,),
}
METRIC = {q: TWO[n % 2 :][:1] for n, q in enumerate(QUANTITIES)}
METRIC |= {"update": (BIASED, "llama-tied", LATER[0]), "trace": ("gpt2-tied", "qwen2-untied")}
METRIC["tokens"] = TWO


def cases(names, quick, quantities=QUANTITIES):
    """All pairs, slow but for the quick names; some quantities have names of their own."""
    own = lambda q: names[q] if isinstance(names, dict) else names
    marks = lambda n: [] if n in quick else [pytest.mark.slow]
    pairs = [(q, n) for q in quantities for n in own(q)]
    return [pytest.param(q, n, marks=marks(n), id=f"{q}-{n}") for q, n in pairs]


@pytest.fixture
def exact_probes(monkeypatch):
    def draw(key, count, weight):
        signs = jnp.asarray(SIGNS, weight.dtype)
        return signs @ weight, signs

    monkeypatch.setattr(trace_probed, "draw_probes", draw)


def arrays_of(result):
    if isinstance(result, dict):
        return result
    return {part: getattr(result, part) for part in PARTS}


def assert_close(result, expected, tolerance):
    """Each array within `tolerance` of the largest entry expected of it."""
    found = arrays_of(result)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        got, scale = np.asarray(found[name]), np.abs(wanted).max()
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, err_msg=name)


# -- against full Jacobians -----------------------------------------------------------------------


@pytest.mark.usefixtures("x64", "exact_probes")
@pytest.mark.parametrize(("quantity", "name"), cases(MODELS, (*TWO, LATER[0])))
def test_gram(quantity, name):
    found, model_and_params = QUANTITIES[quantity], tiny_model(name)
    result = found.call(*model_and_params, method="gram")
    assert_close(result, found.expected(name), 1e-9)
    if isinstance(result, kernels.Kernel):
        assert result.representation_form == "scalar"


# The engine knows quantities by their rows' cotangents alone, which no metric changes.
PLAIN = {
    "gpt2-tied": ("log_prob", "log_prob by part", "tokens", "policy", "trace"),
    BIASED: ("log_prob by part", "update", "update by part", "sequences", "policy by token"),
    LATER[0]: ("log_prob by part",),
}
PLAIN[BIASED] += ("mean trace",)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("quantity", "name", "preconditioned"),
    [(q, name, name == BIASED) for name, quantities in PLAIN.items() for q in quantities]
    + [("log_prob", name, name != BIASED) for name in TWO],
)
def test_plain(quantity, name, preconditioned):
    """Every quantity once; tied and with a bias, each in a metric and without one."""
    found, model_and_params = QUANTITIES[quantity], tiny_model(name)
    p = metric(name) if preconditioned else None
    result = found.call(*model_and_params, method="plain", preconditioner=p)
    assert_close(result, found.expected(name, preconditioned=preconditioned), 1e-9)


@pytest.mark.usefixtures("x64", "exact_probes")
@pytest.mark.parametrize(("quantity", "name"), cases(METRIC, TWO))
def test_gram_in_a_metric(quantity, name):
    found, model_and_params = QUANTITIES[quantity], tiny_model(name)
    result = found.call(*model_and_params, method="gram", preconditioner=metric(name))
    assert_close(result, found.expected(name, preconditioned=True), 1e-9)
    if isinstance(result, kernels.Kernel):
        assert result.representation_form == "diagonal"


def test_a_metric_of_the_views_shape(x64):
    """Of an untied model that is the stored one."""
    name = "llama-tied"
    model, params = tiny_model(name)
    result = update(model, params, method="gram", preconditioner=model.view(metric(name)))
    assert_close(result, QUANTITIES["update"].expected(name, preconditioned=True), 1e-9)


def test_parts_sum_to_the_gradient_component(x64):
    model, params = tiny_model("llama-tied")
    kernel = update(model, params, method="gram", by_part=True)
    whole, total = kernel.gradient, sum(x.sum(axis=0) for x in kernel.parts.values())
    assert update(model, params, method="gram").parts is None
    np.testing.assert_allclose(total, whole, rtol=0, atol=1e-14 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("name", TWO)
def test_the_representation_of_a_token_block_in_a_metric_is_a_diagonal_that_varies(name, x64):
    model, params = tiny_model(name)
    sites, p = all_sites(), metric(name)
    result = QUANTITIES["tokens"].call(model, params, method="gram", preconditioner=p)
    features = jax.jit(model.features)(params["backbone"], sites.tokens, sites.mask)
    phi = np.asarray(features[sites.rows, sites.positions])
    head = jax.tree.map(lambda x: np.asarray(x)[CHOSEN], model.view(p)["classifier"])
    diagonal = np.einsum("kd,nd,md->nmk", head["weight"], phi[A], phi[B])
    diagonal += head.get("bias", np.zeros(2))
    expected = diagonal[..., None] * np.eye(2)
    scale = abs(expected).max()
    np.testing.assert_allclose(result.representation, expected, rtol=0, atol=1e-12 * scale)
    assert np.abs(diagonal[..., 0] - diagonal[..., 1]).max() > 0.1 * scale


def test_longer_padding_changes_nothing(x64):
    """The columns' sequences get two slots of padding more on each side."""
    name = "gpt2-tied"  # whose positions are its own parameters
    model, params = tiny_model(name)
    sites = all_sites()
    longer = dataclasses.replace(
        sites,
        tokens=jnp.pad(sites.tokens, ((0, 0), (2, 2)), constant_values=3),
        mask=jnp.pad(sites.mask, ((0, 0), (2, 2))),
        positions=sites.positions + 2,
    )
    result = kernels.log_prob_kernel(model, params, both()[0], some(longer, B), method="gram")
    assert_close(result, scalars(name, scores(name), A, B), 1e-9)


# -- in tiles of three of eight sites, and so little workspace that every block is the smallest ----


@pytest.fixture
def tiles_of_three(monkeypatch):
    monkeypatch.setattr(blocks, "tile_size", lambda *_: 3)
    monkeypatch.setattr(blocks, "tile_sizes", lambda *_: (3, 3))


def test_tiles_of_one_set_change_nothing_and_compile_once(x64, tiles_of_three):
    model, params = tiny_model("gpt2-tied")
    compiled = lambda: (gram.factorize._cache_size(), gram.contract._cache_size())
    before = compiled()
    tiled = kernels.log_prob_kernel(model, params, all_sites(), method="gram", memory_budget=8)
    assert_close(tiled, scalars("gpt2-tied", scores("gpt2-tied")), 1e-12)
    # On the diagonal the columns are the rows: a program of its own.
    assert compiled() == (before[0] + 1, before[1] + 2)


def test_tiles_of_two_sets_change_nothing(x64, tiles_of_three):
    model, params = tiny_model("gpt2-tied")
    sites = all_sites()
    tiled = kernels.trace_kernel(model, params, sites, some(sites, B), memory_budget=8)
    assert_close(tiled, traces("gpt2-tied", slice(None), B), 1e-12)


# -- precision ------------------------------------------------------------------------------------


def assert_float32(quantity, name, method="gram", preconditioned=False):
    found, model_and_params = QUANTITIES[quantity], tiny_model(name, jnp.float32)
    p = metric(name, jnp.float32) if preconditioned else None
    result = found.call(*model_and_params, method=method, preconditioner=p)
    assert all(x.dtype == jnp.float32 for x in arrays_of(result).values())
    assert_close(result, found.expected(name, preconditioned=preconditioned), 1e-4)


def test_float32():
    assert_float32("update", "gpt_neox-untied")


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_float32_in_a_metric(name):
    """What contracts in ways of its own, tied and untied with a bias."""
    for quantity in {"gpt2-tied": ("log_prob", "trace"), BIASED: ("tokens", "sequences")}[name]:
        assert_float32(quantity, name, preconditioned=True)
    if name == BIASED:
        assert_float32("log_prob", name, "plain", preconditioned=True)


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
    ("quantity", "name"),
    [
        ("trace", "gpt2-tied"),
        pytest.param("log_prob", "llama-untied", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_computation_of_float32_parameters(quantity, name):
    model, params = tiny_model(name, jnp.float32)
    half = type(model)(model.config, jnp.bfloat16)
    found = QUANTITIES[quantity]
    result = found.call(half, params, method="gram")
    assert_rounded(result, found.expected(name), model.config.num_layers)
