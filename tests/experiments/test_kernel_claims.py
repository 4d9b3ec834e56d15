"""The scripts of claims about kernels, at a toy size: their laws, and verdicts from kept rows."""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import features
import first_order
import frame
import gauge
import gradient_component
import jax
import jax.numpy as jnp
import layers
import lp_ft
import matplotlib.pyplot as plt
import numpy as np
import proxies
import pytest
import subject
import tiny_runs
from scipy.stats import spearmanr

from jaxdyn import kernels
from jaxdyn.dynamics import site_state
from jaxdyn.models import regauge
from jaxdyn.rl import LossConfig, logit_cotangents, normalizer_of, token_statistics
from jaxdyn.train.sharing import completion_features
from jaxdyn.train.task import open_task
from jaxdyn.types import Sites

FINDINGS = Path(frame.__file__).parent / "results" / "findings"
SCRIPTS = {
    "features": features,
    "first_order": first_order,
    "gauge": gauge,
    "proxies": proxies,
    "gradient_component": gradient_component,
    "lp_ft": lp_ft,
    "layers": layers,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random model of one layer, untied, on prompts of its own."""
    root = tmp_path_factory.mktemp("claims")
    config = tiny_runs.rl_config(root, "none", loss=LossConfig("dr_grpo"))
    return subject.Subject("toy", open_task(config), True)


def close(figure):
    assert len(figure.axes) > 1
    plt.close(figure)


KEPT = sorted(path for name in SCRIPTS for path in FINDINGS.glob(f"*/{name}.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_kept_verdicts_follow_from_kept_rows(path):
    kept = json.loads(path.read_text())
    found = SCRIPTS[kept["script"]].verdicts(kept["rows"])
    assert [v.claim for v in found] == [v["claim"] for v in kept["verdicts"]]
    for new, old in zip(found, kept["verdicts"], strict=True):
        assert (new.ruling, new.over, new.seeds) == (old["ruling"], old["over"], old["seeds"])
        for key in ("value", "low", "high"):
            at = getattr(new, key)
            if old[key] is None:
                assert np.isnan(at)
            else:
                np.testing.assert_allclose(at, old[key], rtol=1e-3, atol=1e-4)
    assert path.with_suffix(".png").stat().st_size > 5000


@pytest.fixture
def training(toy, monkeypatch, tmp_path):
    """A training that ends in another gauge, of c = 2, in the place of every run that is opened."""
    after = regauge(toy.model, toy.params, 2.0)[1]
    run = SimpleNamespace(
        path=tmp_path / "joint/seed-0",
        task=toy.task,
        loaded=toy.task,
        steps=[3, 6],
        plan=[SimpleNamespace(end=3)],
        policy=lambda step: (toy.model, after),
    )
    for script in (features, gradient_component, lp_ft):
        monkeypatch.setattr(script, "open_run", lambda path: contextlib.nullcontext(run))
    run.path.mkdir(parents=True)
    (run.path / "config.json").touch()
    return run.path


def test_a_training_that_changed_the_gauge_alone(toy, training, monkeypatch):
    """Features twice as long and no other; W half, which makes ρ a quarter where g is fixed."""
    row = lp_ft.of_training(training, 4)
    assert row["displacement"] == pytest.approx(1, rel=1e-5)
    assert row["cosine"] == pytest.approx(1, rel=1e-5) == row["cka"]
    assert (row["norm"], row["change"]) == pytest.approx((-0.5, 0.5), rel=1e-5)

    chosen = argparse.Namespace(runs=training.parents[1], size="toy")
    (found,) = features.of_runs(chosen, [toy])["joint"]
    assert found["cka"] == pytest.approx(1, rel=1e-4)
    for kind, pairs in found["before"]["pairs"].items():
        later = found["after"]["pairs"][kind]
        assert later["cosine"]["mean"] == pytest.approx(pairs["cosine"]["mean"], abs=1e-5)
        assert later["inner"] == pytest.approx(4 * pairs["inner"], rel=1e-4)

    row = gradient_component.of_training(training, "toy")
    assert row["after"]["fixed"] == pytest.approx(row["before"]["fixed"] / 4, rel=1e-4)
    assert row["norm"] == pytest.approx(0.5, rel=1e-5)
    assert row["after"]["kl"] > 1e-4
    assert row["before"]["kl"] == pytest.approx(0, abs=1e-7)
    for kind in gradient_component.KINDS:
        kls = [x["kl"] for x in row["random"][kind]]
        assert kls == pytest.approx([row["after"]["kl"]] * 2, rel=2e-3)


# -- features -------------------------------------------------------------------------------------


def some_sites() -> Sites:
    """Three prompts, each with its end and two sites inside, after the tokens 1 or 2."""
    tokens = jnp.array([[0, 0, 0, 9, 1, 2], [0, 0, 0, 9, 1, 1], [0, 0, 0, 9, 2, 2]], jnp.int32)
    rows, places = np.repeat(np.arange(3), 3), np.tile([3, 4, 5], 3)
    ids = lambda x: jnp.asarray(x, jnp.int32)
    is_prompt = jnp.asarray(places == 3)
    return Sites(tokens, tokens >= 0, ids(rows), ids(places), ids(rows), is_prompt)


def test_pairs_are_told_apart_and_averaged_over_prompts_drawn_again():
    sites = some_sites()
    rows, places = np.asarray(sites.rows), np.asarray(sites.positions)
    before = np.asarray(sites.tokens)[rows, places]
    values = np.random.default_rng(0).standard_normal((9, 9))
    values += values.T
    weights = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 0]], float)
    kinds = features.kinds_of(sites)
    for kind, chosen in kinds.items():
        for one, found in zip(
            weights, features.weighted(values, chosen, rows, weights), strict=True
        ):
            total = count = 0.0
            for i in range(9):
                for j in range(9):
                    if rows[i] == rows[j]:
                        continue
                    ends = places[i] == 3, places[j] == 3
                    same = before[i] == before[j], places[i] == places[j]
                    name = {(1, 1): "both", (1, 0): "token", (0, 1): "place", (0, 0): "neither"}
                    own = "prompts" if all(ends) else name[same]
                    if (own != kind) or (any(ends) != all(ends)):
                        continue
                    weight = one[rows[i]] * one[rows[j]]
                    total, count = total + weight * values[i, j], count + weight
            if count:
                assert found == pytest.approx(total / count)
            else:
                assert np.isnan(found)
    assert sum(x.sum() for x in kinds.values()) == 2 * (3 + 3 * 4)


def test_features_that_differ_by_their_token_alone():
    """Orthogonal by the token before, equal otherwise: cosines 1 and 0."""
    sites = some_sites()
    before = np.asarray(sites.tokens)[np.asarray(sites.rows), np.asarray(sites.positions)]
    found = features.alikeness(3.0 * np.eye(10)[before], sites)
    cosine = {kind: x["cosine"]["mean"] for kind, x in found["pairs"].items()}
    assert cosine == pytest.approx(
        {"prompts": 1, "both": 1, "token": 1, "place": 0, "neither": 0}, abs=1e-12
    )
    assert found["pairs"]["prompts"]["inner"] == pytest.approx(9)
    spectrum = found["spectrum"]["completions"]  # of three sites after 1, and three after 2
    assert spectrum["effective_rank"] == pytest.approx(2, rel=1e-5)
    assert spectrum["effective_rank_centred"] == pytest.approx(1, rel=1e-3)
    assert spectrum["common"] == pytest.approx(0.5)


def test_verdict_of_features():
    pair = lambda mean: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
    kinds = lambda cos, share: {
        "neither": {"cosine": pair(cos)},
        "prompts": {"positive": pair(share)},
    }
    base = lambda cos: {
        "prompts": 4,
        "trained": [{"pairs": kinds(cos, 1.2)}],
        "random": [{"pairs": kinds(0.0, 0.5)}],
    }
    first, second = features.verdicts({"bases": [base(0.8), base(0.7)], "runs": {}})
    assert (first.ruling, second.ruling, first.seeds) == ("supported", "supported", 2)
    assert (first.value, first.low, first.high) == pytest.approx((0.75, 0.6, 0.9))
    rulings = {0.55: "undecided", 0.2: "not supported"}
    for cos, ruling in rulings.items():
        rows = {"bases": [base(0.8), base(cos)], "runs": {}}
        assert features.verdicts(rows)[0].ruling == ("undecided" if cos < 0.5 else ruling)
        assert features.verdicts({"bases": [base(cos)], "runs": {}})[0].ruling == ruling


# -- first order and the gauge ---------------------------------------------------------------------


def test_first_order_has_slope_2_and_the_gauge_its_law(toy):
    """Both scripts whole; they share their programs."""
    rows = first_order.of_base(toy, "toy")
    assert [row["dtype"] for row in rows] == ["float64"] * 2
    for row in rows:
        for name in ("adam", "sgd"):
            assert first_order.slope_of(row[name], "float64") == pytest.approx(2, abs=0.1)
            assert row[name]["slope"][0] == pytest.approx(1, abs=0.02)
            assert row[name]["residual"][0] < 0.05 * row[name]["actual"][0]
        assert row["sgd"]["predicted"] == pytest.approx(row["adam"]["predicted"], rel=1e-6)
    claims = first_order.verdicts(rows)
    assert [v.ruling for v in claims[1:]] == ["supported"] * 2
    close(first_order.draw(rows, "toy"))

    row = gauge.of_base(toy, "toy")
    at = {x["scale"]: x["updates"][0] for x in row["gauges"]}
    assert list(at) == pytest.approx([1 / 16, 1, 16])
    for name, power in gauge.POWERS.items():
        one = at[1.0][name]
        assert gauge.share_by_law(one["gram"], 1.0, power) == pytest.approx(one["share"], rel=1e-4)
        for scale, update in at.items():
            assert update[name]["rms"] == pytest.approx(scale**power * one["rms"], rel=2e-3)
            law = gauge.share_by_law(one["gram"], scale, power)
            assert update[name]["share"] == pytest.approx(law, abs=2e-3)
        assert row["equivalence"][name] < 1e-3
    assert {v.ruling for v in gauge.verdicts([row])} <= {"supported", "not supported"}
    assert gauge.verdicts([row])[0].ruling == gauge.verdicts([row])[2].ruling == "supported"
    close(gauge.draw([row], "toy"))


def test_where_half_is_representation():
    """Parts that do not overlap: r c² : 1 is even where r c² = 1."""
    gram = np.diag([0.25, 0.0, 4.0])
    assert gauge.share_by_law(gram, 1.0, 2) == pytest.approx(0.25 / 4.25)
    assert gauge.even_at(gram, 2) == pytest.approx(2.0, rel=5e-3)
    assert gauge.even_at(gram, 1) == pytest.approx(4.0, rel=5e-3)


def test_effects_of_a_known_curve():
    """Slopes and reaches of residual = 3 s², actual = 2 s."""
    step = 2.0 ** np.arange(-8, 1)
    effect = {"step": step, "actual": 2 * step, "residual": 3 * step**2}
    assert first_order.slope_of(effect, "float64") == pytest.approx(2)
    assert first_order.reach_of(effect) == pytest.approx(0.1 * 2 / 3)
    assert np.isnan(first_order.slope_of({k: v[:2] for k, v in effect.items()}, "float64"))


# -- the gradient component ------------------------------------------------------------------------


def test_size_of_the_gradient_component(toy):
    """Against the update kernel, whose gradient component summed over all pairs of tokens it is."""
    found = subject.experience(toy, "train", 2, 4, 0)
    batch = subject.update_batch(toy, found, 0)
    signs = jnp.where(jnp.arange(8) % 2 == 0, 1.0, -1.0)
    batch = dataclasses.replace(batch, advantages=signs)
    model, loss = toy.model, LossConfig("dr_grpo")
    backbone, head = toy.params["backbone"], toy.params["classifier"]
    rng = np.random.default_rng(0)
    other = {**head, "weight": head["weight"] + 0.1 * rng.standard_normal(head["weight"].shape)}
    other = jax.tree.map(jnp.float32, other)
    size = lambda w: gradient_component.sizes(model, loss, backbone, batch, w, head)
    sites, slots = every_token(found.rollout)
    phi = completion_features(model, backbone, batch)
    for whose, which in ((head, "fixed"), (other, "own")):
        logits = model.logits(whose, phi)
        logps = token_statistics(logits, batch.completion_ids).logps
        mask = batch.completion_mask
        given = logps, None, None, signs, mask, normalizer_of(mask)
        g = logit_cotangents(loss, *given).whole(logits, batch.completion_ids)[slots]
        params = {"backbone": backbone, "classifier": other}
        kernel = kernels.update_kernel(model, params, sites, cotangents_a=g)
        assert float(size(other)[which]) == pytest.approx(float(kernel.gradient.sum()), rel=1e-4)
    assert float(size(head)["kl"]) == pytest.approx(0, abs=1e-7)
    twice = size({**head, "weight": 2 * head["weight"]})
    assert float(twice["fixed"]) == pytest.approx(4 * float(size(head)["fixed"]), rel=1e-5)

    start = np.asarray(head["weight"])
    measure = lambda w: {k: float(v) for k, v in size({**head, "weight": jnp.float32(w)}).items()}
    change = gradient_component.random_change("gaussian", 0.1 * np.ones_like(start), 0)
    equal = gradient_component.of_equal_kl(measure, start, change, 0.01)
    assert equal["kl"] == pytest.approx(0.01, rel=1e-3)
    assert measure(start + equal["scale"] * change)["kl"] == equal["kl"]
    with pytest.raises(SystemExit, match=r"^no size of a random change has the stage's KL of 99"):
        gradient_component.of_equal_kl(lambda w: {"kl": 1.0}, start, change, 99.0)


def every_token(rollout):
    """Sites of all completion tokens, and their slots (b, c)."""
    rows, slots = np.nonzero(np.asarray(rollout.completion_mask))
    ids = lambda x: jnp.asarray(x, jnp.int32)
    positions = rollout.prompt_ids.shape[1] + slots - 1
    targets = np.asarray(rollout.completion_ids)[rows, slots]
    first = jnp.asarray(slots == 0)
    place = ids(rows), ids(positions), ids(targets)
    return Sites(rollout.tokens, rollout.mask, *place, first), (rows, slots)


def test_a_turned_change_keeps_its_norms():
    change = np.random.default_rng(1).standard_normal((7, 4))
    turned = gradient_component.random_change("turned", change, 0)
    norms = lambda x: np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(norms(turned), norms(change))
    singular = lambda x: np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(singular(turned), singular(change))
    assert np.abs(turned - change).max() > 0.1
    gaussian = gradient_component.random_change("gaussian", change, 0)
    assert np.linalg.norm(gaussian) == pytest.approx(np.linalg.norm(change))


def test_verdict_of_the_gradient_component():
    def row(seed, after, random):
        size = lambda x: {"fixed": x, "own": x}
        return {
            "seed": f"seed-{seed}",
            "norm": 1.1,
            "before": size(1.0),
            "after": size(after),
            "random": {"gaussian": [size(random)], "turned": [size(random)]},
        }

    more = [row(s, 1.6 + 0.01 * s, 1.2) for s in range(12)]
    first, _ = gradient_component.verdicts(more)
    assert first.ruling == "supported" and first.p == pytest.approx(2 / 2**12)
    assert first.value == pytest.approx(np.mean(np.log(np.arange(160, 172) / 120)))
    same = [row(s, 1.2 + 0.01 * s, 1.25) for s in range(12)]
    assert gradient_component.verdicts(same)[0].ruling == "not supported"
    assert gradient_component.verdicts(more[:1])[0].ruling == "undecided"
    assert gradient_component.verdicts(more[:4])[0].ruling == "undecided"  # p is 1/8
    close(gradient_component.draw(more, "toy"))


# -- proxies ---------------------------------------------------------------------------------------


def test_proxies_of_influence(toy):
    """The head's product is the kernel's representation component, the rest its gradient's."""
    sites = subject.probe_sites(toy, 3, 1)
    found, truth = proxies.influences(toy, sites, 0)
    kernel = kernels.log_prob_kernel(toy.model, toy.params, sites)
    atol = 1e-4 * float(jnp.abs(kernel.total).max())
    np.testing.assert_allclose(found["head"], kernel.representation, rtol=0, atol=atol)
    np.testing.assert_allclose(truth["gradient"], kernel.gradient, rtol=0, atol=atol)
    np.testing.assert_allclose(truth["total"], kernel.total, rtol=0, atol=atol)
    phi = np.asarray(site_state(toy.model, toy.params, sites).features, np.float64)
    np.testing.assert_allclose(found["features"], phi @ phi.T, rtol=1e-5)


def test_ranks_against_scipy_and_by_hand():
    rng = np.random.default_rng(2)
    proxy, truth = rng.standard_normal((2, 5, 5))
    proxy[:, 3] = proxy[:, 4]  # ties count half
    apart = ~np.eye(5, dtype=bool)
    spearman, area = proxies.ranked(proxy, truth, apart)
    for row in range(5):
        x, y = proxy[row, apart[row]], truth[row, apart[row]]
        assert spearman[row] == pytest.approx(spearmanr(x, y).statistic)
        pairs = [(a > b) + 0.5 * (a == b) for a in x[y > 0] for b in x[y < 0]]
        wanted = np.mean(pairs) if pairs else np.nan
        assert area[row] == pytest.approx(wanted, nan_ok=True)
    assert proxies.ranked(truth, truth, apart)[0] == pytest.approx(np.ones(5))


def test_verdict_of_proxies():
    about = {"model": "toy", "sites": 4, "positive": 0.5}
    rows = [
        about | {"target": t, "proxy": p, "spearman": [rho] * 4, "auc": [0.7, None, 0.7, 0.7]}
        for t in ("total", "gradient")
        for p, rho in {**dict.fromkeys(proxies.PROXIES, 0.8), "features": 0.1}.items()
    ]
    found = proxies.verdicts(rows)
    assert [v.ruling for v in found] == ["not supported", "supported", "supported"]
    assert "AUC of the sign 0.70 (0.70 to 0.70)" in found[0].note
    close(proxies.draw(rows, "toy"))


# -- layers, and LP-FT -----------------------------------------------------------------------------


def test_parts_are_a_partition_and_the_ledger_adds_up(toy):
    model, params = toy.model, toy.params
    draw = lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)
    change = jax.tree.map(draw, params)
    parts = layers.parts_of(model.config.num_layers)
    masks = [layers.masked(change, *part) for part in parts]
    total = jax.tree.map(lambda *x: sum(x), *masks)
    jax.tree.map(np.testing.assert_array_equal, total, change)
    overlap = jax.tree.map(lambda *x: sum((y != 0).astype(int) for y in x), *masks)
    assert all(int(x.max()) == 1 for x in jax.tree.leaves(overlap))

    after = first_order.moved(params, change, 0.01)
    found = layers.accounts(toy, [params, after], 2)
    for name in ("reward", "log_prob", "entropy"):
        whole = found[f"{name}_change"]
        assert sum(found[name]) == pytest.approx(whole, rel=2e-2, abs=1e-5)
    assert found["entropy_change"] != 0


def test_a_part_alone_moves_alone(toy, monkeypatch):
    batch = subject.update_batch(toy, subject.experience(toy, "train", 2, 4, 0), 0)
    signs = jnp.where(jnp.arange(8) % 2 == 0, 1.0, -1.0)
    batch = dataclasses.replace(batch, advantages=signs)
    monkeypatch.setattr(layers, "update_batch", lambda *_: batch)
    moved = layers.alone(toy, "mlp", 0, 1)
    still = jax.tree.map(lambda a, b: bool((a == b).all()), moved, toy.params)
    kept = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(still)}
    assert {k for k, same in kept.items() if not same} == {k for k in kept if "'mlp'" in k}


def test_verdict_of_layers():
    row = lambda gain: {
        "parts": list("abcd"),
        "reward": [1.0, 2.0, 3.0, 4.0],
        "entropy": [-1.0, -2.0, -3.0, -4.0],
        "gain": gain,
        "gained": 0.3,
    }
    rows = [row([0.1, 0.2, 0.3, 0.4]), row([0.2, 0.1, 0.3, 0.4])]
    first, second = layers.verdicts(rows)
    assert first.value == second.value == pytest.approx(0.9)
    assert first.ruling == "supported" and "d carries most of it, 40%" in first.note
    assert layers.verdicts(rows[:1])[0].ruling == "undecided"
    assert layers.verdicts([row([4, 3, 2, 1])] * 2)[0].ruling == "not supported"
    close(layers.draw(rows, "toy"))


def test_verdict_of_lp_ft():
    def arm(displacement, norm, count=12):
        return [
            {
                **dict.fromkeys(lp_ft.FIGURES, 0.5),
                "seed": f"seed-{s}",
                "displacement": displacement * (1 + 0.01 * s),
                "norm": norm + 1e-4 * s,
            }
            for s in range(count)
        ]

    rows = {
        "joint_extra": arm(0.4, 0.01),
        "classifier_first": arm(0.41, 0.011),
        "sft": arm(0.4, 0.01),
        "linear_probe_then_finetune": arm(0.2, 0.05),
    }
    features, norm = lp_ft.verdicts(rows)
    assert (features.ruling, norm.ruling) == ("supported", "supported")
    assert features.value == pytest.approx(np.log(0.41 / 0.4))
    assert norm.value == pytest.approx(0.001)
    assert "LP-FT to FT: -0.693" in features.note
    rows["classifier_first"] = arm(0.2, 0.05)
    features, norm = lp_ft.verdicts(rows)
    assert (features.ruling, norm.ruling) == ("not supported", "not supported")
    few = {name: x[:1] for name, x in rows.items()}
    assert {v.ruling for v in lp_ft.verdicts(few)} == {"undecided"}
    close(lp_ft.draw(rows, "toy"))
