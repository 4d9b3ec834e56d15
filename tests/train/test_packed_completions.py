"""Completions without their padding: an update on them is the same as on padded ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_sharing import close
from test_update import GRPO, S, tiny_batch
from test_update import joint as updated

from jaxdyn.distributed import Layout, make_mesh, shard_model
from jaxdyn.sections import MeshConfig
from jaxdyn.train import sharing
from jaxdyn.train.policy import ValueTargets, policy_certainty, policy_logps
from jaxdyn.train.sharing import batch_features, packed_slots, rollout_of, sequences_of
from jaxdyn.types import Rollout

G, C = 2, 8
LENGTHS = np.array([7, 1, 2, 3])
STEP = sharing.SMALLEST_STEP


@pytest.fixture(autouse=True)
def in_steps_of_one(monkeypatch):
    monkeypatch.setattr(sharing, "SMALLEST_STEP", 1)


def batches(parts=1, **changes):
    """Two prompts with two completions each of a few tokens: padded, and packed in `parts` rows."""
    batch, rng = tiny_batch(), np.random.default_rng(4)
    sampled = jnp.asarray(np.arange(C) < LENGTHS[:, None])
    ids = jnp.asarray(rng.integers(0, oracles.VOCAB, (4, C)), jnp.int32)
    prompts, there = (x.at[1::2].set(x[::2]) for x in (batch.tokens[:, :S], batch.mask[:, :S]))
    rollout = Rollout(prompts, there, ids, sampled, jnp.zeros((4, C), jnp.float32))
    draw = lambda: jnp.asarray(0.3 * rng.standard_normal((4, C)) - 2)
    batch = batch.replace(
        tokens=rollout.tokens,
        mask=rollout.mask,
        completion_ids=ids,
        completion_mask=sampled.at[3].set(False),  # of the last none counts: it was cut off
        old_per_token_logps=draw(),
        ref_per_token_logps=draw(),
        **changes,
    )
    packed = sequences_of(rollout, G, parts)
    return batch, batch.replace(tokens=packed.tokens, mask=packed.mask)


def test_what_lies_where():
    padded, packed = batches(parts=2)
    # Of two rows, a prompt each, the first holds 7 + 1 tokens and the second 2 + 3 and room.
    assert packed.tokens.shape == (2, S + 8)
    wanted = [[*range(7), C], [0, 1, C, C + 1, C + 2, -1, -1, -1]]
    np.testing.assert_array_equal(packed.mask.packed, wanted)
    ids = np.asarray(padded.completion_ids)
    np.testing.assert_array_equal(packed.tokens[0, S:], [*ids[0, :7], ids[1, 0]])
    np.testing.assert_array_equal(packed.tokens[1, S : S + 5], [*ids[2, :2], *ids[3, :3]])
    again, before = rollout_of(packed), padded
    np.testing.assert_array_equal(again.tokens, before.tokens)
    np.testing.assert_array_equal(again.mask, before.mask)


def test_sizes_are_few_and_little_is_empty(monkeypatch):
    """Of completions of about half the slots: at most a ninth is padding, in eight sizes an octave;
    and what is nearly full stays as it is."""
    monkeypatch.setattr(sharing, "SMALLEST_STEP", STEP)
    rng, sizes = np.random.default_rng(0), set()
    for _ in range(200):
        lengths = rng.integers(20, 150, 48)
        sampled = np.arange(160) < lengths[:, None]
        packed = np.asarray(packed_slots(sampled, 64, 8, 1))
        assert (packed >= 0).sum() == lengths.sum()
        assert np.mean(packed < 0) <= 1 / (sharing.FINENESS + 1)
        sizes.add(packed.shape)
    assert len(sizes) <= 6
    assert packed_slots(np.arange(160) < np.full((48, 1), 150), 64, 8, 1) is None
    assert packed_slots(np.zeros((48, 160), bool), 64, 8, 1).shape == (1, STEP)


@pytest.mark.parametrize(
    ("name", "aggregation", "parts"),
    [
        ("llama-tied", "token-mean", 2),
        pytest.param("gemma3_text-tied", "sequence-mean-token-mean", 1, marks=pytest.mark.slow),
        pytest.param("gpt2-untied", "sequence-mean-token-sum", 2, marks=pytest.mark.slow),
    ],
)
def test_the_update_is_the_same(name, aggregation, parts, x64):
    """Adam's step, its gradient by path, loss and metrics."""
    model, params = oracles.tiny_model(name)
    loss = dataclasses.replace(GRPO, aggregation=aggregation)
    how = {"loss": loss, "microbatches": parts}
    close(*(updated(model, params, batch, **how) for batch in reversed(batches(parts))))


@pytest.mark.slow
def test_on_a_mesh(x64):
    """Each of two shares of the rows packs its own; the heads are divided too."""
    model, params = oracles.tiny_model("llama-untied")
    padded, packed = batches(parts=2)
    layout = Layout(make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4]))
    there = shard_model(model, layout.mesh), layout.place(params), layout.rows(packed)
    assert there[2].mask.packed.addressable_shards[0].data.shape == (1, 8)
    loss = dataclasses.replace(GRPO, aggregation="sequence-mean-token-sum-norm")
    close(updated(*there, loss=loss), updated(model, params, padded, loss=loss))


@pytest.mark.slow
def test_a_critics_update_is_the_same(x64):
    model, params = oracles.tiny_model("gpt_neox-untied")
    value = {"weight": jnp.linspace(-1, 1, 8), "bias": jnp.float64(0.3)}
    draw = lambda: jnp.asarray(np.random.default_rng(1).standard_normal((4, C)))
    changes = {"values": ValueTargets(draw(), draw() + 1), "advantages": draw()}
    loss = dataclasses.replace(GRPO, loss_type="ppo")
    params = {**params, "value": value}
    close(*(updated(model, params, batch, loss=loss) for batch in reversed(batches(**changes))))


def test_log_probs_features_and_certainty(x64):
    """Where a token is; elsewhere they are 0, and read by nobody."""
    model, params = oracles.tiny_model("llama-tied")
    padded, packed = batches()
    mask = rollout_of(padded).completion_mask
    assert packed.tokens.shape == (1, 2 * S + 13)
    found, wanted = (policy_logps(model, params, x, 0.7) for x in (packed, padded))
    close(found, jnp.where(mask, wanted, 0))
    assert float(jnp.abs(found).max()) > 1
    found, wanted = (batch_features(model, params["backbone"], x) for x in (packed, padded))
    close(found, jnp.where(mask[..., None], wanted, 0))
    close(*(policy_certainty(model, params, x, 0.7) for x in (packed, padded)))
    assert jax.tree.all(jax.tree.map(np.isfinite, policy_certainty(model, params, packed, 0.7)))
