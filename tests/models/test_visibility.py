"""Rows of a prompt with its completions, and of several sequences: as in rows of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn.models import attention as module
from jaxdyn.models import positions_of
from jaxdyn.models.attention import attention
from jaxdyn.models.visibility import visible
from jaxdyn.types import Branches

P, G, S, C = 3, 2, 4, 5


def drawn():
    """Padded prompts and completions of several lengths: as rows each, and as rows that branch."""
    rng = np.random.default_rng(0)
    prompts = np.arange(S)[None] >= np.array([2, 1, 0])[:, None]
    completions = np.arange(C) < rng.integers(1, C + 1, (P, G, 1))
    ids, own = rng.integers(0, oracles.VOCAB, (P, S)), rng.integers(0, oracles.VOCAB, (P, G, C))
    each = lambda x: np.repeat(x, G, axis=0)
    apart = lambda x, y: jnp.asarray(np.concatenate([each(x), y.reshape(P * G, C)], axis=1))
    tokens = jnp.asarray(np.concatenate([ids, own.reshape(P, -1)], axis=1))
    mask = Branches(jnp.asarray(prompts), jnp.asarray(completions))
    return (apart(ids, own), apart(prompts, completions)), (tokens, mask)


def both_parts(x):
    """What is there once a prompt, and once a completion, of rows [P G, S + C] and [P, S + G C]."""
    if len(x) == P:
        return x[:, :S], x[:, S:].reshape(P * G, C, *x.shape[2:])
    return x[::G, :S], x[:, S:]


FAMILIES = {"gpt_neox-untied": "none", "llama-tied": "dots", "gpt2-untied": "full"}
FAMILIES |= {"gemma3_text-tied": "dots", "olmo2-untied": "full"}


@pytest.mark.parametrize("name, remat", FAMILIES.items())
def test_a_prompt_is_passed_once_for_its_completions(name, remat, x64):
    """Features at every token, and the gradient of all of them, which sums into the prompt."""
    model, params = oracles.tiny_model(name)
    model = dataclasses.replace(model, remat=remat)
    apart, branched = drawn()
    where = both_parts(apart[1])

    @jax.jit
    def run(backbone, apart, branched):
        def loss(backbone, tokens, mask):
            # Of G rows with the same prompt, the first one's counts.
            parts = both_parts(model.features(backbone, tokens, mask))
            prompt, own = (jnp.where(m[..., None], x, 0) for x, m in zip(parts, where, strict=True))
            return jnp.sum(jnp.tanh(own)) + jnp.sum(prompt**2), (prompt, own)

        both = jax.grad(loss, has_aux=True)
        return both(backbone, *apart), both(backbone, *branched)

    expected, found = run(params["backbone"], apart, branched)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    jax.tree.map(close, found, expected)
    places = (both_parts(positions_of(mask))[1] for mask in (apart[1], branched[1]))
    np.testing.assert_array_equal(*places)


def test_several_sequences_in_a_row_are_as_each_alone(x64):
    """With learned positions, and with a window of two tokens."""
    lengths = (4, 1, 6)
    segments = jnp.asarray([[1] * 4 + [2] + [3] * 6 + [0] * 2])
    np.testing.assert_array_equal(positions_of(segments)[0, :11], [0, 1, 2, 3, 0, *range(6)])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, oracles.VOCAB, (1, 13)))
    for name in ("gpt2-tied", "gemma3_text-tied"):
        model, params = oracles.tiny_model(name)
        features = jax.jit(model.features)
        packed = features(params["backbone"], tokens, segments)
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            padded = jnp.pad(tokens[:, rows], [(0, 0), (0, 6 - length)])
            alone = features(params["backbone"], padded, jnp.arange(6)[None] < length)
            np.testing.assert_allclose(packed[:, rows], alone[:, :length], rtol=0, atol=1e-12)
            start += length


def test_branches_open_as_rows_do(x64):
    """Inputs and cotangents of a dense layer, over slots, make the gradient."""
    model, params = oracles.tiny_model("gemma3_text-tied")
    _, (tokens, mask) = drawn()
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((*tokens.shape, 8)))

    @jax.jit
    def run(backbone):
        _, pull = jax.vjp(lambda b: model.features(b, tokens, mask), backbone)
        _, inputs, pull_outputs = model.opened(backbone, tokens, mask)
        return pull(cotangent)[0], inputs, pull_outputs(cotangent)

    gradient, inputs, outputs = run(params["backbone"])
    a, d = (x["layers"]["attention"]["key"] for x in (inputs, outputs))
    expected = gradient["layers"]["attention"]["key"]["kernel"]
    np.testing.assert_allclose(jnp.einsum("lbti,lbto->lio", a, d), expected, atol=1e-11)


@pytest.mark.parametrize("block", [256, 48])
def test_completions_attend_in_parts_and_blocks(block, x64, monkeypatch):
    """Of 150 slots, with heads that share a key head, against rows of their own."""
    monkeypatch.setattr(module, "BLOCK", block)
    prompts, generations, split, slots = 2, 3, 7, 150
    rng = np.random.default_rng(0)
    shape = lambda heads: (prompts, split + generations * slots, heads, 4)
    inputs = [jnp.asarray(rng.standard_normal(shape(heads))) for heads in (4, 2, 2)]
    tokens = jnp.asarray(np.arange(split) >= np.array([[0], [3]]))
    mask = Branches(tokens, jnp.ones((prompts, generations, slots), bool))

    def apart(x):
        each = jnp.repeat(x[:, :split], generations, axis=0)
        own = x[:, split:].reshape(prompts * generations, slots, *x.shape[2:])
        return jnp.concatenate([each, own], axis=1)

    plain = jnp.pad(
        jnp.repeat(tokens, generations, axis=0), [(0, 0), (0, slots)], constant_values=1
    )
    seen = lambda mask: jax.tree.map(lambda x: x[0], visible(mask, None))
    own = lambda *given: jnp.sin(attention(*map(apart, given), seen(plain))[:, split:])
    branched = lambda *given: jnp.sin(apart(attention(*given, seen(mask)))[:, split:])
    both = lambda f: jax.jit(jax.value_and_grad(lambda x: jnp.sum(f(*x) ** 2)))(inputs)
    for found, expected in zip(*map(jax.tree.leaves, map(both, (branched, own))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


def test_what_a_group_costs():
    """Products of prompts with themselves, and of completions with both: nothing that is hidden."""
    prompts, generations, split, slots = 1, 4, 32, 32
    x = jax.ShapeDtypeStruct((prompts, split + generations * slots, 2, 8), jnp.float32)
    ones = lambda *shape: jnp.ones(shape, bool)
    seen = visible(Branches(ones(prompts, split), ones(prompts, generations, slots)), None)
    seen = jax.tree.map(lambda x: x[0], seen)
    flops = jax.jit(lambda q: attention(q, q, q, seen)).lower(x).compile().cost_analysis()["flops"]
    pairs = split**2 + generations * slots * (split + slots)
    products = 2 * 2 * 2 * 8 * pairs  # two products, a multiplication and an addition, heads, width
    assert products < flops < 1.8 * products < 2 * 2 * 2 * 8 * (split + generations * slots) ** 2
