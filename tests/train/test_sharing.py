"""A pass over a prompt for all of its completions: who takes it, and that it is the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_update import ADAM, GRPO, B, C, S, fresh, tiny_batch

from jaxdyn.distributed import make_mesh, shard_model
from jaxdyn.distributed.layout import Layout
from jaxdyn.sections import MeshConfig
from jaxdyn.train import update
from jaxdyn.train.policy import ValueTargets
from jaxdyn.train.sharing import batch_features, completions_together, rollout_of, sequences_of
from jaxdyn.types import Branches

G = 2


def batches(parts=1, **changes):
    """Two prompts with two completions each, a row for every completion and for every prompt."""
    batch = tiny_batch()
    tokens, mask = (x.at[1::2, :S].set(x[::2, :S]) for x in (batch.tokens, batch.mask))
    batch = batch.replace(tokens=tokens, mask=mask, **changes)
    shared = sequences_of(rollout_of(batch), G, parts)
    return batch, batch.replace(tokens=shared.tokens, mask=shared.mask)


def test_which_completions_share_a_pass():
    assert completions_together((512, 128), 2, 8) == 8
    assert completions_together((16, 64), 2, 8, parts=2) == 8
    # Of eight parts each gets two of the sixteen completions: of one prompt, so they share it.
    assert completions_together((512, 128), 2, 8, parts=8) == 2
    assert completions_together((512, 128), 2, 8, parts=16) == 1
    assert completions_together((512, 128), 2, 6, parts=4) == 3
    # 8 · 264 slots against 8 + 8 · 256: hardly fewer.
    assert completions_together((8, 256), 2, 8) == 1


def test_rows_that_branch_hold_the_same_completions():
    batch, shared = batches()
    assert shared.tokens.shape == (B // G, S + G * C)
    assert isinstance(shared.mask, Branches)
    for x, y in zip(*map(jax.tree.leaves, map(rollout_of, (batch, shared))), strict=True):
        np.testing.assert_array_equal(x, y)


def on_host(tree):
    return jax.tree.map(np.asarray, jax.tree.leaves(tree))


def close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), found, expected)


@pytest.mark.parametrize("name, microbatches", [("llama-tied", 2), ("gemma3_text-tied", 1)])
def test_the_update_is_the_same(name, microbatches, x64):
    """Adam's step, its gradient by path, and metrics."""
    model, params = oracles.tiny_model(name)
    batch, shared = batches(microbatches)
    close(*(updated(model, params, x, microbatches) for x in (shared, batch)))


def updated(model, params, batch, microbatches=1, loss=GRPO, place=lambda x: x):
    static = {"model": model, "loss": loss, "optim": ADAM, "microbatches": microbatches}
    state = place(fresh(model, params, ADAM))
    return update(state, {}, batch, None, jnp.float64(0.01), jnp.float64(0.7), **static)


def test_a_critics_update_is_the_same(x64):
    """The value head reads the same features, whose cotangents it adds to."""
    model, params = oracles.tiny_model("gpt_neox-untied")
    value = {"weight": jnp.linspace(-1, 1, 8), "bias": jnp.float64(0.3)}
    draw = lambda: jnp.asarray(np.random.default_rng(1).standard_normal((B, C)))
    changes = {"values": ValueTargets(draw(), draw() + 1), "advantages": draw()}
    batch, shared = batches(**changes)
    loss = dataclasses.replace(GRPO, loss_type="ppo")
    close(*(updated(model, {**params, "value": value}, x, loss=loss) for x in (shared, batch)))


def test_on_a_mesh(x64):
    """Prompts are divided between two devices, heads between two."""
    model, params = oracles.tiny_model("gpt2-untied")
    batch, shared = batches(parts=2)
    layout = Layout(make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4]))
    there = shard_model(model, layout.mesh), layout.place(params), layout.rows(shared)
    close(*map(on_host, (updated(*there, place=layout.place), updated(model, params, batch))))


def test_adapters_on_features(x64):
    model, params = oracles.adapted_model("gpt_neox-untied")
    batch, shared = batches()
    features = [batch_features(model, params["backbone"], x) for x in (shared, batch)]
    close(*(jnp.where(batch.completion_mask[..., None], x, 0) for x in features))
