"""The budget of entropy: the constraint in float64, by autodiff, and what leaves a step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny_runs
from test_update import RATE, SGD, TEMPERATURE, fresh, tiny_batch

from jaxdyn.commands.influence import run as influence_of
from jaxdyn.commands.influence_options import InfluenceOptions
from jaxdyn.optim import OptimConfig
from jaxdyn.optim.spill import entropy_pull
from jaxdyn.rl import LossConfig
from jaxdyn.train import run_rl, update
from jaxdyn.train.sharing import batch_features
from jaxdyn.train.spill import spill_update
from jaxdyn.types import JaxdynError

# Neither a KL nor a decay, so that one sign of the advantages lowers the entropy.
NO_KL, ADAM = LossConfig(), OptimConfig(eps=1e-3)


@pytest.fixture(scope="module")
def problem():
    """A model, a batch and its features, in float64."""
    with jax.enable_x64(True):
        model, params = oracles.tiny_model("gpt_neox-untied")
        batch = tiny_batch()
        return model, params, batch, batch_features(model, params["backbone"], batch)


def mean_entropy(problem, weight):
    """H̄ of π at the sampler's temperature, at the batch's tokens, features held fixed."""
    _, _, batch, features = problem
    log_probs = jax.nn.log_softmax(features @ weight.T / TEMPERATURE)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(axis=-1)
    return jnp.sum(jnp.where(batch.completion_mask, entropy, 0)) / batch.completion_mask.sum()


def step(problem, optim, budget=None, rate=RATE, stage="joint", sign=1.0, microbatches=1):
    """W after an update with a budget, or a plain one, and its metrics; and the body after it."""
    model, params, batch, features = problem
    batch = batch.replace(advantages=sign * batch.advantages)
    given = features if stage == "classifier" else None
    numbers = [jnp.float64(rate), jnp.float64(TEMPERATURE)]
    static = {"model": model, "loss": NO_KL, "optim": optim, "microbatches": microbatches}
    take = update if budget is None else spill_update
    numbers += [] if budget is None else [jnp.float64(budget)]
    state, metrics = take(fresh(model, params, optim, stage), {}, batch, given, *numbers, **static)
    return state.params["classifier"]["weight"], metrics, state.params.get("backbone")


def test_the_pull_is_the_entropys_gradient(x64):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, 7)))
    logits = logits.at[0, 0].set(800)  # a token that is certain
    entropy = lambda f: -jnp.sum(jax.nn.softmax(f) * jax.nn.log_softmax(f))
    wanted = jax.vmap(jax.grad(entropy))(logits)
    np.testing.assert_allclose(entropy_pull(jax.nn.log_softmax(logits)), wanted, atol=1e-13)


@pytest.mark.parametrize("stage", ["joint", "classifier"])
@pytest.mark.parametrize("optim", [SGD, ADAM], ids=["sgd", "adamw"])
def test_the_first_order_loss_is_at_most_the_budget(problem, optim, stage, x64):
    weight = problem[1]["classifier"]["weight"]
    gradient = jax.grad(lambda w: mean_entropy(problem, w))(weight)
    change = lambda moved: float(jnp.sum(gradient * (moved - weight)))
    changes = {s: change(step(problem, optim, stage=stage, sign=s)[0]) for s in (1, -1)}
    sign, falls = min(changes.items(), key=lambda item: item[1])
    assert falls < 0
    plain, _, body = step(problem, optim, stage=stage, sign=sign)
    for share in (0.0, 0.25, 0.9):
        kept, metrics, other = step(problem, optim, -share * falls, stage=stage, sign=sign)
        np.testing.assert_allclose(change(kept), share * falls, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(metrics["spill/entropy"], falls, rtol=1e-9)
        np.testing.assert_allclose(metrics["spill/repaid"], (share - 1) * falls, rtol=1e-9)
        # What is given back goes along P c, and the body goes where it went.
        if optim is SGD:
            back = np.asarray(kept - plain)
            along = np.sum(back * gradient) / np.linalg.norm(back) / np.linalg.norm(gradient)
            np.testing.assert_allclose(along, 1, rtol=1e-9)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), other, body)
    within, metrics, _ = step(problem, optim, -1.01 * falls, stage=stage, sign=sign)
    np.testing.assert_allclose(within, plain, rtol=0, atol=1e-14)
    assert metrics["spill/repaid"] == 0


def test_what_is_missing_is_of_second_order(problem, x64):
    """H̄ itself falls by ε up to O(η²): a tenth of step and budget misses a hundredth."""
    start = mean_entropy(problem, problem[1]["classifier"]["weight"])
    sign = next(s for s in (1, -1) if step(problem, SGD, 0.0, sign=s)[1]["spill/entropy"] < 0)
    missing = []
    for scale in (1.0, 0.1):
        budget = 1e-5 * scale
        weight, metrics, _ = step(problem, SGD, budget, 0.1 * scale, "classifier", sign)
        assert metrics["spill/repaid"] > 0
        missing.append(float(mean_entropy(problem, weight) - start + budget))
    np.testing.assert_allclose(missing[0] / missing[1], 100, rtol=0.2)


def test_microbatches_change_nothing(problem, x64):
    ends = [step(problem, ADAM, 0.0, microbatches=n)[0] for n in (1, 2)]
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-12)


def test_a_run_with_them(tmp_path):
    changes = {"optim__schedule": "spill_first", "optim__spill_budget": 0.0}
    path = run_rl(tiny_runs.rl_config(tmp_path, "spill", **changes))
    lines = [x for x in tiny_runs.lines(path, "metrics.jsonl") if x["step"] >= 0]
    assert [x["cfrl/stage"] for x in lines] == [1] * 3 + [2] * 6
    for x in lines:
        wanted = max(0, -x["spill/entropy"])
        np.testing.assert_allclose(x["spill/repaid"], wanted, rtol=1e-4, atol=1e-9)
    with pytest.raises(JaxdynError, match="influence has no columns of it"):
        influence_of(InfluenceOptions(str(path), step=3, output=str(tmp_path / "unused")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__classifier": "lora"}, "optim.classifier must be full, got lora"),
        ({"loss__loss_type": "ppo"}, "knows no loss ppo"),
        ({"train__update": "pmap"}, "knows no train.update pmap"),
        ({"optim__spill_budget": -1.0}, "spill_budget must .*got -1"),
    ],
)
def test_what_does_not_go_with_them(changes, words, tmp_path):
    with pytest.raises(JaxdynError, match=words):
        tiny_runs.rl_config(tmp_path, "x", **{"optim__schedule": "spill", **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__schedule": "spill"}, "schedule spill changes the classifier's steps"),
        ({"optim__classifier_multiplier": 3.0}, "set model.untie, got 3.0"),
    ],
)
def test_a_tied_model_has_no_classifier_of_its_own(changes, words, tmp_path):
    with pytest.raises(JaxdynError, match=words):
        run_rl(tiny_runs.rl_config(tmp_path, "tied", tied=True, **changes))
