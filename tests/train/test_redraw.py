"""Groups without signal drawn again, and a reference that follows the policy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from tiny_runs import assert_same_run

from jaxdyn.config import RunConfig
from jaxdyn.optim import OptimConfig
from jaxdyn.rl import AdvantageConfig, LossConfig
from jaxdyn.sections import ModelSource, TrainConfig
from jaxdyn.train import loop, open_run, redraw, run_rl
from jaxdyn.train.experience import examples_of
from jaxdyn.train.step import prepare_step
from jaxdyn.types import JaxdynError, Rollout

QUIET = {"evaluation__every": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("redraw")
    prompts = [{"prompt": "1=" if i % 2 else "12345=", "completion": "a"} for i in range(20)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return root


class Killed(BaseException):
    """Stands for the process's end."""


def test_places_are_filled_by_other_prompts_groups(root, monkeypatch):
    """Of a first draw with rewards of our choosing: which groups stay, go, and come."""
    config = tiny_runs.rl_config(root, "run", train__num_prompts=4, train__redraw_rounds=3, **QUIET)
    task, gathered, rounds = loop.open_task(config), redraw.gather_experience, []
    # 0: no signal, +: some; four groups a round.
    script = iter(["0+00", "0+00", "+0+0"])

    def scored(task, params, examples, key, groups, *keep):
        drawn = gathered(task, params, examples, key, groups, *keep)
        total = drawn.rewards.total.reshape(4, groups)
        total[:] = 100 * len(rounds) + 10 * np.arange(4)[:, None]
        total[:, 0] += [sign == "+" for sign in next(script)]
        rounds.append((examples, jax.random.key_data(key).tolist(), drawn))
        return drawn

    monkeypatch.setattr(redraw, "gather_experience", scored)
    drawn = redraw.draw_experience(task, task.params, 2)
    assert len(rounds) == 3
    assert drawn.redrawn == {"redraw/groups": 3, "redraw/rounds": 2, "redraw/first_reward": 15.0625}
    came = [(1, 1), (0, 1), (2, 0), (2, 2)]  # (round, group) now in each place
    for place, (number, group) in enumerate(came):
        here, there = slice(4 * place, 4 * place + 4), slice(4 * group, 4 * group + 4)
        one = rounds[number][2]
        for name in ("prompts", "completions", "finished", "completion_ids"):
            assert getattr(drawn, name)[here] == getattr(one, name)[there]
        assert {k: v[here] for k, v in drawn.columns.items()} == {
            k: v[there] for k, v in one.columns.items()
        }
        for name in ("completion_ids", "completion_mask", "per_token_logps"):
            got, wanted = (np.asarray(getattr(r.rollout, name)) for r in (drawn, one))
            np.testing.assert_array_equal(got[here], wanted[there])
        slots = one.rollout.prompt_ids.shape[1]
        kept = np.asarray(drawn.rollout.prompt_mask)[here]
        assert not kept[:, :-slots].any() or kept.shape[1] == slots
        ids = np.asarray(drawn.rollout.prompt_ids)[here, -slots:]
        np.testing.assert_array_equal(ids, np.asarray(one.rollout.prompt_ids)[there])
        np.testing.assert_array_equal(drawn.rewards.total[here], one.rewards.total[there])
    assert len({str(key) for _, key, _ in rounds}) == 3
    prompts = [[e["prompt"] for e in examples] for examples, _, _ in rounds]
    assert prompts == [[e["prompt"] for e in examples_of(task, 2, r)] for r in range(3)]
    orders = {tuple(e["prompt"] for e in examples_of(task, 0, r)) for r in range(9)}
    assert len(orders) > 1


def test_prompts_of_other_widths_are_padded_on_the_left():
    ids = jnp.arange(1, 7).reshape(2, 3)
    rollout = lambda x: Rollout(x, x > 1, x, x > 0, x.astype(jnp.float32))
    narrow, wide = redraw.as_wide(rollout(ids[:, :2]), rollout(ids), 9)
    assert np.array_equal(narrow.prompt_ids, [[9, 1, 2], [9, 4, 5]])
    assert np.array_equal(narrow.prompt_mask, [[False, False, True], [False, True, True]])
    assert np.array_equal(wide.prompt_ids, ids) and narrow.completion_ids.shape == (2, 2)


@pytest.mark.slow
def test_a_run_redraws_alike_and_says_what_is_left(root, tmp_path, monkeypatch):
    """Killed and started again; one program of sampling whatever was redrawn; rewards that never
    differ exhaust the rounds."""
    changes = {"train__steps": 4, "train__redraw_rounds": 2, "train__checkpoint_every": 2, **QUIET}
    config = tiny_runs.rl_config(root, "whole", **changes)
    whole = run_rl(config)
    lines = tiny_runs.lines(whole, "metrics.jsonl")[1:]
    assert sum(line["redraw/groups"] for line in lines) > 0
    for line in lines:
        assert 0 <= line["redraw/rounds"] <= 2 and 0 <= line["redraw/groups"] <= 2
        assert line["frac_reward_zero_std"] == 0 or line["redraw/rounds"] == 2

    again, calls = tiny_runs.rl_config(root, str(tmp_path / "run"), **changes), [0]
    take = loop.STEPS["rl"]

    def third(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return take(*args)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setitem(loop.STEPS, "rl", third)
        run_rl(again)
    assert_same_run(run_rl(again), whole)
    with open_run(whole) as run:
        taken = run.take(2).taken.metrics
    assert {k: taken[k] for k in taken if k.startswith("redraw")} == {
        k: v for k, v in lines[2].items() if k.startswith("redraw")
    }

    same = {"reward__regex_match__pattern": ".*", "train__steps": 1}
    run = run_rl(tiny_runs.rl_config(root, "same", **{**changes, **same}))
    line = tiny_runs.lines(run, "metrics.jsonl")[1]
    assert (line["redraw/groups"], line["redraw/rounds"], line["redraw/first_reward"]) == (0, 2, 1)
    assert line["frac_reward_zero_std"] == 1 and line["grad_norm"] == 0


@pytest.mark.slow
def test_the_reference_follows(root, tmp_path, monkeypatch):
    """As the recursion says of the checkpoints; and a run that was killed goes on with it."""
    changes = {
        "loss__beta": 0.1,
        "train__steps": 5,
        "train__reference_every": 2,
        "train__reference_mixup": 0.25,
        "train__checkpoint_every": 1,
        **QUIET,
    }
    config = tiny_runs.rl_config(root, "following", **changes)
    run = run_rl(config)
    policy = lambda params: {part: params[part] for part in ("backbone", "classifier")}
    with open_run(run) as saved:
        expected = policy(saved.loaded.params)
        for step in saved.steps:
            state = saved.state(step)
            if step % 2 == 0:
                mix = lambda r, p: 0.75 * np.float64(r) + 0.25 * np.float64(p)
                expected = jax.tree.map(mix, expected, policy(state.params))
            close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
            jax.tree.map(close, state.reference, expected)
        kl = [line["kl"] for line in tiny_runs.lines(run, "metrics.jsonl")[1:]]
        stage, state = saved.begin(4)
        prepared = prepare_step(saved.task, state, stage, 4)
        assert saved.task.params is not state.reference
        assert saved.take(4).taken.metrics["kl"] == kl[4]
    moved = jax.tree.map(lambda r, p: bool(np.any(r != p)), state.reference, policy(state.params))
    assert any(jax.tree.leaves(moved)) and prepared.batch.ref_per_token_logps is not None
    stays = run_rl(
        tiny_runs.rl_config(
            root, "staying", **{k: v for k, v in changes.items() if "reference" not in k}
        )
    )
    other = [line["kl"] for line in tiny_runs.lines(stays, "metrics.jsonl")[1:]]
    assert kl[:2] == other[:2] and kl[2] != other[2]

    again, calls, take = tiny_runs.rl_config(root, str(tmp_path / "run"), **changes), [0], None
    take = loop.STEPS["rl"]

    def fourth(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return take(*args)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setitem(loop.STEPS, "rl", fourth)
        run_rl(again)
    assert_same_run(run_rl(again), run)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"redraw_rounds": -1}}, "^train.redraw_rounds must be at least 0, got -1$"),
        ({"train": {"redraw_rounds": 1}, "advantage": {"kind": "plain"}, "loss": "reinforce"},
         "^train.redraw_rounds is of no use to loss reinforce with"),
        ({"train": {"reference_every": 2}}, "^train.reference_every is 2 but loss.beta is 0"),
        ({"train": {"reference_mixup": 0.5}}, "^train.reference_mixup needs train.reference_every"),
        ({"train": {"reference_every": 2, "reference_mixup": 0.0}}, r"must lie in \(0, 1\], got 0"),
        ({"train": {"reference_every": 2}, "optim": {"backbone": "lora"}, "beta": 0.1},
         "^train.reference_every mixes weights"),
        ({"train": {"reference_every": 2}, "model": {"frozen_dtype": "bfloat16"}, "beta": 0.1},
         "^train.reference_every is 2: a reference that moves is not frozen"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(sections, said):
    with pytest.raises(JaxdynError, match=said):
        RunConfig(
            train=TrainConfig(**sections["train"]),
            loss=LossConfig(sections.get("loss", "grpo"), beta=sections.get("beta", 0.0)),
            advantage=AdvantageConfig(**sections.get("advantage", {})),
            optim=OptimConfig(**sections.get("optim", {})),
            model=ModelSource(**sections.get("model", {})),
        )
