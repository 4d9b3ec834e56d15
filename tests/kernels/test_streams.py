"""Rows whose layers are opened one at a time: the same numbers, in less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from kernel_oracles import MILLION, compiled_bytes, shaped_rows

from jaxdyn import kernels
from jaxdyn.kernels import blocks, contractions, gram, memory, streams
from jaxdyn.kernels.rows import site_rows, with_chosen
from jaxdyn.models import LanguageModel
from jaxdyn.types import JaxdynError


def both_ways(model, sides, square=False):
    """Kernels by `contract` and by `contract_streams`, of sides (params, roots, rows)."""
    c = model.config
    options = {"tied": c.tied, "biased": c.classifier_bias, "workspace": 2**12}
    given = [(model.view(params), roots, rows) for params, roots, rows in sides]
    whole = [gram.factorize(model, *side) for side in given]
    parts = [streams.Side(*side[:2], streams.stream(model, *side)) for side in given]
    if square:
        whole, parts = [whole[0], None], [parts[0], None]
    expected = gram.contract(*given[0][:2], *whole, **options)
    return streams.contract_streams(model, *parts, **options), expected


@pytest.mark.parametrize(
    "name, square",
    [
        ("gpt_neox-untied", False),
        ("llama-tied", True),
        ("gemma3_text-tied", False),
        ("olmo2-untied", True),
    ],
)
def test_a_layer_at_a_time_is_all_at_once(name, square, x64):
    """Of three functions a row, padded on either side, other parameters for the columns."""
    model, params = oracles.tiny_model(name)
    rows = with_chosen(
        site_rows(model, oracles.tiny_sites(), ""), jnp.asarray([1, 4, 7]), oracles.VOCAB
    )
    few = jax.tree.map(lambda x: x[:3] if x is not None else None, rows)
    other = jax.tree.map(lambda x: 1.1 * x, params)
    found, expected = both_ways(model, [(params, None, rows), (other, None, few)], square)
    assert found.keys() == expected.keys()
    for kind, x in expected.items():
        scale = float(jnp.abs(x).max())
        assert scale > 0 or (kind == "cross" and not model.config.tied)
        np.testing.assert_allclose(found[kind], x, rtol=0, atol=1e-12 * scale, err_msg=kind)


@pytest.mark.parametrize("name", ["gpt_neox-untied", "gemma3_text-tied"])
def test_in_a_metric(name, x64):
    model, params = oracles.tiny_model(name)
    draws = np.random.default_rng(4)
    roots = jax.tree.map(lambda x: jnp.asarray(draws.uniform(0, 2, x.shape)), model.view(params))
    rows = site_rows(model, oracles.tiny_sites(), "")
    found, expected = both_ways(model, [(params, roots, rows)] * 2)
    plain = both_ways(model, [(params, None, rows)] * 2)[0]
    for kind, x in expected.items():
        np.testing.assert_allclose(found[kind], x, rtol=0, atol=1e-12 * float(jnp.abs(x).max()))
        assert kind == "cross" or not np.allclose(found[kind], plain[kind])


def deep_model(**changes):
    """Twelve layers, so that a stream is much less than the factors."""
    config = dataclasses.replace(oracles.CONFIGS["llama-tied"], num_layers=12, **changes)
    model = LanguageModel(config)
    return model, model.init(jax.random.key(0))


def tiles_of(monkeypatch):
    """What `_tiles` answers from here on."""
    found = []
    ask = contractions._tiles
    monkeypatch.setattr(
        contractions, "_tiles", lambda *given: found.append(ask(*given)) or found[-1]
    )
    return found


def test_the_way_that_takes_less_work(monkeypatch):
    """Factors where they fit at once; where they would be made again and again, streams: of as
    many bytes tiles are larger, and the numbers are the same."""
    model, params = deep_model()
    sites = jax.tree.map(lambda x: jnp.tile(x, 8) if x.ndim == 1 else x, oracles.tiny_sites())
    found = tiles_of(monkeypatch)
    kernel = functools.partial(kernels.log_prob_kernel, model, params, sites, method="gram")
    once = kernel(memory_budget=2**30)
    row, _ = gram.row_bytes(model, 6, 1, 1)
    again = kernel(memory_budget=12 * row)
    (whole, first), (tiles, second) = found
    assert (first, second) == (False, True)
    assert blocks.turns(whole) == (40, 40) and whole.high == 40
    needs = [gram.row_bytes(model, 6, 1, 1)]
    factors = blocks.tiling(tiles.rows, None, needs, 12 * row, "cpu")
    assert tiles.high > 2 * factors.high
    scale = float(jnp.abs(once.total).max())
    np.testing.assert_allclose(again.total, once.total, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "name, slots, outputs", [("gpt_neox-untied", 64, 1), ("llama-tied", 64, 3)]
)
def test_streamed_tiles_stay_within_the_budget_and_fill_it(name, slots, outputs):
    """By XLA's account of making a second tile beside one that is held, and of both multiplied."""
    sizes = {"vocab_size": 512, "width": 128, "num_heads": 8, "head_dim": 16, "mlp_width": 512}
    config = dataclasses.replace(
        oracles.CONFIGS[name], **sizes, num_kv_heads=8, num_layers=12, max_positions=slots
    )
    model, budget = LanguageModel(config), 200 * MILLION
    view = jax.eval_shape(lambda key: model.view(model.init(key)), jax.random.key(0))
    workspace, spare = memory.workspace_of(budget, "cpu")
    size = memory.tile_size(1000, *streams.stream_bytes(model, slots, 1, outputs), budget - spare)
    rows = shaped_rows(size, slots, 1, outputs)
    made = jax.eval_shape(functools.partial(streams.stream, model), view, None, rows)
    one = memory.nbytes(made) - memory.nbytes(made.mask)
    side = streams.Side(view, None, made)
    options = {"tied": config.tied, "biased": False, "workspace": workspace}
    peaks = [
        one + compiled_bytes(streams.stream, model, view, None, rows),
        2 * one + compiled_bytes(streams.contract_streams, model, side, side, **options),
    ]
    assert budget / 4 <= max(peaks) <= budget, [peak / budget for peak in peaks]


def test_a_budget_too_small_for_either():
    model, params = deep_model()
    with pytest.raises(JaxdynError, match="too small for one site"):
        kernels.log_prob_kernel(
            model, params, oracles.tiny_sites(), method="gram", memory_budget=2000
        )
