"""Whole tiny runs: every kind of loss and schedule, and what their logs say."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_runs

from jaxdyn.optim import OptimConfig, stages
from jaxdyn.train import analyze, export, open_run, policy, run_rl, step
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.types import JaxdynError

pytestmark = pytest.mark.slow


def test_a_run_writes_a_line_a_step_and_its_stages(joint_run, first_run):
    joint, first = (tiny_runs.lines(run, "metrics.jsonl") for run in (joint_run, first_run))
    assert [line["step"] for line in joint] == [-1, *range(6)]
    assert [line["step"] for line in first] == [-1, *range(9)]
    assert [line["cfrl/stage"] for line in joint[1:]] == [2] * 6
    assert [line["cfrl/stage"] for line in first[1:]] == [1] * 3 + [2] * 6
    evaluated = [line["step"] for line in first if "eval_reward" in line]
    assert evaluated == [-1, 2, 5, 8]
    np.testing.assert_allclose([line["epoch"] for line in joint[1:]], np.arange(1, 7) * 2 / 16)
    walls = [line["time/wall"] for line in joint[1:]]
    assert walls == sorted(walls)
    # Each stage warms up for one step, to half the peak, then decays over the rest to zero.
    decay = lambda n: [3e-3 * (1 - i / n) for i in range(n)]
    rates = [1.5e-3, *decay(2), 1.5e-3, *decay(5)]
    np.testing.assert_allclose([line["learning_rate"] for line in first[1:]], rates, rtol=1e-6)


def test_the_learning_rate_that_is_logged_is_that_of_what_moves(first_run):
    """The classifier's own, and in joint training beside the body's, where they differ."""
    optim = OptimConfig(
        schedule="classifier_first",
        classifier_steps=2,
        learning_rate=1e-3,
        classifier_learning_rate=6e-3,
        classifier_multiplier=4.0,
    )
    with open_run(first_run) as run:
        config = dataclasses.replace(run.config, optim=optim)
        task = dataclasses.replace(run.task, config=config)

    def logged(stage):
        rate = step.rate_of(task, stage, stage.start)
        found = step.progress_of(task, stage, stage.start, rate)
        return {name: value for name, value in found.items() if "learning_rate" in name}

    first, joint = stages("classifier_first", 3, 2)
    assert logged(first) == {"learning_rate": pytest.approx(6e-3)}
    assert logged(joint) == {"learning_rate": 1e-3, "learning_rate/classifier": 4e-3}


def test_the_classifier_stage_leaves_the_features_where_they_were(first_run):
    """Stage 1's updates are all representation; stage 2's are both components."""
    dynamics = tiny_runs.lines(first_run, "dynamics.jsonl")
    assert [line["step"] for line in dynamics] == [-1, *range(9)]
    for line in dynamics[1:4]:
        assert (line["share/representation"], line["share/gradient"]) == (1.0, 0.0)
        assert line["features/drift/norm_mean"] == 0.0
    for line in dynamics[4:]:
        assert line["delta/gradient/rms"] > 0 and line["delta/representation/rms"] > 0
        assert line["features/drift/norm_mean"] > 0
        parts = [line[f"share/{part}"] for part in ("representation", "gradient", "cross")]
        np.testing.assert_allclose(sum(parts), 1, atol=1e-5)
    start = np.load(first_run / "dynamics" / "step_-00001.npz", allow_pickle=False)
    last = np.load(first_run / "dynamics" / "step_000008.npz", allow_pickle=False)
    assert (start["targets"] == last["targets"]).all() and last["actual"].any()


@pytest.fixture(scope="module")
def equal_budget(root):
    schedules = ("joint_extra", "classifier_only")
    return [run_rl(tiny_runs.rl_config(root, s, optim__schedule=s)) for s in schedules]


def test_schedules_see_the_same_prompts_in_the_same_order(joint_run, first_run, equal_budget):
    def prompts(run, steps):
        rows = tiny_runs.lines(run, "completions.jsonl")
        return [(row["step"], row["prompt"]) for row in rows if row["step"] < steps]

    expected = prompts(first_run, 9)
    assert len(expected) == 9 * 8 and len({prompt for _, prompt in expected}) > 8
    assert all(prompts(run, 9) == expected for run in equal_budget)
    assert prompts(joint_run, 6) == prompts(first_run, 6)
    # The first step of all of them samples from the same policy with the same keys.
    first_rows = [tiny_runs.lines(r, "completions.jsonl")[:8] for r in (joint_run, first_run)]
    assert first_rows[0] == first_rows[1]


def test_the_whole_of_a_classifier_only_run_is_stage_one(equal_budget):
    line = tiny_runs.lines(equal_budget[1], "metrics.jsonl")
    assert [x["cfrl/stage"] for x in line[1:]] == [1] * 9
    assert tiny_runs.lines(equal_budget[1], "dynamics.jsonl")[-1]["features/drift/norm_mean"] == 0


KINDS = {
    "grpo-kl": {"loss__beta": 0.1},
    "reinforce-kl-in-reward": {
        "loss__loss_type": "reinforce",
        "loss__beta": 0.1,
        "loss__kl_placement": "reward",
    },
    "rloo, inner epochs": {
        "loss__loss_type": "rloo",
        "train__num_iterations": 2,
        "train__microbatches": 2,
    },
    "dapo": {
        "loss__loss_type": "dapo",
        "loss__mask_truncated": True,
        "loss__entropy_coefficient": 0.01,
        "advantage__overlong_buffer": 2,
    },
    "reinforce-plus-plus": {
        "loss__loss_type": "reinforce_plus_plus",
        "loss__beta": 0.1,
        "loss__kl_placement": "reward",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_loss_runs(root, kind):
    changes = {"train__steps": 2, "evaluation__every": 0, "optim__learning_rate": 0.1}
    run = run_rl(tiny_runs.rl_config(root, kind, **changes, **KINDS[kind]))
    first, last = tiny_runs.lines(run, "metrics.jsonl")[1:]
    assert all(np.isfinite(line["loss"]) for line in (first, last))
    if "kl" in kind:  # the first batch is the reference's own
        assert first["kl"] == pytest.approx(0, abs=1e-6) and abs(last["kl"]) > 1e-5
    if kind == "grpo-kl":  # k3, every token weighs the same only when rows are equally long
        assert last["loss"] > last["policy_loss"]
    if "inner epochs" in kind:  # the metrics are the second epoch's, where the policy has moved
        assert abs(first["policy_loss"]) > 1e-4
    # A few prompts' advantages sum to zero, so at ratio 1 GRPO's loss is zero.
    if kind == "grpo-kl":
        assert first["policy_loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("schedule", ["joint", "classifier_first"])
def test_ppo_learns_values_beside_the_policy(root, schedule, tmp_path):
    """A constant reward is soon foreseen, in either stage; the value head stays out of exports."""
    changes = {
        "loss__loss_type": "ppo",
        "loss__value_clip": None,
        "reward__regex_match__pattern": ".?",
        "train__steps": 20,
        "train__num_iterations": 2,
        "evaluation__every": 0,
        "probe__every": 0,
        "optim__schedule": schedule,
        "optim__classifier_steps": 20,
        "optim__learning_rate": 0.03,
        "optim__decay": "constant",
    }
    run = run_rl(tiny_runs.rl_config(root, f"ppo-{schedule}", **changes))
    lines = tiny_runs.lines(run, "metrics.jsonl")[1:]
    assert all(line["reward"] == 1 for line in lines)
    assert lines[0]["value_loss"] == pytest.approx(0.5, abs=0.2)  # v = 0, R = 1
    assert lines[19]["value_loss"] < 0.1 * lines[0]["value_loss"]
    config = json.loads((export(run, tmp_path / "model") / "config.json").read_text())
    assert config["model_type"] == "gpt_neox"


def test_a_tied_model_has_a_cross_component(root):
    """The first order's error relative to the change is of the order of the step: a small one."""
    changes = {"train__steps": 2, "evaluation__every": 0, "optim__learning_rate": 1e-4}
    run = run_rl(tiny_runs.rl_config(root, "tied-run", tied=True, **changes))
    for line in tiny_runs.lines(run, "dynamics.jsonl")[1:]:
        assert line["delta/cross/rms"] > 1e-7
        shares = [line[f"share/{part}"] for part in ("representation", "gradient", "cross")]
        np.testing.assert_allclose(sum(shares), 1, atol=1e-5)
        assert line["delta/residual/rms"] < 0.05 * line["delta/actual/rms"]


def test_the_body_is_passed_once_a_rollout_batch_however_many_inner_epochs(root, monkeypatch):
    """Stage 1 with a KL penalty and old log-probs: everything comes from decoding's features."""
    calls = {"batch_features": 0, "update": 0, "policy_logps": 0}
    for name in calls:
        module = policy if name == "policy_logps" else step
        original = getattr(module, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    changes = {"train__steps": 0, "train__num_iterations": 3, "loss__beta": 0.1}
    schedule = {"optim__schedule": "classifier_first", "evaluation__every": 0}
    run_rl(tiny_runs.rl_config(root, "epochs", **changes, **schedule))
    assert calls == {"batch_features": 0, "update": 9, "policy_logps": 0}


def test_untied_on_request_a_tied_model_runs_classifier_first(root):
    changes = {
        "optim__schedule": "classifier_first",
        "train__steps": 1,
        "optim__classifier_steps": 1,
    }
    config = tiny_runs.rl_config(root, "untied-run", tied=True, untie=True, **changes)
    assert [x["cfrl/stage"] for x in tiny_runs.lines(run_rl(config), "metrics.jsonl")[1:]] == [1, 2]


def test_a_metric_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(
    root, joint_run, monkeypatch
):
    """An infinite step at step 4: nothing of it is kept, and a mended run goes on from step 3."""
    true_rate = step.learning_rate
    rate = lambda *args: float("inf") if args[2] == 4 else true_rate(*args)
    monkeypatch.setattr(step, "learning_rate", rate)
    config = tiny_runs.rl_config(root, "diverged")
    with pytest.raises(JaxdynError, match=r"step 4: update_norm stopped .* step 3, is in"):
        run_rl(config)
    assert tiny_runs.lines(root / "diverged", "metrics.jsonl")[-1]["step"] == 3
    assert Checkpoints(root / "diverged" / "checkpoints").steps() == [3]
    monkeypatch.setattr(step, "learning_rate", true_rate)
    run = run_rl(config)
    for name in ("metrics.jsonl", "dynamics.jsonl"):
        got, expected = (tiny_runs.lines(r, name) for r in (run, joint_run))
        assert tiny_runs.without_times(got) == tiny_runs.without_times(expected)


def test_a_checkpoint_is_of_the_runs_own_shape(root, joint_run):
    checkpoints = Checkpoints(joint_run / "checkpoints")
    with pytest.raises(JaxdynError, match="cannot restore step 6"):
        checkpoints.state(6, {"params": {"other": np.zeros(3)}})


@pytest.mark.parametrize("run", ["joint_run", "first_run"])
def test_analysis_finds_what_the_run_recorded(run, request, tmp_path):
    """Checkpoints 3, 6 (and 9): the update of steps 3 and 6 again, and the final state."""
    run = request.getfixturevalue(run)
    recorded = {line["step"]: line for line in tiny_runs.lines(run, "dynamics.jsonl")}
    found = tiny_runs.lines(analyze(run, tmp_path / "analysis"), "dynamics.jsonl")
    last = max(recorded)
    assert [line["step"] for line in found] == [-1, *range(3, last, 3), last]
    for line in found:
        expected = {key: recorded[line["step"]][key] for key in line}
        assert json.dumps(line) == json.dumps(expected)
        if line["step"] in (-1, last):
            continue
        whole = {key for key in recorded[line["step"]] if not key.startswith("ledger/")}
        assert line.keys() == whole  # what all steps together did is the run's alone
        name = f"step_{line['step']:06d}.npz"
        mine = np.load(tmp_path / "analysis" / name, allow_pickle=False)
        theirs = np.load(run / "dynamics" / name, allow_pickle=False)
        assert set(mine) == set(theirs)
        assert all((mine[k] == theirs[k]).all() for k in mine)


def test_an_exported_model_is_the_checkpoints_and_can_be_trained_on(root, joint_run):
    import jax

    from jaxdyn.models import load_pretrained

    for step_of, name in ((None, "exported"), (3, "exported-3")):
        model, params = load_pretrained(export(joint_run, root / name, step_of))
        with open_run(joint_run) as run:
            assert run.find(step_of) == (step_of or 6)
            assert model == run.loaded.model
            state = run.state(step_of)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), params, state.params)
        assert all(jax.tree.leaves(same))
    changes = {"model__path": str(root / "exported"), "train__steps": 1}
    run = run_rl(tiny_runs.rl_config(root, "from-export", **changes))
    # Its first evaluation is the first run's last: same policy, same key.
    before, after = (tiny_runs.lines(r, "metrics.jsonl") for r in (run, joint_run))
    assert before[0]["eval_reward"] == after[-1]["eval_reward"]
    with pytest.raises(JaxdynError, match="is not empty"):
        export(joint_run, root / "exported")
    with pytest.raises(JaxdynError, match=r"checkpoints at steps \[3, 6\], not at 4"):
        export(joint_run, root / "elsewhere", 4)
