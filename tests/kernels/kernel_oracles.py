"""The float64 oracle of the kernel tests: full Jacobians at the sites of one rollout."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from jaxdyn.types import Rollout, Sites

PARTS = ("representation", "gradient", "cross")
BIASED = "gpt_neox-biased"
NAMES = (*oracles.CONFIGS, BIASED)
# Which of the rollout's eight sites are rows and which columns: several of every sequence in both.
A, B = np.array([0, 1, 3, 6]), np.array([2, 4, 5, 7])


def tiny_model(name, dtype=jnp.float64):
    """`oracles.tiny_model`, and one with a classifier bias."""
    biased = dataclasses.replace(oracles.NEOX, classifier_bias=True)
    with mock.patch.dict(oracles.CONFIGS, {BIASED: biased}):
        return oracles.tiny_model(name, dtype)


def rollout():
    """Three sequences, padded on the left in the prompt and on the right after the completion."""
    rng = np.random.default_rng(3)
    prompt_mask = [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    completion_mask = [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    ids = lambda: jnp.asarray(rng.integers(0, oracles.VOCAB, (3, 3)), jnp.int32)
    return Rollout(
        prompt_ids=ids(),
        prompt_mask=jnp.asarray(prompt_mask, bool),
        completion_ids=ids(),
        completion_mask=jnp.asarray(completion_mask, bool),
        per_token_logps=jnp.zeros((3, 3), jnp.float32),
    )


def all_sites():
    """The eight sites where the rollout's completion tokens are predicted, row by row."""
    r = rollout()
    rows, places = np.nonzero(np.asarray(r.completion_mask))
    return Sites(
        tokens=r.tokens,
        mask=r.mask,
        rows=jnp.asarray(rows, jnp.int32),
        positions=jnp.asarray(places + 2, jnp.int32),
        targets=r.completion_ids[rows, places],
        is_prompt=jnp.asarray(places == 0),
    )


def some(sites, which):
    """The sites numbered `which`."""
    pick = {k: getattr(sites, k)[which] for k in ("rows", "positions", "targets", "is_prompt")}
    return dataclasses.replace(sites, **pick)


@functools.cache
def theta(name):
    """Θ [8, V, 8, V] by component and the scores e_y − π [8, V], all float64."""

    @jax.jit
    def compute(params, sites):
        f = oracles.site_logits(model, model.view(params), sites)
        score = jax.nn.one_hot(sites.targets, oracles.VOCAB) - jax.nn.softmax(f)
        return oracles.component_kernels(model, params, sites), score

    with jax.enable_x64(True):
        model, params = tiny_model(name)
        return jax.tree.map(np.asarray, compute(params, all_sites()))


def random_cotangents():
    return np.random.default_rng(4).standard_normal((8, oracles.VOCAB))


def scalars(name, g, rows=slice(None), columns=slice(None)):
    """gᵀ Θ g by component, [rows, columns]."""
    kernels, _ = theta(name)
    whole = {part: np.einsum("nv,nvmw,mw->nm", g, kernels[part], g) for part in PARTS}
    return {part: x[rows][:, columns] for part, x in whole.items()}


def assert_components(actual, expected, tolerance):
    """Each component within `tolerance` of the largest entry expected of it."""
    for part in PARTS:
        wanted = np.asarray(expected[part])
        scale = np.abs(wanted).max()
        got = np.asarray(getattr(actual, part))
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, err_msg=part)
