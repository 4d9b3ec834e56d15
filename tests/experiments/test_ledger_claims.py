"""The claims about ledgers, single updates and what carries the change, on a tiny run."""

import importlib
import itertools
import json
from argparse import Namespace
from pathlib import Path

import accounts
import counterfactuals
import forking_tokens
import horizon
import jax.numpy as jnp
import kl_price
import matplotlib
import numpy as np
import pytest
import representation
import rulings
import squeezing
import tiny_runs
from inference import sign_flip

from jaxdyn.train import open_run, run_rl
from jaxdyn.train.sharing import batch_features

matplotlib.use("agg")
NAMES = ("representation", "accumulation", "spurious_rewards", "forking_tokens", "squeezing")
NAMES += ("kl_price", "horizon")
RESULTS = Path(__file__).parents[2] / "experiments/results/findings"
TOY = accounts.COUNTS["toy"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Four steps with a checkpoint every two, opened."""
    root = tmp_path_factory.mktemp("claims")
    config = tiny_runs.rl_config(
        root,
        "runs/joint/seed-0",
        train__steps=4,
        train__checkpoint_every=2,
        evaluation__every=0,
        probe__every=0,
    )
    with open_run(run_rl(config)) as opened:
        yield opened


# -- rulings --------------------------------------------------------------------------------------


def test_a_ruling_wants_interval_and_test():
    rng = np.random.default_rng(0)
    values = 0.3 + 0.05 * rng.normal(size=12)
    of = lambda threshold, some=values: rulings.above("c", "s", some, threshold)
    assert [of(t).ruling for t in (0.1, 0.5)] == ["supported", "not supported"]
    assert of(values.mean()).ruling == "undecided"
    found = of(0.1)
    assert found.low < found.value < found.high and found.seeds == 12
    np.testing.assert_allclose(found.value, values.mean(), rtol=1e-12)
    # Five pairs cannot fall below 0.05, nor can one training say anything.
    assert sign_flip(values[:5] - 0.1) == 2 / 2**5
    assert of(0.1, values[:5]).ruling == of(0.1, values[:1]).ruling == "undecided"


def test_shuffled_advantages_stay_with_their_prompt_and_have_its_mean():
    advantages = np.array([1.0, -1.0, 0.0, 3.0, -2.0, -1.0])
    draws = accounts.shuffled(advantages, 3, 4000)
    for group in (slice(0, 3), slice(3, 6)):
        assert {tuple(sorted(x)) for x in draws[:, group]} == {tuple(sorted(advantages[group]))}
    # A mean of 4000 draws of variance at most 14 / 3: four standard errors.
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=4 * np.sqrt(14 / 3 / 4000))


# -- single updates -------------------------------------------------------------------------------


def test_an_updates_origins_signs_and_rest_add_up(saved):
    found = representation.single_update(saved, 2, TOY)
    total = lambda tree: sum(sum(parts.values()) for parts in tree.values())
    parts = [found["real"], found["zero"], found["beside"]]
    size = sum(abs(x) for tree in parts for of in tree.values() for x in of.values())
    whole = sum(map(total, parts))
    # Sums of float32 products, whose rounding is relative to the largest of them.
    np.testing.assert_allclose(whole, found["first_order"], rtol=0, atol=1e-4 * size)
    assert abs(found["first_order"]) > 1e-3 * size
    for origin, real in found["real"].items():
        signs = [found["by_sign"][sign][origin] for sign in ("positive", "negative")]
        for part, x in real.items():
            np.testing.assert_allclose(sum(s[part] for s in signs), x, rtol=1e-6, atol=1e-12)
            # The null law: of shuffled advantages nothing is left on average, by any component.
            error = found["shuffled_sd"][origin][part] / np.sqrt(TOY.shuffles)
            assert abs(found["shuffled_mean"][origin][part]) <= 4 * error + 1e-12


def test_counterfactual_updates_are_of_one_length_and_halves_of_one_whole(saved):
    found = counterfactuals.counterfactual(saved, 2, TOY)
    for name, x in found.items():
        assert np.isfinite(list(x.values())).all(), name
        # The KL is 10⁻³ nats: what H changes by is its first order but for a few per cent of it.
        assert abs(x["entropy"] - x["entropy_first_order"]) < 0.01, name


def test_a_step_of_centred_features_leaves_the_mean_feature_alone(saved):
    """Plain ones are −Σ g φᵀ, by autodiff."""
    task = saved.task
    prepared, update = accounts.taken(saved, 2)
    batch, weights = prepared.batch, jnp.asarray(update.weights)
    gradient = accounts.loss_gradient(task.model, update.before, batch, weights, jnp.float32(1))
    phi = batch_features(task.model, update.before["backbone"], batch)
    steps = counterfactuals.classifier_steps(
        task.model, update.before, phi, batch, weights, jnp.float32(1)
    )
    scale = float(jnp.abs(steps["plain"]).max())
    np.testing.assert_allclose(
        steps["plain"], -gradient["classifier"]["weight"], rtol=0, atol=1e-5 * scale
    )
    mask = np.asarray(batch.completion_mask)
    field = np.asarray(steps["plain"]) - np.asarray(steps["centred"])
    mean = np.asarray(phi)[mask].mean(axis=0)
    # What is taken out is rank one, along the mean feature.
    along = field @ mean / (mean @ mean)
    np.testing.assert_allclose(field, np.outer(along, mean), rtol=0, atol=1e-4 * scale)


# -- along the training ---------------------------------------------------------------------------


def test_the_segments_reward_and_entropy_add_up_by_component_place_and_token(saved):
    row = kl_price.look_at(saved, TOY)
    for what in ("kl", "reward"):
        by_part, places = row[what], row[f"{what}_by_place"]
        size = sum(map(abs, places.values()))
        np.testing.assert_allclose(
            sum(places.values()), sum(by_part.values()), rtol=0, atol=1e-4 * size
        )
        np.testing.assert_allclose(
            places["classifier"], by_part["representation"], rtol=0, atol=1e-4 * size
        )
    np.testing.assert_allclose(sum(row["kl"].values()), row["kl_change"], rtol=1e-3)

    curves = forking_tokens.places(saved, TOY)
    whole = sum(
        float(s.weights @ s.account.change("log_prob")[0])
        for s in accounts.segments(saved, TOY, through="features")
    )
    np.testing.assert_allclose(curves["reward"][-1], whole, rtol=1e-6)
    # The same by the other path's components.
    np.testing.assert_allclose(sum(row["reward"].values()), whole, rtol=1e-3, atol=1e-6)
    held = curves["held"]
    assert all(a < b for a, b in itertools.pairwise(held))
    assert forking_tokens.fifth(held) > 0.2  # the most uncertain ones hold more than their number


def test_the_forecast_is_best_one_step_ahead(saved):
    curve = horizon.look_at(saved, TOY)["curve"]
    assert curve["1"]["r"] > 0.99 and curve["1"]["residual"] < curve["2"]["residual"]


def test_the_horizon_lies_where_the_residual_passes_the_limit():
    curve = lambda *x: {str(k): {"residual": r} for k, r in zip((1, 2, 8), x, strict=True)}
    assert horizon.horizon(curve(0.1, 0.2, 0.3)) == 8
    assert horizon.horizon(curve(0.6, 0.7, 0.8)) == 1
    np.testing.assert_allclose(horizon.horizon(curve(0.1, 0.4, 0.6)), 4, rtol=1e-12)


# -- squeezing ------------------------------------------------------------------------------------


def test_one_pushed_token_squeezes_as_the_formula_says():
    """At one site by itself g = −a (e_y − π) gains log π_top / π_v by a (π_top − π_v)."""
    logits = np.array([[0.3, 2.0, -1.0, 0.1]])
    log_probs = logits - np.log(np.exp(logits).sum())
    probs, pushed, a = np.exp(log_probs)[0], np.array([0]), 1e-4
    change = -a * (np.eye(4)[pushed] - probs)
    groups = squeezing.groups_of(log_probs, pushed)
    assert [x[0].tolist().index(True) for x in groups.values()] == [0, 1, 2]
    found = squeezing.predicted(log_probs, change, groups)
    rest = probs[2:]
    expected = a * (probs[1] - (rest @ rest) / rest.sum())
    np.testing.assert_allclose(found["squeeze"], [expected], rtol=1e-12)
    assert expected > 0 > found["token"][0]
    moved = logits + change
    after = moved - np.log(np.exp(moved).sum())
    seen = squeezing.actual(log_probs, after, groups)
    for name, x in found.items():
        np.testing.assert_allclose(x, seen[name], rtol=1e-3, atol=1e-9)


# -- scripts and their results --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accumulation", "spurious_rewards", "squeezing"])
def test_a_script_answers_from_one_training_that_it_is_undecided(saved, tmp_path, name):
    script = importlib.import_module(name)
    chosen = Namespace(
        runs=Path(str(saved.path)).parents[1], size="toy", name="tiny", output=tmp_path
    )
    answer = script.keep(chosen, name, script.find)
    content = json.loads(answer.read_text())
    assert {v["ruling"] for v in content["verdicts"]} == {"undecided"}
    assert_recomputed(content)
    assert (tmp_path / "tiny" / f"{name}.png").stat().st_size > 10_000


def test_kept_verdicts_are_those_of_their_rows():
    for path in sorted(p for name in NAMES for p in RESULTS.glob(f"*/{name}.json")):
        assert_recomputed(json.loads(path.read_text()))


def assert_recomputed(content):
    """The verdicts that a finding's file holds follow from its rows."""
    found = importlib.import_module(content["script"]).verdicts(content["rows"])
    assert len(found) == len(content["verdicts"])
    for verdict, kept in zip(found, content["verdicts"], strict=True):
        assert (verdict.claim, verdict.ruling) == (kept["claim"], kept["ruling"])
        size = max(abs(kept["low"]), abs(kept["high"]))
        for name in ("value", "low", "high"):
            # Rows are kept with six digits.
            got, there = getattr(verdict, name), kept[name]
            np.testing.assert_allclose(got, there, rtol=1e-4, atol=1e-4 * size)
