"""Θ times a field, and Θ's eigenpairs, against full float64 Jacobians."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from kernel_oracles import (
    BIASED,
    PARTS,
    A,
    B,
    all_sites,
    assert_components,
    metric,
    random_cotangents,
    scalars,
    some,
    theta,
    tiny_model,
)

from jaxdyn.kernels import branches, operator
from jaxdyn.kernels.eigenpairs import top_eigenpairs
from jaxdyn.kernels.operator import apply_kernel
from jaxdyn.models import LanguageModel
from jaxdyn.types import JaxdynError, Sites

QUICK = ("gpt_neox-untied", "gpt2-tied")
TWO = ["gpt2-tied", BIASED]
V = oracles.VOCAB


def times(kernels, field, rows=slice(None), columns=slice(None)):
    """[Σ_j Θ_ij v_j] by component."""
    return {
        part: np.einsum("nvmw,mw->nv", kernels[part][rows][:, :, columns], field) for part in PARTS
    }


def room_for(model, slots, most, sequences):
    """A budget for so many sequences at a time, of T slots and at most so many sites each."""
    return sequences * operator.sequence_bytes(model, slots, most)


def one_at_a_time(model):
    return {"memory_budget": room_for(model, 6, 3, 1)}


def longer(sites):
    """The same sites with two slots of padding more on either side."""
    return dataclasses.replace(
        sites,
        tokens=jnp.pad(sites.tokens, ((0, 0), (2, 2)), constant_values=3),
        mask=jnp.pad(sites.mask, ((0, 0), (2, 2))),
        positions=sites.positions + 2,
    )


@pytest.mark.parametrize("name", TWO)
def test_apply_is_the_kernel_times_the_field(name, x64):
    """Two sets of sites, several a sequence, padded differently, a sequence at a time or two."""
    model, params = tiny_model(name)
    sites, field = all_sites(), random_cotangents()[B]
    expected = times(theta(name, False), field, A, B)
    apply = functools.partial(apply_kernel, model, params, some(sites, A), field)
    result = apply(some(longer(sites), B), memory_budget=room_for(model, 10, 3, 2))
    assert_components(result, expected, 1e-9)
    assert not result.preconditioned
    assert (np.abs(result.cross).max() > 0) == model.config.tied


@pytest.mark.parametrize("name", TWO)
def test_apply_in_a_metric(name, x64):
    """P as stored and as a view; a tied matrix's P is that of both its paths."""
    model, params = tiny_model(name)
    p_stored = metric(name)
    expected = times(theta(name, True), random_cotangents())
    for p in (p_stored, model.view(p_stored)):
        result = apply_kernel(
            model, params, all_sites(), random_cotangents(), preconditioner=p,
            memory_budget=room_for(model, 6, 3, 2),
        )  # fmt: skip
        assert_components(result, expected, 1e-9)
        assert result.preconditioned


@pytest.mark.parametrize("sequences", [1, 2, 50])
def test_batches_change_nothing(sequences, x64):
    """Sites in an order that is not their sequences', and one sequence with none."""
    model, params = tiny_model("gpt2-tied")
    order = np.array([7, 0, 5, 6, 1, 0])
    sites, field = some(all_sites(), order), random_cotangents()[:6]
    budget = room_for(model, 6, 4, sequences)
    assert len(operator.batches_of(model, sites, "sites", {"memory_budget": budget}).real) == (
        2 if sequences == 1 else 1
    )
    result = apply_kernel(model, params, sites, field, memory_budget=budget)
    assert_components(result, times(theta("gpt2-tied", False), field, order, order), 1e-12)


@pytest.mark.parametrize("name", ["gemma3_text-tied"])
def test_a_prompt_is_passed_once_for_its_sequences(name, x64, monkeypatch):
    """Three sequences of one prompt and two of another, of which one has no site."""
    model, params = oracles.tiny_model(name)
    sites = oracles.branching_sites()
    joined = branches.branched(sites)
    assert joined.tokens.shape == (2, 6 + 3 * 3)
    assert joined.mask.completions.sum() == sites.mask[:4, 6:].sum()
    field = np.random.default_rng(8).standard_normal((6, V))
    found = apply_kernel(model, params, sites, field)
    monkeypatch.setattr(branches, "LEAST_GAIN", np.inf)
    assert branches.branched(sites) is sites
    wanted = apply_kernel(model, params, sites, field)
    assert np.abs(wanted.total).max() > 0
    assert_components(found, {part: getattr(wanted, part) for part in PARTS}, 1e-10)


def test_batches_hold_every_site_once(x64):
    model, _ = tiny_model("gpt2-tied")
    sites = some(all_sites(), np.array([7, 0, 5, 6, 1]))  # three of one sequence, two of another
    batches = operator.batches_of(model, sites, "sites", one_at_a_time(model))
    assert batches.sites["tokens"].shape == (2, 1, 6) and batches.numbers.shape == (2, 3)
    assert sorted(batches.numbers[batches.real]) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(batches.numbers.ravel()[batches.places], np.arange(5))
    for k, s in zip(*np.nonzero(batches.real), strict=True):
        n = batches.numbers[k, s]
        row = batches.sites["rows"][k, s]
        np.testing.assert_array_equal(batches.sites["tokens"][k, row], sites.tokens[sites.rows[n]])
        assert batches.sites["positions"][k, s] == sites.positions[n]


def test_float32():
    """Tied; the eigenpairs' is untied."""
    name = "llama-tied"
    model, params = tiny_model(name, jnp.float32)
    field = random_cotangents()
    result = apply_kernel(model, params, all_sites(), field)
    assert result.total.dtype == jnp.float32
    assert_components(result, times(theta(name, False), field), 1e-4)


def test_a_second_call_compiles_nothing(x64):
    model, params = tiny_model("gpt_neox-untied")
    sites, field = all_sites(), random_cotangents()
    apply_kernel(model, params, sites, field, memory_budget=room_for(model, 6, 3, 2))
    before = operator.apply._cache_size()
    again = apply_kernel(model, params, sites, 2 * field, memory_budget=room_for(model, 6, 3, 2))
    assert operator.apply._cache_size() == before
    assert_components(again, times(theta("gpt_neox-untied", False), 2 * field), 1e-9)


def test_memory_does_not_grow_with_the_sequences(x64):
    """Four times as many, one at a time: what is added is less than a tenth of a gradient each."""
    model, params = tiny_model("gpt2-tied")
    sites = all_sites()
    copies = lambda x: jnp.concatenate([x] * 4)
    many = jax.tree.map(copies, sites)
    many = dataclasses.replace(many, rows=many.rows + 3 * jnp.repeat(jnp.arange(4), 8))

    def needed(sites):
        batches = operator.batches_of(model, sites, "sites", one_at_a_time(model))
        field = jnp.ones((len(batches.places), V))
        lowered = operator.apply.lower(model, model.view(params), None, batches, None, field)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    gradient = sum(x.nbytes for x in jax.tree.leaves(params))
    assert needed(many) - needed(sites) < 9 * gradient / 10


@pytest.mark.parametrize("name, slots", [("llama-tied", 384)])
def test_batches_stay_within_the_budget_and_fill_it(name, slots):
    """Beside it two vectors of the parameters' size, by XLA's own account of the product."""
    sizes = {"vocab_size": 2048, "width": 128, "num_heads": 8, "head_dim": 16, "mlp_width": 512}
    config = dataclasses.replace(
        oracles.CONFIGS[name], **sizes, num_kv_heads=8, max_positions=slots
    )
    model, n = LanguageModel(config, remat="none"), jnp.arange(64, dtype=jnp.int32)
    sites = Sites(
        jnp.zeros((64, slots), jnp.int32), jnp.ones((64, slots), bool), n,
        jnp.full(64, slots - 1), jnp.zeros(64, jnp.int32), n == n,
    )  # fmt: skip
    budget = room_for(model, slots, 1, 8)
    batches = operator.batches_of(model, sites, "sites", {"memory_budget": budget})
    assert batches.sites["tokens"].shape == (8, 8, slots)
    view = jax.eval_shape(lambda key: model.view(model.init(key)), jax.random.key(0))
    field = jax.ShapeDtypeStruct((64, 2048), jnp.float32)
    lowered = operator.apply.lower(model, view, None, batches, None, field)
    peak = lowered.compile().memory_analysis().temp_size_in_bytes
    peak -= 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(view))
    assert budget / 4 <= peak <= budget, peak / budget


# Eigenvalues of Θ [NV, NV] by LAPACK. Lanczos meets the first V − D = 3 fold eigenvalue, the
# largest of ⟨φ, φ'⟩, only after D = 8 others.
@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("component", ["total", "gradient"])
def test_eigenpairs(name, component, x64):
    model, params = tiny_model(name)
    kernels = theta(name, False)
    kernels = {**kernels, "total": sum(kernels[part] for part in PARTS)}
    matrix = kernels[component].reshape(8 * V, 8 * V)
    values = np.linalg.eigvalsh(matrix)[::-1]
    found = top_eigenpairs(model, params, all_sites(), 5, component=component, tolerance=1e-10)
    np.testing.assert_allclose(found.values, values[:5], rtol=1e-9)
    vectors = found.vectors.reshape(5, 8 * V)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-9)
    off = np.linalg.norm(vectors @ matrix - found.values[:, None] * vectors, axis=1)
    assert off.max() < 1e-9 * values[0]
    np.testing.assert_allclose(found.residuals, off, rtol=0, atol=1e-12 * values[0])


def test_the_total_repeats_the_features_eigenvalues(x64):
    """What the module says of an untied model: V − D of each, after D or more that are larger."""
    kernels = theta("gpt_neox-untied", False)
    matrix = (kernels["representation"] + kernels["gradient"]).reshape(8 * V, 8 * V)
    values = np.linalg.eigvalsh(matrix)[::-1]
    largest = np.linalg.eigvalsh(kernels["representation"][:, 0, :, 0])[-1]
    equal = np.isclose(values, largest, rtol=1e-9)
    assert equal.sum() == V - 8
    assert (values[~equal] > largest).sum() >= 8


def test_eigenpairs_in_a_metric_and_of_cotangents(x64):
    model, params = tiny_model("gpt2-tied")
    g = random_cotangents()
    kernel = sum(theta("gpt2-tied", True).values())
    kernel = np.einsum("nv,nvmw,mw->nm", g, kernel, g)
    values, vectors = np.linalg.eigh(kernel)
    found = top_eigenpairs(
        model,
        params,
        all_sites(),
        3,
        cotangents=g,
        preconditioner=metric("gpt2-tied"),
        memory_budget=room_for(model, 6, 3, 2),
        tolerance=1e-10,
    )
    np.testing.assert_allclose(found.values, values[::-1][:3], rtol=1e-9)
    overlap = np.abs(found.vectors @ vectors[:, ::-1][:, :3])
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-6)


def test_eigenpairs_of_one_component_with_cotangents(x64):
    model, params = tiny_model("gpt_neox-untied")
    g = random_cotangents()
    for component in ("representation", "gradient"):
        kernel = scalars("gpt_neox-untied", g)[component]
        found = top_eigenpairs(
            model, params, all_sites(), 7, cotangents=g, component=component, tolerance=1e-10
        )
        np.testing.assert_allclose(found.values, np.linalg.eigvalsh(kernel)[:0:-1], rtol=1e-9)


def test_eigenpairs_in_float32_say_how_far_they_are():
    model, params = tiny_model("gpt_neox-untied", jnp.float32)
    first, again = (top_eigenpairs(model, params, all_sites(), 3) for _ in range(2))
    np.testing.assert_array_equal(first.vectors, again.vectors)
    kernels = theta("gpt_neox-untied", False)
    matrix = (kernels["representation"] + kernels["gradient"]).reshape(8 * V, 8 * V)
    values = np.linalg.eigvalsh(matrix)[::-1][:3]
    np.testing.assert_allclose(first.values, values, rtol=1e-4)
    assert np.all(first.residuals < 2e-4 * values)


def test_what_cannot_be_applied(x64):
    model, params = tiny_model("gpt_neox-untied")
    sites, field = all_sites(), random_cotangents()
    apply = functools.partial(apply_kernel, model, params, sites)
    with pytest.raises(JaxdynError, match=r"field must be \[M, V\] = \(4, 11\), got \(8, 11\)"):
        apply(field, some(sites, B))
    with pytest.raises(JaxdynError, match=r"too small for one sequence: .* bytes, got 10$"):
        apply(field, memory_budget=10)
    with pytest.raises(JaxdynError, match="the parameters' own shapes"):
        apply(field, preconditioner={"backbone": params["backbone"]})
    outside = dataclasses.replace(sites, positions=sites.positions + 2)
    with pytest.raises(JaxdynError, match=r"sites_b.positions\[2\] is 6"):
        apply(field, outside)


def test_eigenpairs_that_cannot_be(x64):
    model, params = tiny_model("gpt_neox-untied")
    top = functools.partial(top_eigenpairs, model, params, all_sites())
    with pytest.raises(JaxdynError, match=r"k must be from 1 to 87.* got 88"):
        top(88)
    with pytest.raises(JaxdynError, match=r"k must be from 1 to 7.* got 0"):
        top(0, cotangents=random_cotangents())
    with pytest.raises(JaxdynError, match=r"cotangents must be \[N, V\] = \(8, 11\), got \(8,\)"):
        top(1, cotangents=np.ones(8))
    with pytest.raises(JaxdynError, match=r"component must be one of .* got 'head'"):
        top(1, component="head")
    with pytest.raises(JaxdynError, match="repeats each eigenvalue"):
        top(1, component="representation")
    with pytest.raises(JaxdynError, match=r"tolerance must be between 0 and 1, got 0\.0"):
        top(1, tolerance=0.0)
    with pytest.raises(JaxdynError, match=r"[0-9]+ of 9 eigenvalues converged to 1e-14 in 1 rest"):
        top(9, tolerance=1e-14, max_restarts=1)
    with pytest.raises(JaxdynError, match="the kernel must be finite and not zero"):
        top(1, cotangents=np.zeros((8, V)))
