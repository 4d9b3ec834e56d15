"""Where norms may stand: the decoder against plain numpy, one sequence at a time, in float64."""

import dataclasses

import jax
import numpy as np
import oracles
import pytest

BLOCK = {
    "before": {"attention_norm", "mlp_norm"},
    "after": {"attention_post_norm", "mlp_post_norm"},
    "both": {"attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"},
}


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def rotated(x):
    """Heads [T, H, 4] by angles t and t / 100, in pairs of components half a head apart."""
    angles = np.arange(len(x))[:, None] * np.array([1, 1e-2])
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :2], x[..., 2:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(c, p, x):
    """Two queries' heads on the keys' one, each component of four."""
    query, key, value = (x @ p[name]["kernel"] for name in ("query", "key", "value"))
    if c.query_key_norm == "projection":
        query, key = rms(query, p["query_norm"]["scale"]), rms(key, p["key_norm"]["scale"])
    query, key, value = (y.reshape(len(x), -1, 4) for y in (query, key, value))
    if c.query_key_norm == "head":
        query, key = rms(query, p["query_norm"]["scale"]), rms(key, p["key_norm"]["scale"])
    query, key = rotated(query), rotated(key)
    mixed = []
    for head in range(2):
        scores = query[:, head] @ key[:, 0].T / 2
        weights = np.where(np.tril(np.ones_like(scores)), np.exp(scores), 0)
        mixed.append(weights / weights.sum(-1, keepdims=True) @ value[:, 0])
    return np.concatenate(mixed, axis=-1) @ p["out"]["kernel"]


def mlp(p, x):
    gate = x @ p["gate"]["kernel"]
    return gate / (1 + np.exp(-gate)) * (x @ p["up"]["kernel"]) @ p["down"]["kernel"]


def in_numpy(c, p, tokens):
    """φ [T, D] of one sequence without padding."""
    x = p["embed"]["embedding"][tokens]
    for number in range(2):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], p["layers"])
        there = BLOCK[c.norm_placement]
        norm = lambda name, x, layer=layer, there=there: (
            rms(x, layer[name]["scale"]) if name in there else x
        )
        read = norm("attention_norm", x)
        x = x + norm("attention_post_norm", attention(c, layer["attention"], read))
        x = x + norm("mlp_post_norm", mlp(layer["mlp"], norm("mlp_norm", x)))
    return rms(x, p["norm"]["scale"])


@pytest.mark.parametrize("placement", BLOCK)
@pytest.mark.parametrize("normed", ["none", "head", "projection"])
def test_norms_stand_where_the_config_says(normed, placement, x64, monkeypatch):
    config = dataclasses.replace(oracles.LLAMA, query_key_norm=normed, norm_placement=placement)
    monkeypatch.setitem(oracles.NORMED, "this", config)
    model, params = oracles.tiny_model("this")
    params = jax.tree.map(np.asarray, params["backbone"])

    layers = params["layers"]
    assert {name for name in layers if name.endswith("_norm")} == BLOCK[placement]
    sizes = {"none": {}, "head": {"query": 4, "key": 4}, "projection": {"query": 8, "key": 4}}
    found = {
        name.removesuffix("_norm"): layer["scale"].shape[1]
        for name, layer in layers["attention"].items()
        if name.endswith("_norm")
    }
    assert found == sizes[normed]

    sites = oracles.tiny_sites()
    tokens, mask = np.asarray(sites.tokens), np.asarray(sites.mask)
    got = np.asarray(jax.jit(model.features)(params, sites.tokens, sites.mask))
    for row in range(3):
        expected = in_numpy(config, params, tokens[row, mask[row]])
        np.testing.assert_allclose(got[row, mask[row]], expected, rtol=0, atol=1e-12)
