"""What does not move: which weights, held how, to what effect; and what a run without KL frees."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny_runs
from flax.traverse_util import flatten_dict

from jaxdyn.config import RunConfig, SFTConfig
from jaxdyn.models.held import held
from jaxdyn.optim import OptimConfig
from jaxdyn.rl import LossConfig
from jaxdyn.sections import ModelSource, TrainConfig
from jaxdyn.train import loop, open_run, run_rl
from jaxdyn.train.frozen import with_frozen
from jaxdyn.train.policy import UpdateBatch, policy_logps
from jaxdyn.train.reference import reference_of

NARROW = ModelSource(frozen_dtype="bfloat16")


def narrow_leaves(params):
    """The paths that are held in bfloat16."""
    return {path for path, x in flatten_dict(params).items() if x.dtype == jnp.bfloat16}


@functools.partial(jax.jit, static_argnums=0)
def logps(model, params):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, oracles.VOCAB, (4, 8)), jnp.int32)
    mask = jnp.ones((4, 8), bool)
    batch = UpdateBatch(tokens, mask, tokens[:, 4:], mask[:, 4:], jnp.zeros(4))
    return policy_logps(model, params, batch, 1.0)


@pytest.mark.parametrize("name", ["gpt2-tied", "gpt_neox-untied"])
def test_a_policy_held_in_bfloat16_says_the_same_in_bfloat16(name):
    """Matrices are rounded before they are used, or as they are: the same bits.

    In float32 each weight is off by u = 2^-9 of itself in the mean; the log-probs by a few u.
    """
    model, params = oracles.adapted_model(name, jnp.float32)
    half = dataclasses.replace(model, dtype=jnp.bfloat16)
    small = held(params, "bfloat16")
    np.testing.assert_array_equal(logps(half, small), logps(half, params))
    change = float(jnp.abs(logps(model, small) - logps(model, params)).max())
    assert 2.0**-14 < change < 0.3 * float(jnp.std(logps(model, params)))
    leaves = flatten_dict(small)
    names = {path[-1] for path in narrow_leaves(small)}
    assert names >= {"kernel", "lora_a", "lora_b"}
    assert {x.dtype for p, x in leaves.items() if p[-1] in ("scale", "bias")} == {
        jnp.dtype("float32")
    }
    again = flatten_dict(held(small, "bfloat16"))
    assert all(again[path] is x for path, x in leaves.items())


@pytest.mark.parametrize(
    ("optim", "frozen"),
    [
        (OptimConfig(schedule="classifier_first"), set()),
        (OptimConfig(schedule="classifier_only"), {"backbone"}),
        (OptimConfig(classifier="frozen"), {"classifier"}),
        (OptimConfig(backbone="lora", classifier="full"), {"backbone"}),
    ],
)
def test_what_no_stage_moves_is_held_so_and_nothing_else(optim, frozen):
    _, params = oracles.adapted_model("gpt_neox-untied", jnp.float32)
    got = with_frozen(params, RunConfig(optim=optim, model=NARROW))
    narrow = narrow_leaves(got)
    assert {path[0] for path in narrow} == frozen
    if optim.backbone == "lora":
        assert {path[-1] for path in narrow} == {"kernel", "embedding"}
    assert jax.tree.structure(got) == jax.tree.structure(params)
    plain = flatten_dict(with_frozen(params, RunConfig(optim=optim)))
    assert all(plain[path] is x for path, x in flatten_dict(params).items())


def test_the_reference_is_there_where_a_kl_is():
    _, params = oracles.tiny_model("gpt_neox-untied", jnp.float32)
    assert reference_of(params, RunConfig()) is None
    assert reference_of(params, SFTConfig()) is None
    assert reference_of(params, RunConfig(loss=LossConfig(beta=0.1))) is params
    found = reference_of(params, RunConfig(loss=LossConfig(beta=0.1), model=NARROW))
    assert {path[0] for path in narrow_leaves(found)} == {"backbone", "classifier"}


QUIET = {"probe__every": 0, "evaluation__every": 0}


def test_a_step_is_taken_again_with_the_same_reference(root):
    """In float32, where rounding counts: the KL of the run's last step and of the step again."""
    changes = {"loss__beta": 0.5, "model__frozen_dtype": "bfloat16", **QUIET}
    run = run_rl(tiny_runs.rl_config(root, "rounded", **changes))
    logged = tiny_runs.lines(run, "metrics.jsonl")
    with open_run(run) as saved:
        taken = saved.take(3).taken.metrics
    (line,) = (line for line in logged if line["step"] == 3)
    assert taken["kl"] == line["kl"] > 0
    assert taken["loss"] == line["loss"]


def test_without_a_kl_nothing_keeps_the_start(root, monkeypatch):
    """As the first step is taken: the parameters that were read, and those a step is given."""
    seen, open_task, take = [], loop.open_task, loop.STEPS["rl"]

    def opened(config):
        task = open_task(config)
        seen.extend(weakref.ref(x) for x in jax.tree.leaves(task.params))
        return task

    def step(task, state, stage, number):
        gc.collect()
        alive.append(sum(x() is not None for x in seen))
        assert task.params == {}
        return take(task, state, stage, number)

    alive: list[int] = []
    monkeypatch.setattr(loop, "open_task", opened)
    monkeypatch.setitem(loop.STEPS, "rl", step)
    train = TrainConfig(steps=1, num_prompts=2, num_generations=4, max_prompt_length=8)
    run_rl(dataclasses.replace(tiny_runs.rl_config(root, "free", **QUIET), train=train))
    assert alive == [0]
    assert len(seen) > 5
