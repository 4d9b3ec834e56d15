"""Tiny models of every architecture, and the plainest computation of what the package is about.

Everything here is brute force in float64: full Jacobians, explicit contractions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.models import (
    LanguageModel,
    LoraConfig,
    add_adapters,
    gemma3_text,
    gpt2,
    gpt_neox,
    llama,
    olmo2,
    qwen2,
)
from jaxdyn.types import Sites

VOCAB = 11
SIZES = {"vocab_size": VOCAB, "width": 8, "num_layers": 2, "num_heads": 2, "max_positions": 32}
NEOX = gpt_neox(**SIZES, rotary_fraction=0.5)
LLAMA = llama(**SIZES, num_kv_heads=1, norm_eps=1e-5)
QWEN2 = qwen2(**SIZES, norm_eps=1e-5)
GPT2 = gpt2(**SIZES, tied=False)
CONFIGS = {
    f"{config.architecture}-{'tied' if tied else 'untied'}": dataclasses.replace(config, tied=tied)
    for config in (NEOX, LLAMA, QWEN2, GPT2)
    for tied in (False, True)
}
# Norms of heads or of whole projections, before and after sublayers; (1 + s) norms, embeddings
# times √width, scores by another root, a window and a rotary base of its own in a layer of two.
GEMMA3 = gemma3_text(
    **SIZES,
    num_kv_heads=1,
    norm_eps=1e-5,
    attention_scalar=3,
    rotary_base=100.0,
    window_rotary_base=10.0,
    window=2,
    windowed=(True, False),
)
NORMED = {"gemma3_text-tied": GEMMA3, "olmo2-untied": olmo2(**SIZES, num_kv_heads=1)}


@functools.cache
def shapes_of(config):
    """The parameters' shapes, whatever their type."""
    return jax.eval_shape(LanguageModel(config).init, jax.random.key(0))


def tiny_model(name, dtype=jnp.float64):
    """A model and random parameters far from their small initial values."""
    config = {**CONFIGS, **NORMED}[name]
    return LanguageModel(config, dtype), jax.tree.map(lambda x: x, drawn(config, dtype))


@functools.cache
def drawn(config, dtype):
    shapes = shapes_of(config)
    rng = np.random.default_rng(0)
    gain = 0.0 if config.norm == "zero_centered_rms" else 1.0
    draw = lambda path, x: jnp.asarray(
        (gain if "scale" in str(path) else 0.0) + 0.3 * rng.standard_normal(x.shape), dtype
    )
    return jax.tree_util.tree_map_with_path(draw, shapes)


def adapted_model(name, dtype=jnp.float64, **where):
    """A tiny model with adapters in both parts (or as `where` says), B far from its zero start."""
    where = {"backbone": True, "classifier": True} | where
    config = LoraConfig(rank=3, alpha=4.5)
    model, params = add_adapters(*tiny_model(name, dtype), config, jax.random.key(1), **where)
    rng = np.random.default_rng(7)
    draw = lambda path, x: (
        jnp.asarray(0.2 * rng.standard_normal(x.shape), dtype) if "lora" in str(path) else x
    )
    return model, jax.tree_util.tree_map_with_path(draw, params)


def branching_sites() -> Sites:
    """Six sites of three sequences of one prompt and two of another, of which one has none."""
    rng = np.random.default_rng(8)
    prompts = rng.integers(0, VOCAB, (2, 6))[[0, 0, 1, 0, 1]]
    tokens = np.concatenate([prompts, rng.integers(0, VOCAB, (5, 3))], axis=1)
    mask = np.ones((5, 9), bool)
    mask[[2, 4], :2], mask[3, 8] = False, False
    rows, positions = np.array([0, 0, 1, 2, 3, 3]), np.array([5, 7, 6, 5, 5, 6])
    ids = lambda x: jnp.asarray(x, jnp.int32)
    places = ids(rows), ids(positions), ids(rng.integers(0, VOCAB, 6))
    return Sites(ids(tokens), jnp.asarray(mask), *places, jnp.asarray(positions == 5))


def tiny_sites():
    """Five sites in three sequences, padded on the left and on the right."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (3, 6))
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool)
    rows, positions = np.array([0, 0, 1, 2, 2]), np.array([2, 5, 3, 1, 4])
    return Sites(
        tokens=jnp.asarray(tokens, jnp.int32),
        mask=jnp.asarray(mask),
        rows=jnp.asarray(rows, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        targets=jnp.asarray(rng.integers(0, VOCAB, 5), jnp.int32),
        is_prompt=jnp.asarray([True, False, True, True, False]),
    )


@functools.partial(jax.jit, static_argnums=0)
def site_logits(model, view, sites):
    """f at the sites, [N, V], straight from the model's two functions."""
    phi = model.features(view["backbone"], sites.tokens, sites.mask)
    return model.logits(view["classifier"], phi)[sites.rows, sites.positions]


def path_jacobians(model, params, sites):
    """∂f/∂θ by path: {"head": [N, V, Vd], "body": [N, V, P]} of an untied view, flattened.

    For a tied model the shared matrix is a column block of both.
    """
    view = model.view(params)

    def logits(classifier, backbone):
        return site_logits(model, {"classifier": classifier, "backbone": backbone}, sites)

    both = jax.jacrev(logits, argnums=(0, 1))(view["classifier"], view["backbone"])
    n = len(sites.rows)
    flat = lambda tree: jnp.concatenate(
        [x.reshape(n, VOCAB, -1) for x in jax.tree.leaves(tree)], axis=-1
    )
    embedding = both[1]["embed"]["embedding"].reshape(n, VOCAB, -1)
    weight = both[0]["weight"].reshape(n, VOCAB, -1)
    return {"head": flat(both[0]), "body": flat(both[1]), "weight": weight, "embed": embedding}


def component_kernels(model, params, sites):
    """Θ(s, s') [N, V, N, V] by component, as contractions of full Jacobians."""
    j = path_jacobians(model, params, sites)
    outer = lambda a, b: jnp.einsum("nvp,mwp->nvmw", a, b)
    cross = jnp.zeros_like(outer(j["head"], j["head"]))
    if model.config.tied:
        cross = outer(j["weight"], j["embed"]) + outer(j["embed"], j["weight"])
    return {
        "representation": outer(j["head"], j["head"]),
        "gradient": outer(j["body"], j["body"]),
        "cross": cross,
    }
