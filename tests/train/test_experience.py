"""What is logged of a batch of completions, some or all of which could not be scored."""

import itertools
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxdyn.rewards import RewardOutput
from jaxdyn.train import run_rl
from jaxdyn.train.experience import Experience, experience_metrics
from jaxdyn.types import Rollout

NAN = np.nan


def experience(*totals, generations=4):
    """Completions of one token each, with these rewards."""
    count = len(totals)
    cells = jnp.ones((count, 1), jnp.int32)
    mask = jnp.ones((count, 1), bool)
    return Experience(
        rollout=Rollout(cells, mask, cells, mask, jnp.zeros((count, 1))),
        prompts=["p"] * count,
        completions=["c"] * count,
        finished=[True] * count,
        completion_ids=[[1]] * count,
        columns={},
        rewards=RewardOutput(np.array(totals), {"mine": np.array(totals)}),
        num_generations=generations,
        reward_seconds=0.0,
    )


def test_means_and_spreads_skip_what_has_no_score():
    """Groups: scores that differ, equal ones, one alone, none."""
    rows = [0.9, NAN, 0.1, 0.9], [0.9] * 4, [NAN, NAN, 0.5, NAN], [NAN] * 4
    metrics = experience_metrics(experience(*itertools.chain(*rows)), vocab_size=5)
    scored = [x for row in rows for x in row if not np.isnan(x)]
    assert metrics["reward"] == pytest.approx(np.mean(scored), rel=1e-15)
    assert metrics["rewards/mine/mean"] == metrics["reward"]
    assert metrics["reward_std"] == pytest.approx(np.std(scored, ddof=1), rel=1e-15)
    assert metrics["frac_reward_zero_std"] == 3 / 4


def test_without_a_score_there_is_no_mean():
    metrics = experience_metrics(experience(NAN, NAN, generations=2), vocab_size=5)
    assert not {"reward", "rewards/mine/mean"} & metrics.keys()
    assert (metrics["reward_std"], metrics["frac_reward_zero_std"]) == (0, 1)
    assert np.isfinite(list(metrics.values())).all()


def test_records_say_none_where_there_is_no_score():
    records = experience(0.5, NAN, generations=2).records(3)
    assert [record["reward"] for record in records] == [0.5, None]
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_a_run_that_scores_nothing_moves_nothing(root, tmp_path, monkeypatch):
    (tmp_path / "unscoring.py").write_text(
        "def never(prompts, completions, **columns):\n    return [None] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    changes = {
        "reward__functions": ("unscoring:never",),
        "train__steps": 1,
        "loss__beta": 0.0,
        "optim__weight_decay": 0.0,
        "probe__every": 0,
    }
    run = run_rl(tiny_runs.rl_config(root, "unscored", **changes))
    sys.modules.pop("unscoring", None)
    step = tiny_runs.lines(run, "metrics.jsonl")[-1]
    assert step["grad_norm"] == step["update_norm"] == 0
    assert not {"reward", "eval_reward", "eval_pass@1"} & step.keys()
    for log in run.glob("*.jsonl"):
        assert "NaN" not in log.read_text(), log
