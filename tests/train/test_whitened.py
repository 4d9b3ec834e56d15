"""Whitened classifier steps: the formula in NumPy, the budget of KL, and what leaves them alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny_runs
from test_update import GRPO, RATE, TEMPERATURE, fresh, tiny_batch

from jaxdyn.commands.influence import run as influence_of
from jaxdyn.commands.influence_options import InfluenceOptions
from jaxdyn.optim import OptimConfig
from jaxdyn.rl import LossConfig, logit_cotangents, normalizer_of
from jaxdyn.train import run_rl, update
from jaxdyn.train.sharing import batch_features
from jaxdyn.train.whitened import whitened_update
from jaxdyn.types import JaxdynError

OPTIM = OptimConfig(schedule="whitened_first")
RIDGE = 0.02


@pytest.fixture(scope="module")
def problem():
    """A model whose features differ, a batch, its features and logits, in float64."""
    with jax.enable_x64(True):
        model, params = oracles.tiny_model("gpt_neox-untied")
        batch = tiny_batch()
        return model, params, batch, batch_features(model, params["backbone"], batch)


def step(problem, kl, batch=None, params=None, features=None, loss=GRPO, microbatches=1):
    model, stored, given, phi = problem
    state, metrics = whitened_update(
        fresh(model, params or stored, OPTIM, "classifier"),
        {},
        batch or given,
        phi if features is None else features,
        jnp.float64(kl),
        jnp.float64(RIDGE),
        jnp.float64(TEMPERATURE),
        model=model,
        loss=loss,
        microbatches=microbatches,
    )
    return np.asarray(state.params["classifier"]["weight"]), metrics


def log_softmax(f):
    return f - np.log(np.exp(f).sum(axis=-1, keepdims=True))


def kl_of(problem, weight):
    """Σ_v π_v log(π_v / π'_v) at the sampler's temperature, a mean over the batch's tokens."""
    _, params, batch, features = problem
    at = lambda w: log_softmax(np.asarray(features) @ np.asarray(w).T / TEMPERATURE)
    old, new = at(params["classifier"]["weight"]), at(weight)
    return (np.exp(old) * (old - new)).sum(axis=-1)[np.asarray(batch.completion_mask)].mean()


def test_it_is_the_formula(problem, x64):
    _, params, batch, features = problem
    weight, mask = np.asarray(params["classifier"]["weight"]), np.asarray(batch.completion_mask)
    phi, ids = np.asarray(features)[mask], np.asarray(batch.completion_ids)[mask]
    log_probs = log_softmax(phi @ weight.T / TEMPERATURE)
    logps = np.zeros(mask.shape)
    logps[mask] = log_probs[np.arange(len(ids)), ids]
    found = logit_cotangents(
        GRPO,
        jnp.asarray(logps),
        batch.old_per_token_logps,
        batch.ref_per_token_logps,
        batch.advantages,
        batch.completion_mask,
        normalizer_of(batch.completion_mask),
    )
    pull = np.asarray(found.of_logp)[mask]
    g = -pull[:, None] * (np.eye(weight.shape[0])[ids] - np.exp(log_probs)) / TEMPERATURE
    moment = phi.T @ phi / len(phi)
    ridge = RIDGE * np.trace(moment) / len(moment)
    direction = g.T @ phi @ np.linalg.inv(moment + ridge * np.eye(len(moment)))
    z, probs = phi @ direction.T / TEMPERATURE, np.exp(log_probs)
    kappa = ((probs * z**2).sum(axis=1) - (probs * z).sum(axis=1) ** 2).mean()
    wanted = weight + np.sqrt(2 * 1e-3 / kappa) * direction
    for microbatches in (1, 2):
        moved, metrics = step(problem, 1e-3, microbatches=microbatches)
        np.testing.assert_allclose(moved, wanted, rtol=0, atol=1e-12)
    size = np.linalg.norm(wanted - weight)
    np.testing.assert_allclose(metrics["update_norm"], size, rtol=1e-10)


def test_its_kl_is_the_budget_to_second_order(problem, x64):
    """What is missing is of third order: it falls as √δ of the budget."""
    missing = [kl_of(problem, step(problem, kl)[0]) / kl - 1 for kl in (1e-4, 1e-6)]
    assert abs(missing[1]) < 2e-3
    np.testing.assert_allclose(missing[0] / missing[1], 10, rtol=0.2)


def test_the_scale_of_the_features_is_no_part_of_it(problem, x64):
    model, params, batch, features = problem
    wide = {**params, "classifier": {"weight": params["classifier"]["weight"] / 3}}
    moved, scaled = (
        step(problem, 1e-2)[0],
        step(problem, 1e-2, params=wide, features=3 * features)[0],
    )
    np.testing.assert_allclose(3 * scaled, moved, rtol=0, atol=1e-12)
    # Of a plain step it is: the logits move 9 times as far.
    sgd = OptimConfig(optimizer="sgd", max_grad_norm=0.0)
    ends = []
    for given, phi in ((params, features), (wide, 3 * features)):
        state = fresh(model, given, sgd, "classifier")
        scalars = jnp.float64(RATE), jnp.float64(TEMPERATURE)
        state, _ = update(state, {}, batch, phi, *scalars, model=model, loss=GRPO, optim=sgd)
        change = state.params["classifier"]["weight"] - given["classifier"]["weight"]
        ends.append(np.asarray(phi @ change.T))
    np.testing.assert_allclose(ends[1], 9 * ends[0], rtol=1e-9, atol=1e-12)


def test_a_batch_without_signal_moves_nothing(problem, x64):
    batch = problem[2].replace(advantages=jnp.zeros(4))
    moved, _ = step(problem, 1e-2, batch=batch, loss=LossConfig(beta=0.0))
    np.testing.assert_array_equal(moved, problem[1]["classifier"]["weight"])


def test_a_run_begins_with_them(tmp_path):
    changes = {"optim__schedule": "whitened_first", "train__checkpoint_every": 2}
    path = run_rl(tiny_runs.rl_config(tmp_path, "whitened", **changes))
    lines = {line["step"]: line for line in tiny_runs.lines(path, "metrics.jsonl")}
    assert [lines[n]["cfrl/stage"] for n in (0, 2, 3, 8)] == [1, 1, 2, 2]
    assert lines[0]["learning_rate"] == 0 < lines[4]["learning_rate"]
    assert lines[0]["update_norm"] > 0
    with np.load(path / "dynamics" / "step_000001.npz") as first:
        assert not first["gradient"].any() and first["representation"].any()
    with pytest.raises(JaxdynError, match="no columns of it; take a step of joint training"):
        influence_of(InfluenceOptions(str(path), step=2, output=str(tmp_path / "unused")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__classifier": "lora"}, "optim.classifier must be full, got lora"),
        ({"loss__loss_type": "ppo"}, "knows no loss ppo"),
        ({"train__update": "pmap"}, "knows no train.update pmap"),
        ({"optim__whitened_kl": 0.0}, "whitened_kl must be positive, got 0"),
    ],
)
def test_what_does_not_go_with_them(changes, words, tmp_path):
    with pytest.raises(JaxdynError, match=words):
        tiny_runs.rl_config(tmp_path, "x", **{"optim__schedule": "whitened_only", **changes})
    assert dataclasses.replace(OPTIM, schedule="joint").whitened is False
