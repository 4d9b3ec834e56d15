"""Every column of an update's account, in float64, against the update that training took."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from test_update import C, tiny_batch

from jaxdyn.commands.influence_momentum import decay_of, earlier_of, traced
from jaxdyn.dynamics import delta_logits, influence, sites_from_rollout
from jaxdyn.kernels.rows import statistics_of
from jaxdyn.optim import Stage
from jaxdyn.rl import CovarianceConfig, ImportanceConfig
from jaxdyn.rollout import SamplingConfig
from jaxdyn.train import fresh_state
from jaxdyn.train.policy import ValueTargets, batch_values
from jaxdyn.train.retake import batch_rollout, take_updates
from jaxdyn.train.sharing import batch_features
from jaxdyn.train.step import Prepared
from jaxdyn.train.task import open_task

KL = {"loss__beta": 0.3, "loss__entropy_coefficient": 0.2}
ADAM = {"optim__eps": 1e-3, "optim__weight_decay": 0.1, "optim__max_grad_norm": 0.05}
MOMENTUM = {"optim__optimizer": "sgd", "optim__momentum": 0.8, "optim__learning_rate": 0.05}
CASES = {
    "classifier": ("classifier", {**KL, **ADAM}),
    "adapters": ("joint", {**KL, **ADAM, "optim__backbone": "lora", "optim__classifier": "lora"}),
    "momentum": ("joint", {**MOMENTUM, "optim__max_grad_norm": 0.3, "tied": True}),
    "sequences": ("joint", {**KL, "loss__loss_type": "rloo", "loss__kl_placement": "loss"}),
    "critic": ("joint", {**KL, **ADAM, "loss__loss_type": "ppo", "loss__kl_placement": "reward"}),
    "importance, microbatches": (
        "joint",
        {**KL, **ADAM, "loss__importance": ImportanceConfig(1.02), "train__microbatches": 2},
    ),
    "tied, covariance, epochs": (
        "joint",
        {
            **{**KL, **ADAM, "tied": True},
            **{"train__num_iterations": 2, "loss__covariance": CovarianceConfig("kl")},
        },
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("retake")


def widened(task):
    """The task in float64, its adapters far from their zero start."""
    rng = np.random.default_rng(5)

    def draw(path, x):
        away = 0.1 * rng.standard_normal(x.shape) if "lora" in str(path) else 0
        return jnp.asarray(np.asarray(x) + away, jnp.float64)

    params = jax.tree_util.tree_map_with_path(draw, task.params)
    return dataclasses.replace(
        task, model=dataclasses.replace(task.model, dtype=jnp.float64), params=params
    )


def taken(root, stage, tied=False, **changes):
    """The task, the batch's completions, and the updates of two steps by it."""
    config = tiny_runs.rl_config(root, "unused", tied=tied, **changes)
    sampling = SamplingConfig(max_completion_length=C, temperature=0.7)
    task = widened(open_task(dataclasses.replace(config, sampling=sampling)))
    stage = Stage(stage, 0, 8)
    state = fresh_state(task.model, task.params, config.optim, stage.name, config.critic)
    batch = tiny_batch(task.model.config.vocab_size)
    logps, entries = batch.old_per_token_logps, jnp.arange(4.0 * C).reshape(4, C)
    batch = batch.replace(
        sampler_per_token_logps=logps + 0.3 * jnp.sin(entries), held_back=jnp.cos(entries) > 0
    )
    features = batch_features(task.model, task.params["backbone"], batch)
    if config.critic:
        rng = np.random.default_rng(6)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
        state.params["value"] = {"weight": draw(16), "bias": draw()}
        old = batch_values(state.params["value"], features)
        batch = batch.replace(
            values=ValueTargets(old, old + draw(*old.shape)), advantages=draw(*old.shape)
        )
    features = features if stage.name == "classifier" else None
    prepared = Prepared(None, batch, features, 3e-3, {})
    updates: list = []
    for _ in range(2):
        updates += take_updates(task, state, stage, prepared)
        state = updates[-1].state
    return task, batch_rollout(prepared), updates


@pytest.mark.parametrize(("stage", "changes"), CASES.values(), ids=CASES.keys())
def test_the_columns_are_the_update(stage, changes, root, x64):
    """Their sum is the product along the applied update, component by component.

    Tied and untied, of every optimizer and stage, with and without what losses add to a step.
    """
    task, rollout, updates = taken(root, stage, **changes)
    model, sites = task.model, sites_from_rollout(rollout, 1, 0)
    many = task.config.train.num_iterations
    assert len(updates) == 2 * many
    history = [earlier_of(n // many, rollout, update) for n, update in enumerate(updates)]
    share = 0
    for number, update in enumerate(updates[many:], start=many):
        found = influence(
            model,
            update.before,
            update.after,
            sites,
            rollout,
            weights=update.weights,
            temperature=update.temperature,
            metric=update.metric,
            clip=update.clip,
            others=update.others,
        )
        delta = jax.tree.map(jnp.subtract, update.after, update.before)
        if model.config.tied:
            share, before = update.state.head_share, share
        share_of = share - before if model.config.tied else None
        parts, gradients = along(model, update.before, delta, sites, share_of)
        rows = functools.partial(jnp.einsum, "tnv,nv->tn", gradients)
        scale = float(np.abs(rows(parts.total)).max())
        assert scale > 1e-5
        for name in ("representation", "gradient", "cross"):
            columns = getattr(found.completions, name).sum(axis=-1)
            columns += sum(getattr(x, name) for x in found.others.values())
            wanted = rows(getattr(parts, name))
            np.testing.assert_allclose(columns, wanted, rtol=0, atol=1e-10 * scale, err_msg=name)
        assert float(np.abs(found.residual).max()) < 1e-10 * scale
        actual = statistics(model, update.after, sites) - statistics(model, update.before, sites)
        np.testing.assert_allclose(found.actual, actual, rtol=0, atol=1e-13)
        np.testing.assert_allclose(
            found.columns + found.residual + found.second_order, actual, rtol=0, atol=1e-13
        )
        sizes = {name: float(np.abs(x.total).max()) for name, x in found.others.items()}
        if stage == "joint" and "optim__max_grad_norm" in changes:
            assert update.clip < 1 and sizes["clipping"] > 1e-3 * scale
        assert sizes["momentum"] > 1e-3 * scale
        if "critic" not in sizes:  # whose gradients are in the momentum, and in no completion
            beta = decay_of(task.config.optim)
            parts = traced(model, update, sites, history[:number], beta)
            assert set(parts) == ({0, 1} if number > many else {0})
            for name in ("representation", "gradient", "cross"):
                back = sum(getattr(x, name).sum(axis=-1) for x in parts.values())
                wanted = getattr(found.others["momentum"], name)
                np.testing.assert_allclose(back, wanted, rtol=0, atol=1e-10 * scale, err_msg=name)
        if "optim__weight_decay" in changes:
            assert sizes["decay"] > 1e-6 * scale
        assert ("critic" in sizes) == ("ppo" in changes.values())


@functools.partial(jax.jit, static_argnums=0)
def along(model, params, delta, sites, share):
    """The logits' change along a step, and the statistics' gradients by logits."""
    phi, parts = delta_logits(model, params, delta, sites, share)
    logits = model.logits(model.view(params)["classifier"], phi)
    return parts, statistics_of(logits, sites.targets)[1]


@functools.partial(jax.jit, static_argnums=0)
def statistics(model, params, sites):
    """log π and H at the sites, straight from the model's two functions."""
    view = model.view(params)
    phi = model.features(view["backbone"], sites.tokens, sites.mask)
    logits = model.logits(view["classifier"], phi)[sites.rows, sites.positions]
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, sites.targets[:, None], axis=1)[:, 0]
    return jnp.stack([chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1)])
