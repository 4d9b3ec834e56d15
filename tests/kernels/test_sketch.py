"""Sketches: unbiased and honest about their error, against kernels of float64 Jacobians."""

import dataclasses
import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats
from kernel_oracles import (
    BIASED,
    PARTS,
    A,
    B,
    all_sites,
    metric,
    rollout,
    scalars,
    scores,
    some,
    tiny_model,
)

from jaxdyn.kernels import projection, sketch
from jaxdyn.kernels.gram import factorize, parameters_of
from jaxdyn.kernels.plain import gradients
from jaxdyn.kernels.preconditioner import roots_of
from jaxdyn.kernels.rows import site_rows
from jaxdyn.kernels.sketch import Sketch, sketch_gradients, sketch_kernel, sketch_sequences
from jaxdyn.models import LanguageModel
from jaxdyn.types import JaxdynError

KEYS, REPLICATES, SIDE = 500, 64, 2
SLOW = pytest.mark.slow
# Every kind of leaf, with biases and without, of a matrix that is tied and of one that is not.
STATISTICAL = ["gpt2-tied", "gpt_neox-untied", pytest.param(BIASED, marks=SLOW)]
few = functools.partial(sketch_gradients, replicates=3, side=3)


@functools.cache
def draws(name, preconditioned):
    """Of many keys: sketches (head, body) [keys, 8, R, p²], parts [keys, 8, 8] and the error."""
    model, params = tiny_model(name)
    config, view = model.config, model.view(params)
    roots = roots_of(model, params, metric(name) if preconditioned else None)

    @jax.jit
    def compute(keys, factors):
        def one(key):
            signs = projection.draw_signs(key, view, config, REPLICATES * SIDE)
            pair = projection.sketch_factors(signs, factors, config, REPLICATES, SIDE, roots)
            *parts, error = sketch.estimate(pair, pair, tied=config.tied)
            return pair, dict(zip(PARTS, parts, strict=True)), error

        return jax.lax.map(one, keys, batch_size=50)

    factors = factorize(model, view, roots, site_rows(model, all_sites(), "sites"))
    keys = jax.random.split(jax.random.key(11), KEYS)
    return jax.tree.map(np.asarray, compute(keys, factors))


def exact(name, preconditioned=False):
    return scalars(name, scores(name), preconditioned=preconditioned)


def of_replicates(tied, head, body, row, column):
    """⟨Z_r, Z'_r⟩ of the whole gradients of two sites, [keys, R]."""
    inner = lambda x, y: np.einsum("krp,krp->kr", x[:, row], y[:, column])
    if tied:
        return inner(head + body, head + body)
    return inner(head, head) + inner(body, body)


@pytest.mark.parametrize(
    "name, preconditioned",
    [
        ("gpt2-tied", False),
        ("gpt_neox-untied", False),
        pytest.param(BIASED, False, marks=SLOW),
        pytest.param("gpt2-tied", True, marks=SLOW),
    ],
)
def test_every_component_is_unbiased(name, preconditioned, x64):
    """The mean over keys within four standard errors, which are the keys' own spread."""
    _, parts, _ = draws(name, preconditioned)
    for part, wanted in exact(name, preconditioned).items():
        if not name.endswith("-tied") and part == "cross":
            assert not parts[part].any() and not wanted.any()
            continue
        error = parts[part].std(axis=0, ddof=1) / np.sqrt(KEYS)
        assert np.all(np.abs(parts[part].mean(axis=0) - wanted) <= 4 * error), part
        # Four errors are far from the whole: half of it, or none, would be noticed.
        assert 8 * error.max() < np.abs(wanted).max(), part


@pytest.mark.parametrize("name", STATISTICAL)
def test_the_standard_error_covers(name, x64):
    """|estimate − exact| ≤ t_{0.975, R−1} SE in 95 % of the draws.

    For samples with skewness γ and excess kurtosis κ that share is, up to o(1/R),

        0.95 + (2/R) z φ(z) (κ (z² − 3)/12 − γ² (z⁴ + 2 z² − 3)/18),   z = Φ⁻¹(0.975)

    (Edgeworth expansion of Student's t; Hall 1992, section 2.6). Entries of one key go together,
    keys are independent: the error is that of the mean over keys of a key's share.
    """
    (head, body), parts, error = draws(name, False)
    wanted = sum(exact(name).values())
    entries = [(i, j) for i in range(8) for j in range(i, 8)]
    z = scipy.stats.norm.ppf(0.975)
    expected = []
    for i, j in entries:
        samples = of_replicates(name.endswith("-tied"), head, body, i, j).ravel()
        skewness, kurtosis = scipy.stats.skew(samples), scipy.stats.kurtosis(samples)
        second = kurtosis * (z**2 - 3) / 12 - skewness**2 * (z**4 + 2 * z**2 - 3) / 18
        expected.append(0.95 + 2 / REPLICATES * z * scipy.stats.norm.pdf(z) * second)
    quantile = scipy.stats.t.ppf(0.975, REPLICATES - 1)
    covered = np.abs(sum(parts.values()) - wanted) <= quantile * error
    share = covered[:, *np.transpose(entries)].mean(axis=1)
    tolerance = 4 * share.std(ddof=1) / np.sqrt(KEYS)
    assert tolerance < 0.03
    assert abs(share.mean() - np.mean(expected)) <= tolerance


def assert_variance(samples, wanted):
    """Within four standard errors of a sample variance, which come from the fourth moment."""
    centred = samples - samples.mean(axis=0)
    variance, fourth = (centred**2).mean(axis=0), (centred**4).mean(axis=0)
    error = np.sqrt((fourth - variance**2) / len(samples))
    assert np.all(np.abs(variance - wanted) <= 4 * error)
    assert error.max() < 0.1 * wanted.max()


@pytest.mark.parametrize("name", [BIASED])
def test_formed_gradients_have_the_same_sketch_as_factors(name, x64, monkeypatch):
    """P = 1, a few outputs at a time, so that the last block is not whole."""
    monkeypatch.setattr(projection, "_FORMED", 1)
    model, params = tiny_model(name)
    ones = jax.tree.map(jnp.ones_like, params)
    wanted = few(model, params, all_sites(), jax.random.key(5))
    formed = few(model, params, all_sites(), jax.random.key(5), preconditioner=ones)
    assert formed.preconditioned and sketch_kernel(formed).representation_form == "diagonal"
    for part in ("head", "body"):
        np.testing.assert_allclose(getattr(formed, part), getattr(wanted, part), atol=1e-12)
    with pytest.raises(JaxdynError, match="one metric"):
        sketch_kernel(wanted, formed)


def test_the_variance_of_a_rank_one_gradient(x64):
    """g φᵀ of an untied classifier: the formula, for every pair of sites."""
    name = "gpt_neox-untied"
    model, params = tiny_model(name)
    factors = factorize(model, params, None, site_rows(model, all_sites(), "sites"))
    u, v = np.asarray(factors.logit_cotangents)[:, 0, 0], np.asarray(factors.features)[:, 0]

    def moments(x):
        """Squared mean and variance of (Sᵀx)·(Sᵀx')."""
        inner, norms = x @ x.T, (x**2).sum(axis=1)
        return inner**2, (np.outer(norms, norms) + inner**2 - 2 * x**2 @ (x**2).T) / SIDE

    (cc, s), (dd, t) = moments(u), moments(v)
    wanted = (cc + s) * (dd + t) - cc * dd
    head = draws(name, False)[0][0]
    samples = np.einsum("kirp,kjrp->krij", head, head).reshape(-1, 8, 8)
    assert_variance(samples, wanted)


def gradient_blocks(name):
    """The backbone's gradients of the eight sites as blocks [8, I, O], vectors as squares."""
    model, params = tiny_model(name)
    whole = gradients(model, params, None, site_rows(model, all_sites(), "sites"))["backbone"]
    last = lambda x: jnp.moveaxis(x[:, 0], 0, -1)  # [(L,) ..., 8]
    matrices, vectors = [], {True: [], False: []}
    for path, leaves in parameters_of(jax.tree.map(last, whole)).items():
        for leaf in ("kernel", "embedding", "scale", "bias"):
            if leaf in leaves:
                x = np.moveaxis(np.asarray(leaves[leaf]), -1, 1)  # [L or 1, 8, ...]
                (matrices if x.ndim == 4 else vectors[path[0] == "layers"]).append(x)
    for parts in vectors.values():
        flat = np.concatenate(parts, axis=-1)
        high = int(np.ceil(np.sqrt(flat.shape[-1])))
        padded = np.pad(flat, ((0, 0), (0, 0), (0, high**2 - flat.shape[-1])))
        matrices.append(padded.reshape(*flat.shape[:2], high, high))
    return [block for layers in matrices for block in layers]


def test_the_variance_of_a_squared_norm(x64):
    """Of the backbone's gradient: the formula for signs, which is below the Gaussian bound."""
    name, p = "gpt_neox-untied", SIDE
    blocks = gradient_blocks(name)
    right, left = ([np.einsum(s, g, g) for g in blocks] for s in ("nki,nkj->nij", "nki,nli->nkl"))
    norm = sum(np.einsum("nii->n", m) for m in right)
    np.testing.assert_allclose(norm, np.diag(exact(name)["gradient"]), rtol=1e-9)
    across = sum((m**2).sum(axis=(1, 2)) for m in right)
    bound = 2 / p**2 * norm**2 + (4 / p + 2 / p**2) * across
    along = sum(np.einsum("nii,nii->n", m, m) for m in (*right, *left))
    fourth = sum((g**4).sum(axis=(1, 2)) for g in blocks)
    wanted = bound - 2 / p * (1 + 2 / p) * along + 4 / p**2 * fourth
    body = draws(name, False)[0][1]
    samples = np.einsum("kirp,kirp->kri", body, body).reshape(-1, 8)
    assert_variance(samples, wanted)
    assert np.all(wanted < bound)


@pytest.mark.parametrize("name", ["gpt2-tied"])
def test_a_completion_is_the_weighted_sum_of_its_sites(name, x64):
    model, params = tiny_model(name)
    weights = np.random.default_rng(5).standard_normal((3, 3))
    key = jax.random.key(2)
    sites = few(model, params, all_sites(), key)
    whole = sketch_sequences(
        model, params, rollout(), key, weights=jnp.asarray(weights), replicates=3, side=3
    )
    mask = np.asarray(rollout().completion_mask)
    member = np.eye(3)[:, np.nonzero(mask)[0]] * weights[mask][None]
    for path in ("head", "body"):
        wanted = np.einsum("bn,nrp->brp", member, getattr(sites, path))
        assert wanted.shape == (3, 3, 9)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(getattr(whole, path), wanted, rtol=0, atol=1e-10 * scale)


def test_given_cotangents(x64):
    model, params = tiny_model("gpt2-tied")
    key, score = jax.random.key(0), scores("gpt2-tied")
    default = few(model, params, all_sites(), key)
    given = few(model, params, all_sites(), key, cotangents=jnp.asarray(score))
    np.testing.assert_allclose(given.body, default.body, rtol=0, atol=1e-12)
    np.testing.assert_allclose(given.head, default.head, rtol=0, atol=1e-12)


def test_batches_change_nothing_and_compile_once(x64, monkeypatch):
    """Not with a generator either that draws otherwise for several rows at once."""
    model, params = tiny_model("gpt2-tied")
    key, calls = jax.random.key(3, impl="rbg"), []
    whole = few(model, params, all_sites(), key)
    monkeypatch.setattr(sketch, "_rows_at_once", lambda *_: 3)
    compiled = sketch._sketch_rows._cache_size()
    for _ in range(2):
        progress = lambda done, total: calls.append((done, total))
        pieces = few(model, params, all_sites(), key, progress=progress)
    assert sketch._sketch_rows._cache_size() == compiled + 1
    assert calls == 2 * [(1, 3), (2, 3), (3, 3)]
    assert pieces.key == whole.key
    for path in ("head", "body"):
        wanted = getattr(whole, path)
        np.testing.assert_allclose(getattr(pieces, path), wanted, rtol=0, atol=1e-12)
        assert abs(wanted).max() > 1e-3


def test_separate_calls_compare(x64, monkeypatch):
    model, params = tiny_model("gpt2-tied")
    monkeypatch.setattr(sketch, "_rows_at_once", lambda *_: 3)
    sites, key = all_sites(), jax.random.key(4)
    whole = few(model, params, sites, key)
    left, right = (few(model, params, some(sites, which), key) for which in (A, B))
    among, between = sketch_kernel(whole), sketch_kernel(left, right)
    picked = sketch_kernel(whole.take(A), whole.take(B))
    joined = Sketch.concatenate([whole.take(slice(0, 3)), whole.take(slice(3, None))])
    assert len(joined) == 8
    np.testing.assert_array_equal(joined.body, whole.body)
    for part in (*PARTS, "standard_error"):
        wanted = np.asarray(getattr(among, part))[A][:, B]
        np.testing.assert_allclose(getattr(between, part), wanted, rtol=0, atol=1e-12)
        np.testing.assert_allclose(getattr(picked, part), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2-tied", BIASED])
def test_the_standard_error_is_that_of_a_mean(name, x64):
    model, params = tiny_model(name)
    s = few(model, params, all_sites(), jax.random.key(5))
    head, body = np.asarray(s.head), np.asarray(s.body)
    inner = lambda x, y: np.einsum("nrp,mrp->rnm", x, y)
    parts = {"representation": inner(head, head), "gradient": inner(body, body)}
    parts["cross"] = inner(head, body) + inner(body, head)
    if not model.config.tied:
        parts["cross"] = 0 * parts["cross"]
    kernel = sketch_kernel(s)
    for part, each in parts.items():
        np.testing.assert_allclose(getattr(kernel, part), each.mean(axis=0), rtol=0, atol=1e-12)
    error = sum(parts.values()).std(axis=0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(kernel.standard_error, error, rtol=1e-10)


def test_a_key_decides(x64):
    model, params = tiny_model("gpt2-tied")
    first, again, other = (
        few(model, params, all_sites(), jax.random.key(seed)) for seed in (6, 6, 7)
    )
    np.testing.assert_array_equal(first.head, again.head)
    np.testing.assert_array_equal(first.body, again.body)
    assert np.abs(first.body - other.body).max() > 0.1 * np.abs(first.body).max()


def test_float32():
    """The same signs as in float64, so the same sketch up to rounding."""
    name, key = "gpt2-tied", jax.random.key(8)
    model, params = tiny_model(name, jnp.float32)
    narrow = few(model, params, all_sites(), key)
    assert narrow.body.dtype == jnp.float32
    with jax.enable_x64(True):
        model, params = tiny_model(name)
        wide = few(model, params, all_sites(), key)
    for path in ("head", "body"):
        wanted = np.asarray(getattr(wide, path))
        atol = 1e-4 * np.abs(wanted).max()
        np.testing.assert_allclose(getattr(narrow, path), wanted, rtol=0, atol=atol)


def test_cores_take_batches_of_their_own(x64, monkeypatch):
    """In threads, each a row at a time: the same, in the same order, in float64, told as found."""
    model, params = tiny_model("gpt2-tied")
    key = jax.random.key(5)
    whole = few(model, params, all_sites(), key)
    monkeypatch.setattr(sketch, "NEAR", 1)
    monkeypatch.setattr(sketch.os, "sched_getaffinity", lambda _: range(3))
    threads, told = set(), []
    run = sketch._sketch_rows

    def watched(*given, **sizes):
        threads.add(threading.get_ident())
        assert len(given[-1].tokens) == 1
        return run(*given, **sizes)

    monkeypatch.setattr(sketch, "_sketch_rows", watched)
    apart = few(model, params, all_sites(), key, progress=lambda *at: told.append(at))
    assert len(threads) > 1 and threading.get_ident() not in threads
    assert told == [(done + 1, 8) for done in range(8)]
    for path in ("head", "body"):
        assert getattr(apart, path).dtype == jnp.float64
        np.testing.assert_allclose(getattr(apart, path), getattr(whole, path), atol=1e-12)


def test_bfloat16_accumulates_in_float32():
    model, params = tiny_model("gpt2-tied", jnp.float32)
    rough = few(
        dataclasses.replace(model, dtype=jnp.bfloat16), params, all_sites(), jax.random.key(8)
    )
    fine = few(model, params, all_sites(), jax.random.key(8))
    assert rough.head.dtype == rough.body.dtype == jnp.float32
    # Cosines: a forward and a backward pass of 8-bit numbers.
    for path in ("head", "body"):
        x, y = (np.asarray(getattr(s, path)).reshape(8, -1) for s in (rough, fine))
        cosines = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert cosines.min() > 0.95


def test_signs_are_drawn_by_row_and_unpacked_by_block(x64, monkeypatch):
    """A row is drawn from a key of its own, of its matrix, layer and side; blocks (the last reaches
    back) change no product."""
    model, params = tiny_model("gpt2-tied")
    key = jax.random.key(9)
    drawn = projection.draw_signs(key, model.view(params), model.config, 70)
    paths = sorted(drawn.matrices)
    of_matrix = jax.random.split(key, len(paths) + 3)
    for number, path in enumerate(paths):
        for side, bits in enumerate(drawn.matrices[path]):
            layer, row = len(bits) - 1, bits.shape[1] - 1
            own = jax.random.split(jax.random.fold_in(of_matrix[number], layer))[side]
            wanted = jax.random.bits(jax.random.fold_in(own, row), (3,), jnp.uint32)
            np.testing.assert_array_equal(bits[layer, row], wanted)
    bits = drawn.matrices[("layers", "mlp", "up")][1][0]
    signs = np.asarray(projection.unpacked(bits, 70, jnp.float64))
    assert signs.shape == (len(bits), 70) and set(np.unique(signs)) == {-1, 1}
    assert abs(signs.mean()) < 4 / np.sqrt(signs.size)
    first = np.asarray(bits[:, 0])[:, None] >> np.arange(32) & 1
    np.testing.assert_array_equal(signs[:, :32], 1 - 2.0 * first)
    x = np.random.default_rng(0).standard_normal((2, 3, len(bits)))
    monkeypatch.setattr(projection, "SIGN_ROWS", 5)
    projected = projection._project(bits, jnp.asarray(x), 70)
    np.testing.assert_allclose(projected, np.einsum("nti,iw->ntw", x, signs), rtol=0, atol=1e-13)


def largest(jaxpr):
    """The elements of the largest array that a jaxpr makes, at any depth."""
    sizes = [x.aval.size for eqn in jaxpr.eqns for x in eqn.outvars]
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                sizes.append(largest(getattr(inner, "jaxpr", inner)))
    return max(sizes, default=0)


def test_no_gradient_of_a_site_is_formed():
    """Nothing is as large as N gradients of one layer's MLP matrix; the plain method's are."""
    config = dataclasses.replace(oracles.GPT2, width=32, mlp_width=128, tied=True)
    model = LanguageModel(config)
    view = jax.eval_shape(lambda key: model.view(model.init(key)), jax.random.key(0))
    rows = site_rows(model, all_sites(), "sites")
    limit = len(rows.tokens) * config.width * config.mlp_width
    run = functools.partial(sketch._sketch_rows, model, replicates=4, side=4)
    signs = jax.eval_shape(lambda: projection.draw_signs(jax.random.key(0), view, config, 16))
    assert largest(jax.make_jaxpr(run)(view, None, signs, rows).jaxpr) < limit / 2
    plain = lambda view, rows: gradients(model, view, None, rows)
    assert largest(jax.make_jaxpr(plain)(view, rows).jaxpr) >= limit


def test_what_a_caller_can_get_wrong(x64):
    model, params = tiny_model("gpt_neox-untied")
    sites, key = all_sites(), jax.random.key(0)
    for options, message in [
        ({"replicates": 1}, "replicates must be at least 2, .* got 1"),
        ({"side": 0}, "side must be at least 1, got 0"),
        ({"cotangents": jnp.zeros((8, 3))}, r"cotangents must be \[N, V\] = \(8, 11\)"),
        ({"memory_budget": 10}, "memory_budget is too small for one row.* got 10"),
    ]:
        with pytest.raises(JaxdynError, match=message):
            few(model, params, sites, key, **options)
    outside = dataclasses.replace(sites, positions=sites.positions + 6)
    with pytest.raises(JaxdynError, match=r"sites\.positions"):
        few(model, params, outside, key)
    with pytest.raises(JaxdynError, match="weights of rollout"):
        sketch_sequences(model, params, rollout(), key, weights=jnp.zeros((3, 2)))


def test_sketches_that_do_not_compare():
    blank = lambda key=(1, 2), config="model", replicates=2, size=4: Sketch(
        jnp.zeros((3, replicates, size)), jnp.zeros((3, replicates, size)), key, config
    )
    for other, message in [
        (blank(key=(1, 3)), r"the same key, got \(1, 2\) and \(1, 3\)"),
        (blank(replicates=3), r"the same replicates and side, got \(2, 2\) and \(3, 2\)"),
        (blank(size=9), r"the same replicates and side, got \(2, 2\) and \(2, 3\)"),
        (blank(config="other"), "the same model configuration"),
    ]:
        with pytest.raises(JaxdynError, match=message):
            sketch_kernel(blank(), other)
        with pytest.raises(JaxdynError, match=message):
            Sketch.concatenate([blank(), other])
    with pytest.raises(JaxdynError, match="at least one sketch"):
        Sketch.concatenate([])


def test_batches_fill_the_budget():
    """As many rows as fit, then evened out: 5, 6 and 7 of eight become four and four."""
    model, _ = tiny_model("gpt_neox-untied", jnp.float32)
    rows = site_rows(model, all_sites(), "sites")
    fits = lambda budget: sketch._rows_at_once(model, rows, 3, 3, budget)
    with pytest.raises(JaxdynError) as told:
        fits(0)
    needed = int(re.search(r"about (\d+) bytes", str(told.value)).group(1))
    with pytest.raises(JaxdynError):
        fits(needed - 1)
    found = [fits(budget) for budget in range(needed, 8 * needed, needed // 100)]
    assert found[0] == 1 and sorted(found) == found
    assert set(found) == {1, 2, 3, 4, 8}
