"""The float64 oracle of the kernel tests: full Jacobians at the sites of one rollout."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from jaxdyn.kernels.rows import Rows
from jaxdyn.types import Rollout, Sites

MILLION = 10**6

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


def metric(name, dtype=jnp.float64):
    """P as stored, up to 2; some of it exactly zero, as of parameters that do not move."""
    _, params = tiny_model(name, dtype)
    rng = np.random.default_rng(9)
    draw = lambda x: jnp.asarray(np.maximum(rng.uniform(-0.5, 2, x.shape), 0), dtype)
    return jax.tree.map(draw, params)


@functools.cache
def jacobians(name):
    """∂f/∂θ of the view at the eight sites, [8, V, ...], and the scores e_y − π [8, V]: float64."""

    @jax.jit
    def compute(view, sites):
        f = lambda view: oracles.site_logits(model, view, sites)
        score = jax.nn.one_hot(sites.targets, oracles.VOCAB) - jax.nn.softmax(f(view))
        return jax.jacrev(f)(view), score

    with jax.enable_x64(True):
        model, params = tiny_model(name)
        return jax.tree.map(np.asarray, compute(model.view(params), all_sites()))


@functools.cache
def theta(name, preconditioned):
    """Θ = D P Dᵀ [8, V, 8, V] by component, float64; P is `metric(name)`, or the identity."""
    tree = jacobians(name)[0]
    with jax.enable_x64(True):
        model, params = tiny_model(name)
        p = metric(name) if preconditioned else jax.tree.map(np.ones_like, params)
        p = jax.tree.map(np.asarray, model.view(p))
    flat = lambda tree: np.concatenate(
        [x.reshape(8 * oracles.VOCAB, -1) for x in jax.tree.leaves(tree)], axis=1
    )
    along = lambda tree: np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    outer = lambda left, p, right: (flat(left) * along(p)) @ flat(right).T
    paths = {"representation": "classifier", "gradient": "backbone"}
    found = {part: outer(tree[path], p[path], tree[path]) for part, path in paths.items()}
    found["cross"] = np.zeros_like(found["gradient"])
    if model.config.tied:
        head, table = tree["classifier"]["weight"], tree["backbone"]["embed"]["embedding"]
        there = outer(head, p["classifier"]["weight"], table)
        found["cross"] = there + there.T
    shape = (8, oracles.VOCAB, 8, oracles.VOCAB)
    return {part: x.reshape(shape) for part, x in found.items()}


def scores(name):
    """e_y − π at the eight sites, [8, V], float64."""
    return jacobians(name)[1]


def random_cotangents():
    return np.random.default_rng(4).standard_normal((8, oracles.VOCAB))


def scalars(name, g, rows=slice(None), columns=slice(None), preconditioned=False):
    """gᵀ Θ g by component, [rows, columns]."""
    kernels = theta(name, preconditioned)
    whole = {part: np.einsum("nv,nvmw,mw->nm", g, kernels[part], g) for part in PARTS}
    return {part: x[rows][:, columns] for part, x in whole.items()}


def traces(name, rows, columns, preconditioned=False):
    """tr Θ by component, [rows, columns]."""
    kernels = theta(name, preconditioned)
    return {part: np.einsum("nvmv->nm", x)[rows][:, columns] for part, x in kernels.items()}


def token_blocks(name, rows, columns, ids, preconditioned=False):
    """Θ at some tokens by component, [rows, columns, C, C]."""
    pick = lambda x: x.transpose(0, 2, 1, 3)[rows][:, columns][:, :, ids][..., ids]
    return {part: pick(x) for part, x in theta(name, preconditioned).items()}


def sequence_weights(seed):
    return np.random.default_rng(seed).standard_normal((3, 3))


def sequence_scalars(name, left, right, preconditioned=False):
    """Σ over the pairs of two completions' sites of the weighted log-prob kernel, [3, 3]."""
    mask = np.asarray(rollout().completion_mask)
    member = lambda w: np.eye(3)[:, np.nonzero(mask)[0]] * w[mask][None]
    inner = scalars(name, scores(name), preconditioned=preconditioned)
    return {part: member(left) @ x @ member(right).T for part, x in inner.items()}


def policy_weights():
    return np.random.default_rng(8).standard_normal((3, 3, 2))


@functools.cache
def statistic_gradients(name, temperature):
    """∂ log π(y)/∂f and ∂H/∂f at the eight sites by automatic differentiation, [2, 8, V]."""

    def of_site(f, y):
        log_probs = jax.nn.log_softmax(f / temperature)
        return jnp.stack([log_probs[y], -jnp.sum(jnp.exp(log_probs) * log_probs)])

    with jax.enable_x64(True):
        model, params = tiny_model(name)
        sites = all_sites()
        f = jax.jit(lambda view: oracles.site_logits(model, view, sites))(model.view(params))
        gradients = jax.vmap(jax.jacrev(of_site), out_axes=1)(f, sites.targets)
        return np.asarray(gradients)


def policy_scalars(name, temperature, rows, places=None, preconditioned=False):
    """∇h of log π and H at sites, with ∇ of the weighted statistics of completions (or tokens of
    them), [2, rows, 3] by component."""
    completion, slot = np.nonzero(np.asarray(rollout().completion_mask))
    weights = policy_weights()[completion, slot]
    right = np.einsum("nt,tnv->nv", weights, statistic_gradients(name, temperature))
    member = np.eye(3)[:, completion]
    if places is not None:
        member = np.array([[p == at for at in zip(completion, slot, strict=True)] for p in places])
    left = statistic_gradients(name, 1.0)[:, rows]
    kernels = theta(name, preconditioned)
    contract = lambda x: np.einsum("knv,nvmw,mw,jm->knj", left, x[rows], right, member * 1.0)
    return {part: contract(x) for part, x in kernels.items()}


def kernels_by_kind(name, g, rows, columns, preconditioned=False):
    """The gradient component of gᵀ Θ g by kind of parameter, [l, rows, columns]; l layers or 1."""
    j = jax.tree.map(lambda x: np.einsum("nv,nv...->n...", g, x), jacobians(name)[0]["backbone"])
    if preconditioned:
        with jax.enable_x64(True):
            j = jax.tree.map(lambda x, p: x * np.sqrt(p), j, metric(name)["backbone"])
    flat = lambda trees, depth: np.concatenate(
        [x.reshape(8, depth, -1) for tree in trees for x in jax.tree.leaves(tree)], axis=2
    )
    layers = {**j["layers"], **j["layers"]["attention"]}  # no two of them share a name
    found = {
        "attention": flat([layers[name] for name in ("query", "key", "value", "out")], 2),
        "mlp": flat([layers["mlp"]], 2),
        "norms": flat([layer for name, layer in layers.items() if name.endswith("_norm")], 2),
        "embedding": flat([j["embed"], j.get("position", {})], 1),
        "final_norm": flat([j["norm"]], 1),
    }
    return {kind: np.einsum("nlp,mlp->lnm", x[rows], x[columns]) for kind, x in found.items()}


def assert_components(actual, expected, tolerance):
    """Each component within `tolerance` of the largest entry expected of it."""
    for part in PARTS:
        wanted = np.asarray(expected[part])
        scale = np.abs(wanted).max()
        got = np.asarray(getattr(actual, part))
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, err_msg=part)


def compiled_bytes(function, *arguments, **options):
    """Temporary and output bytes by XLA's own account."""
    found = function.lower(*arguments, **options).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def shaped_rows(count, slots, counted, outputs):
    shaped = jax.ShapeDtypeStruct
    ids = lambda *shape: shaped((count, *shape), jnp.int32)
    mask, weights = shaped((count, slots), bool), shaped((count, counted), jnp.float32)
    chosen = ids(outputs) if outputs > 1 else None
    return Rows(ids(slots), mask, ids(counted), ids(counted), weights, None, chosen)
