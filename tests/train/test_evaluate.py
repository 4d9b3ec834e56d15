"""What an evaluation measures, on completions known in advance and on whole tiny runs."""

import dataclasses
import json
import math
from itertools import combinations

import jax
import numpy as np
import pytest
import tiny_runs

from jaxdyn.dynamics.sampling import mean_with_interval
from jaxdyn.sections import EvaluationConfig
from jaxdyn.train import run_rl
from jaxdyn.train.evaluate import SAMPLES, sample_held_out, utility
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.task import open_task
from jaxdyn.types import JaxdynError

TEMPERATURES = (0.5, 0.0, 1.0)


def test_the_reward_decides_what_is_correct_where_there_is_no_metric():
    rewards = np.array([[0.5, 1.0, 0.2, 1.5], [0.0, 0.9, 0.3, 0.1], [1.0, 1.0, 2.0, 0.0]])
    found = utility(rewards, {}, EvaluationConfig(num_generations=4))
    names = {"reward", *(f"{m}@{k}" for m in ("pass", "best_of") for k in (1, 2, 4))}
    ends = ("", "_ci_low", "_ci_high")
    assert set(found) == {name + end for name in names for end in ends}
    correct = rewards >= 1
    for k in (1, 2, 4):
        subsets = list(combinations(range(4), k))
        passed = np.array([np.mean([row[list(s)].any() for s in subsets]) for row in correct])
        best = np.array([np.mean([row[list(s)].max() for s in subsets]) for row in rewards])
        for name, expected in ((f"best_of@{k}", best), (f"pass@{k}", passed)):
            mean, low, high = mean_with_interval(expected)
            if name.startswith("pass"):
                low, high = max(low, 0.0), min(high, 1.0)
            got = [found[name + end] for end in ends]
            np.testing.assert_allclose(got, (mean, low, high), rtol=1e-12)
    assert found["pass@4_ci_high"] == 1.0  # two of three prompts: Student's end lies above 1
    assert found["reward"] == pytest.approx(rewards.mean(), rel=1e-12)
    lower = utility(rewards, {}, EvaluationConfig(num_generations=4, success_threshold=0.9))
    assert lower["pass@1"] == pytest.approx(6 / 12, rel=1e-12)


def test_the_first_metric_decides_where_there_are_some_and_what_it_did_not_score_is_no_draw():
    config = EvaluationConfig(num_generations=2, pass_at=(2,))
    nan = math.nan
    metrics = {
        "accuracy": np.array([[1.0, 0.0], [nan, 1.0], [0.0, 0.0]]),
        "style": np.array([[nan, nan], [nan, 4.0], [nan, nan]]),
    }
    found = utility(np.zeros((3, 2)), metrics, config)
    # The second prompt has one scored completion: pass@2 is of the other two prompts.
    assert found["pass@2"] == 0.5 and found["best_of@2"] == 0.0
    assert found["metrics/accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["metrics/style"] == 4.0 and "metrics/style_ci_low" not in found
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pass_at": (1, 5)}, r"evaluation.pass_at must lie between 1 and num_generations \(4\), "),
        ({"pass_at": (0,)}, "got 0"),
        ({"pass_at": (2, 2)}, r"evaluation.pass_at names one twice: \(2, 2\)"),
        ({"metrics": ("anagram", "anagram")}, "evaluation.metrics names one twice"),
        ({"temperatures": (0.5, -1.0)}, "temperatures must be at least 0, got -1.0"),
        ({"temperatures": (math.nan,)}, "got nan"),
        ({"temperatures": (math.inf,)}, "got inf"),
        ({"success_threshold": math.nan}, "success_threshold must be finite, got nan"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(options, words):
    with pytest.raises(JaxdynError, match=words):
        EvaluationConfig(num_generations=4, **options)


# -- on a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(root):
    changes = {
        "evaluation__temperatures": TEMPERATURES,
        "evaluation__metrics": ("finished", "length"),
        "reward__length__minimum": 3,
        "train__steps": 2,
        "evaluation__every": 1,
    }
    return tiny_runs.rl_config(root, "evaluated", **changes)


def test_a_metric_that_does_not_exist_is_refused_before_any_work(config):
    wrong = tiny_runs.replaced(config, {"evaluation__metrics": ("acuracy",)})
    with pytest.raises(JaxdynError, match=r"evaluation.metrics: unknown reward 'acuracy'"):
        open_task(wrong)


def test_temperatures_are_traced(config):
    """After the first, no temperature compiles anything."""
    task = open_task(config)
    sample_held_out(task, task.params)
    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for temperature in (0.0, 0.3, 2.0):
            sample_held_out(task.at_temperature(temperature), task.params)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


@pytest.fixture(scope="module")
def evaluated(config):
    return run_rl(config)


@pytest.mark.slow
def test_metrics_are_logged_beside_the_reward_and_are_no_part_of_it(evaluated, root):
    records = tiny_runs.lines(evaluated, "metrics.jsonl")
    samples = tiny_runs.lines(evaluated, "samples.jsonl")
    assert [line["step"] for line in records if "eval_reward" in line] == [-1, 0, 1]
    for line in records:
        mine = [s for s in samples if s["step"] == line["step"]]
        share = lambda passes, mine=mine: np.mean([passes(s) for s in mine])
        assert line["eval_metrics/finished"] == share(lambda s: s["finished"])
        assert line["eval_metrics/finished"] == pytest.approx(line["eval_pass@1"], rel=1e-12)
        assert line["eval_reward"] == share(lambda s: bool(set("ab") & set(s["completion"])))
        assert line["eval_best_of@1"] == pytest.approx(line["eval_reward"], rel=1e-12)
        length = share(lambda s: float(len(s["completion"]) >= 3))
        assert line["eval_metrics/length"] == pytest.approx(length, rel=1e-12)
        assert line["eval_pass@4"] >= line["eval_pass@2"] >= line["eval_pass@1"]
        assert line["eval_best_of@4_ci_low"] <= line["eval_best_of@4"]
    # Without metrics or temperatures the run is the same.
    changes = {"train__steps": 2, "evaluation__every": 1}
    plain = run_rl(tiny_runs.rl_config(root, "plain", **changes))
    assert not (plain / "temperatures.jsonl").exists()
    for mine, theirs in zip(records, tiny_runs.lines(plain, "metrics.jsonl"), strict=True):
        same = {k: v for k, v in theirs.items() if "time" not in k and "pass@" not in k}
        assert json.dumps({k: mine[k] for k in same}) == json.dumps(same)


@pytest.mark.slow
def test_temperatures_are_sampled_before_and_after(evaluated, config):
    lines = tiny_runs.lines(evaluated, "temperatures.jsonl")
    asked = sorted(TEMPERATURES)
    assert [(x["step"], x["temperature"]) for x in lines] == [
        (s, t) for s in (-1, 1) for t in asked
    ]
    metrics = {x["step"]: x for x in tiny_runs.lines(evaluated, "metrics.jsonl")}
    samples = tiny_runs.lines(evaluated, "samples.jsonl")
    for line in lines:
        own = line["temperature"] == config.sampling.temperature
        shared = {k: v for k, v in line.items() if k not in ("step", "temperature", "samples")}
        if own:  # the evaluation itself, not sampled again
            assert shared == {k: metrics[line["step"]][f"eval_{k}"] for k in shared}
            kept = [s for s in samples if s["step"] == line["step"]]
            kept = [s for i, s in enumerate(kept) if i % 4 < SAMPLES[1]]
            assert [{"step": line["step"], **s} for s in line["samples"]] == kept
        if line["temperature"] == 0:  # greedy: a prompt's completions are all the same
            assert line["diversity/unique"] == 0.25
            assert line["pass@4"] == pytest.approx(line["pass@1"], rel=1e-12)
    greedy, half, full = (x for x in lines if x["step"] == -1)
    assert half["entropy"] < full["entropy"]
    assert greedy["diversity/unique"] < full["diversity/unique"]


def test_rewinding_forgets_later_temperatures(config, tmp_path):
    directory = RunDirectory(tmp_path / "run", dataclasses.replace(config, output="x"))
    directory.rewind(-1)
    directory.log("temperatures.jsonl", {"step": -1}, {"step": 4})
    directory.rewind(3)
    directory.close()
    assert tiny_runs.lines(tmp_path / "run", "temperatures.jsonl") == [{"step": -1}]
