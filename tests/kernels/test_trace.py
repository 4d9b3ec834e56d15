"""The trace by probes: without bias, with an honest standard error, in groups of passes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy
from kernel_oracles import (
    BIASED,
    A,
    B,
    all_sites,
    assert_components,
    some,
    theta,
    tiny_model,
    traces,
)

from jaxdyn import kernels
from jaxdyn.kernels import blocks, passes, trace_probed
from jaxdyn.types import JaxdynError

V = oracles.VOCAB
TWO = ["gpt2-tied", BIASED]


def estimated(name, rows=A, columns=B, **options):
    model, params = tiny_model(name)
    both = some(all_sites(), rows), some(all_sites(), columns)
    return kernels.trace_kernel(model, params, *both, **options)


def of_probes(name, signs):
    """εᵀ Θ ε of the parts that are estimated, by component and in all, [probes, rows, columns]."""
    kernel = theta(name, False)
    one = lambda x: np.einsum("sv,nvmw,sw->snm", signs, x, signs, optimize=True)[:, A][:, :, B]
    found = {part: one(kernel[part]) for part in ("gradient", "cross")}
    return found, found["gradient"] + found["cross"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_probes_in_groups_and_tiles(name, x64, monkeypatch):
    """Given signs, to the last digits; of 16 whose second moments are I the mean is the trace."""
    signs = jnp.asarray(scipy.linalg.hadamard(16)[:, :V], jnp.float64)
    probes = lambda key, count, weight: ((signs @ weight)[:count], signs[:count])
    monkeypatch.setattr(trace_probed, "draw_probes", probes)
    monkeypatch.setattr(passes, "GROUP", 8)
    monkeypatch.setattr(blocks, "tile_size", lambda *_: 3)
    monkeypatch.setattr(blocks, "tile_sizes", lambda *_: (3, 3))
    for count in (16, 8):
        found, total = of_probes(name, np.asarray(signs[:count]))
        expected = {part: x.mean(axis=0) for part, x in found.items()}
        expected["representation"] = traces(name, A, B)["representation"]
        if count == 16:
            exact = traces(name, A, B)
            for part in exact:
                np.testing.assert_allclose(expected[part], exact[part], rtol=0, atol=1e-12)
        result = estimated(name, num_probes=count, key=jax.random.key(0), mean=True)
        assert_components(result, {part: x / V for part, x in expected.items()}, 1e-9)
        error = total.std(axis=0, ddof=1) / np.sqrt(count) / V
        np.testing.assert_allclose(result.standard_error, error, rtol=1e-9)


@pytest.mark.slow
def test_rows_of_the_factor_in_groups_and_tiles(x64, monkeypatch, tmp_path):
    """Eight rows of R in groups of three: passes that are done are not made again."""
    monkeypatch.setattr(passes, "GROUP", 3)
    monkeypatch.setattr(blocks, "tile_size", lambda *_: 2)
    monkeypatch.setattr(blocks, "tile_sizes", lambda *_: (2, 2))
    expected, done = traces("gpt2-tied", A, B), []

    def progress(*at):
        done.append(at)
        if len(done) == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        estimated("gpt2-tied", blocks=tmp_path, progress=progress)
    result = estimated("gpt2-tied", blocks=tmp_path, progress=lambda *at: done.append(at))
    assert_components(result, expected, 1e-9)
    # Two by two tiles, three groups: four tiles and two, then those two again, and on.
    assert done[:6] == [(k, 12) for k in range(1, 7)]
    assert done[6:] == [(4, 12), *((k, 12) for k in range(6, 13))]


def every_sign():
    """All 2¹¹ vectors of signs: what probes are drawn from."""
    return 1 - 2 * ((np.arange(2**V)[:, None] >> np.arange(V)[None]) & 1)


@pytest.mark.parametrize("name", TWO)
def test_many_probes_are_within_four_standard_errors(name, x64):
    """And the standard error is the distribution's own, as far as m draws know it."""
    count = 256
    result = estimated(name, num_probes=count, key=jax.random.key(1))
    found, total = of_probes(name, every_sign())
    exact = traces(name, A, B)
    np.testing.assert_allclose(result.representation, exact["representation"], rtol=1e-12)
    for part, x in found.items():
        np.testing.assert_allclose(x.mean(axis=0), exact[part], rtol=0, atol=1e-9)
        error = x.std(axis=0) / np.sqrt(count)
        assert (np.abs(getattr(result, part) - exact[part]) <= 4 * error).all()
    variance, centred = total.var(axis=0), total - total.mean(axis=0)
    kurtosis = (centred**4).mean(axis=0) / variance**2
    spread = np.sqrt((kurtosis - 1) / count)  # the relative standard deviation of a variance
    ratio = np.asarray(result.standard_error) ** 2 * count / variance
    assert (np.abs(ratio - 1) <= 4 * spread).all()


@pytest.mark.slow
def test_the_interval_covers_as_often_as_it_should(x64):
    """95 % of Student's t over 100 keys, as often as for means of the exact distribution."""
    count, keys = 24, 100
    width = scipy.stats.t.ppf(0.975, count - 1)
    exact = sum(traces("gpt2-tied", A, B).values())
    inside = np.zeros(exact.shape)
    for seed in range(keys):
        result = estimated("gpt2-tied", num_probes=count, key=jax.random.key(seed))
        inside += np.abs(result.total - exact) <= width * np.asarray(result.standard_error)
    _, total = of_probes("gpt2-tied", every_sign())
    rng = np.random.default_rng(0)
    drawn = total[rng.integers(0, len(total), (4000, count))]
    error = drawn.std(axis=1, ddof=1) / np.sqrt(count)
    nominal = (np.abs(drawn.mean(axis=1) - total.mean(axis=0)) <= width * error).mean(axis=0)
    assert (nominal > 0.9).all()
    # 4.5 standard deviations of a share of 100: sixteen pairs are looked at.
    assert (np.abs(inside / keys - nominal) <= 4.5 * np.sqrt(nominal * (1 - nominal) / keys)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_probes": 1, "key": True}, "at least 2, for a standard error, got 1"),
        ({"num_probes": 4}, "num_probes and key go together"),
        ({"key": True}, "num_probes and key go together"),
        ({"num_probes": 4, "key": True, "method": "plain"}, "'plain' takes no probes"),
    ],
)
def test_probes_that_are_refused(options, message):
    if "key" in options:
        options = {**options, "key": jax.random.key(0)}
    model, params = tiny_model("gpt2-tied", jnp.float32)
    with pytest.raises(JaxdynError, match=message):
        kernels.trace_kernel(model, params, all_sites(), **options)


def test_an_exact_trace_has_no_standard_error(x64):
    result = estimated("gpt_neox-untied", method="plain")
    assert result.standard_error is None
    assert result.representation_form == "scalar"
