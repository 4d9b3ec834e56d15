"""The ledger against full Jacobians integrated by an adaptive rule of somebody else's, in float64.

The oracle differentiates the quantities as the textbook writes them, leaf by leaf, and knows
nothing of components, kinds, hooks or Gauss.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax.traverse_util import flatten_dict
from scipy.integrate import quad_vec

from jaxdyn.dynamics import ledger
from jaxdyn.dynamics.ledger_path import Batch, Segment, batches_of_texts
from jaxdyn.models import LanguageModel
from jaxdyn.types import JaxdynError

SITES = oracles.tiny_sites()
SMOOTH = ("log_prob", "entropy", "kl")
ALL = ("log_prob", "entropy", "confidence", "margin", "kl")
APART = {"by_layer": ("log_prob", "entropy"), "by_token": ("log_prob", "kl"), "tolerance": 1e-11}
NAMES = [
    "llama-tied",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2-tied", *oracles.NORMED)),
    "biased",
    "adapted",
    pytest.param("adapted-tied", marks=pytest.mark.slow),
]


def subject(name):
    """A model, and two of its parameter trees."""
    if name == "biased":
        config = dataclasses.replace(oracles.NEOX, classifier_bias=True)
        model = LanguageModel(config, jnp.float64)
        _, params = oracles.tiny_model("gpt_neox-untied")
        params["classifier"]["bias"] = jnp.linspace(-1, 1, oracles.VOCAB)
    elif name.startswith("adapted"):
        model, params = oracles.adapted_model(f"llama-{'tied' if 'tied' in name else 'untied'}")
    else:
        model, params = oracles.tiny_model(name)
    return model, params, changed(params, 3)


def changed(params, seed, size=0.01):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(size * rng.standard_normal(x.shape), x.dtype), params
    )


def textbook(model, view, first_log_probs):
    """log π, entropy, largest probability, margin, KL, [5, N]."""
    log_probs = jax.nn.log_softmax(oracles.site_logits(model, view, SITES))
    probs = jnp.exp(log_probs)
    ordered = jnp.sort(probs, axis=1)
    return jnp.stack(
        [
            log_probs[jnp.arange(len(SITES.rows)), SITES.targets],
            -jnp.sum(probs * log_probs, axis=1),
            ordered[:, -1],
            ordered[:, -1] - ordered[:, -2],
            jnp.sum(probs * (log_probs - first_log_probs), axis=1),
        ]
    )


def integrated(model, before, after, first=None):
    """∫ Σ ∂h/∂leaf · Δleaf of every leaf of the view, a layer's apart, of what is smooth.

    {path: [3, N(, L)]}, and all quantities at the end.
    """
    a, b = model.view(before), model.view(after)
    first = a if first is None else model.view(first)
    start = jax.nn.log_softmax(oracles.site_logits(model, first, SITES))
    change = jax.tree.map(jnp.subtract, b, a)
    paths = list(flatten_dict(change))
    smooth = np.array([ALL.index(quantity) for quantity in SMOOTH])

    @jax.jit
    def rates(t):
        view = jax.tree.map(lambda x, d: x + t * d, a, change)
        slopes = flatten_dict(jax.jacrev(lambda v: textbook(model, v, start)[smooth])(view))
        found = []
        for path, d in flatten_dict(change).items():
            product = slopes[path] * d[None, None]
            keep = 3 if path[:2] == ("backbone", "layers") else 2
            summed = product.sum(axis=tuple(range(keep, product.ndim)))
            found.append(summed if keep == 3 else summed[..., None])
        return jnp.concatenate(found, axis=-1)

    total, _ = quad_vec(lambda t: np.asarray(rates(t)), 0, 1, epsabs=1e-12, epsrel=1e-12)
    widths = [model.config.num_layers if p[:2] == ("backbone", "layers") else 1 for p in paths]
    cut = np.split(total, np.cumsum(widths)[:-1], axis=-1)
    return dict(zip(paths, cut, strict=True)), np.asarray(textbook(model, b, start))


def kind_of(path):
    """By hand: a parameter's row in the table of layers and kinds."""
    factor = f"_{path[-1]}" if path[-1].startswith("lora") else ""
    if path[0] == "classifier":
        return "classifier" + factor
    if path[1] != "layers":
        names = {"embed": "embedding", "position": "embedding", "norm": "final_norm"}
        return names[path[1]] + factor
    if any("norm" in part for part in path):
        return "norms"
    return (path[3] if path[2] == "attention" else "mlp") + factor


def place_of(path, layers):
    if path[1] == "layers":
        return slice(1, layers + 1)
    return slice(layers + 1, layers + 2) if path[1] == "norm" else slice(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_the_integral_of_its_leaves(name, x64):
    model, before, after = subject(name)
    layers = model.config.num_layers
    leaves, end = integrated(model, before, after)
    found = ledger(model, [before, after], SITES, **APART)
    rows = np.asarray(SITES.rows)
    for q, quantity in enumerate(ALL):
        np.testing.assert_allclose(found.values[quantity][1], end[q], rtol=0, atol=1e-12)
        if quantity not in SMOOTH:
            continue
        s = SMOOTH.index(quantity)
        of = lambda half, s=s: sum(x[s].sum(-1) for p, x in leaves.items() if p[0] == half)
        scale = np.abs(found.change(quantity)).max()
        assert np.abs(found.residual(quantity)).max() < 1e-10 * scale
        parts = found.parts[quantity]
        np.testing.assert_allclose(parts["representation"][0], of("classifier"), atol=1e-10 * scale)
        np.testing.assert_allclose(parts["gradient"][0], of("backbone"), atol=1e-10 * scale)
        if quantity in ("log_prob", "entropy"):
            table = {}
            for path, x in leaves.items():
                texts = np.stack([x[s][rows == b].sum(0) for b in range(3)])
                table[kind_of(path)] = table.get(kind_of(path), 0) + texts
            assert found.by_layer[quantity].keys() == table.keys()
            for kind, x in table.items():
                np.testing.assert_allclose(found.by_layer[quantity][kind][0], x, atol=1e-10 * scale)
        if quantity in ("log_prob", "kl"):
            places = np.zeros((layers + 2, len(rows)))
            for path, x in leaves.items():
                if path[0] == "backbone":
                    places[place_of(path, layers)] += x[s].T
            np.testing.assert_allclose(found.by_token[quantity][0], places, atol=1e-10 * scale)


def test_where_the_largest_tokens_stay_confidence_and_margin_close_too(x64):
    model, before = oracles.tiny_model("llama-tied")
    after = changed(before, 3, 1e-3)
    found = ledger(model, [before, after], SITES, tolerance=1e-11)
    for quantity in ALL:
        assert np.abs(found.change(quantity)).max() > 1e-5
        assert np.abs(found.residual(quantity)).max() < 1e-12


def test_segments_follow_the_trajectory(x64):
    model, first = oracles.tiny_model("llama-tied")
    steps = [first, changed(first, 1), changed(first, 2)]
    found = ledger(model, iter(steps), SITES, tolerance=1e-11)
    leaves, _ = integrated(model, *steps[1:], first=first)
    for quantity in ALL:
        total = found.values[quantity][2] - found.values[quantity][0]
        np.testing.assert_allclose(found.change(quantity).sum(0), total, atol=1e-14)
        if quantity in SMOOTH:
            s = SMOOTH.index(quantity)
            head = sum(x[s].sum(-1) for path, x in leaves.items() if path[0] == "classifier")
            np.testing.assert_allclose(found.parts[quantity]["representation"][1], head, atol=1e-10)
            assert np.abs(found.residual(quantity)).max() < 1e-10
    np.testing.assert_array_equal(found.values["kl"][0], 0)


def test_the_path_through_features_has_the_closed_form_of_logits(x64):
    """Differences of two tokens' log-probs are differences of logits: ΔW φ̄ + W̄ Δφ."""
    model, before, after = subject("llama-tied")
    every = np.tile(np.arange(oracles.VOCAB), (len(SITES.rows), 1))
    found = ledger(
        model, [before, after], SITES, token_ids=every, through="features", tolerance=1e-12
    )
    at = lambda view: model.features(view["backbone"], SITES.tokens, SITES.mask)[
        SITES.rows, SITES.positions
    ]
    a, b = model.view(before), model.view(after)
    mean_phi, change_phi = (at(a) + at(b)) / 2, at(b) - at(a)
    w, v = a["classifier"]["weight"], b["classifier"]["weight"]
    closed = {"representation": mean_phi @ (v - w).T, "gradient": change_phi @ (w + v).T / 2}
    apart = lambda x: x - x[:, :1]
    for part, logits in closed.items():
        np.testing.assert_allclose(apart(found.token_parts[part][0]), apart(logits), atol=1e-12)
    for quantity in SMOOTH:
        assert np.abs(found.residual(quantity)).max() < 1e-12
    exact = ledger(model, [before, after], SITES, token_ids=every, tolerance=1e-11)
    whole = sum(exact.token_parts.values())
    np.testing.assert_allclose(whole, np.diff(exact.token_values, axis=0), atol=1e-11)
    assert np.abs(exact.token_parts["gradient"] - found.token_parts["gradient"]).max() > 1e-6


def test_float32_closes_to_the_default_tolerance():
    model, before = oracles.tiny_model("llama-tied", jnp.float32)
    found = ledger(model, [before, changed(before, 3)], SITES)
    for quantity in SMOOTH:
        rms = lambda x: np.sqrt(np.mean(np.square(x)))
        assert rms(found.residual(quantity)) < 1e-4 * rms(found.change(quantity))


def test_batches_and_finished_blocks_change_nothing(x64, tmp_path):
    model, before, after = subject("llama-tied")
    whole = ledger(model, [before, after], SITES, **APART)
    seen = []
    small = {"memory_budget": 100_000, "blocks": tmp_path, **APART}

    def stop(done, total):
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger(model, [before, after], SITES, progress=stop, **small)
    ledger_again = ledger(
        model, [before, after], SITES, progress=lambda *x: seen.append(x), **small
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    flat = lambda x: flatten_dict(vars(x), sep="/")
    for field, x in flat(whole).items():
        np.testing.assert_allclose(flat(ledger_again)[field], x, atol=1e-12, err_msg=field)
    with pytest.raises(JaxdynError, match="another kernel"):
        ledger(model, [before, changed(before, 4)], SITES, **small)


def test_texts_of_a_prompt_share_its_pass_where_no_layers_are_asked_for(x64):
    """With layers each text has a row of its own, and the components are the same."""
    model, before = oracles.tiny_model("llama-tied")
    trees, sites = [before, changed(before, 3)], oracles.branching_sites()
    ids = np.arange(12).reshape(6, 2)
    texts = lambda share: batches_of_texts(model, sites, ids, 2**30, share)
    assert [x.sites["tokens"].shape for x in texts(True)] == [(2, 6 + 3 * 3)]
    assert [x.sites["tokens"].shape for x in texts(False)] == [(4, 9)]
    shared = ledger(model, trees, sites, token_ids=ids)
    apart = ledger(model, trees, sites, token_ids=ids, by_layer=("entropy",))
    for name in SMOOTH:
        assert np.abs(apart.change(name)).min() > 0
        for part, wanted in apart.parts[name].items():
            np.testing.assert_allclose(shared.parts[name][part], wanted, rtol=1e-10, atol=1e-14)
    for part, wanted in apart.token_parts.items():
        np.testing.assert_allclose(shared.token_parts[part], wanted, rtol=1e-10, atol=1e-14)
    np.testing.assert_array_equal(shared.nodes, apart.nodes)
    assert shared.nodes[0, 4] == 0 < shared.nodes[0, :4].min()


ENTROPIES = {
    "closed": (np.ones_like, 1, 9),
    "what no node mends": (np.ones_like, 1.001, 9),
    "closing": (np.sqrt, 2 / 3, 65),
}


@pytest.mark.parametrize(("rate", "whole", "nodes"), ENTROPIES.values(), ids=ENTROPIES)
def test_nodes_are_added_until_each_quantity_closes_or_cannot(rate, whole, nodes, monkeypatch):
    """log π's rate is of degree six, which nine nodes integrate exactly; the entropy differs."""

    def rates(segment, batch, i, t):
        h = np.zeros((len(ALL), 1))
        h[:2, 0] = 7 * t**6, rate(t)
        return {"representation": h, "gradient": 0 * h}

    monkeypatch.setattr(Segment, "_rates", rates)
    change = np.zeros((len(ALL), 1))
    change[:2, 0] = 1, whole
    segment = Segment(*[None] * len(Segment._fields))
    batch = Batch({}, None, np.ones(1), None, None)
    found = segment._closed(batch, 0, change, np.full(len(SMOOTH), 1e-9))
    assert found["nodes"] == nodes
    np.testing.assert_allclose(found["representation"][0], 1, atol=1e-12)


def test_a_segment_in_which_nothing_happened_has_nothing(x64):
    model, before, after = subject("llama-tied")
    found = ledger(model, [before, after, after], SITES)
    for parts in (found.change("entropy"), *found.parts["entropy"].values()):
        assert np.any(parts[0]) and not np.any(parts[1])


def test_what_does_not_fit_is_named(x64):
    model, before, after = subject("llama-tied")
    other = oracles.tiny_model("gpt_neox-untied")[1]
    for checkpoints, said in [
        ([], "got none"),
        ([before], "got one"),
        ([before, before], "the 2 checkpoints are equal"),
        ([before, other], "checkpoint 1 has other parameters"),
    ]:
        with pytest.raises(JaxdynError, match=said):
            ledger(model, checkpoints, SITES)
    with pytest.raises(JaxdynError, match="got 'surprise'"):
        ledger(model, [before, after], SITES, by_layer=("surprise",))
    with pytest.raises(JaxdynError, match="has no layers"):
        ledger(model, [before, after], SITES, through="features", by_token=("log_prob",))
