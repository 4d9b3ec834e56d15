"""Training a reward model on preferences, scoring files with it, and RL against it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.config import RewardModelConfig
from jaxdyn.data import DataConfig
from jaxdyn.models import load_reward_model, save_pretrained
from jaxdyn.optim import OptimConfig
from jaxdyn.rewards import LearnedReward, RewardConfig
from jaxdyn.sections import EvaluationConfig, ModelSource, PairsConfig
from jaxdyn.train import analyze, loop, open_run, run_reward, run_rl
from jaxdyn.train.experience import examples_of
from jaxdyn.train.preference import pair_rows
from jaxdyn.train.task import open_task
from jaxdyn.types import JaxdynError


def make_pairs(path, count=20):
    """The chosen answer has an a in the place of each b of the rejected one, of other lengths."""
    rows = [
        {"prompt": f"{i}=", "chosen": "a" * (1 + i % 3), "rejected": "b" * (1 + (i + 1) % 3)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def last_feature(model, params, row):
    """φ at the last of a sequence's tokens, by a pass of its own."""
    tokens = jnp.array([row])
    return model.features(params["backbone"], tokens, jnp.ones(tokens.shape, bool))[0, -1]


def reward_config(root, output, **changes):
    """Six steps of four pairs, a checkpoint every two."""
    if not (root / "model").exists():
        tiny_runs.make_model(root / "model")
    config = RewardModelConfig(
        output=str(root / output),
        model=ModelSource(str(root / "model")),
        data=DataConfig(
            "jsonl",
            path=make_pairs(root / "pairs.jsonl"),
            held_out=0.3,
            cache_dir=str(root / "cache"),
        ),
        optim=OptimConfig(learning_rate=1e-2),
        train=PairsConfig(steps=6, num_prompts=4, max_length=8, checkpoint_every=2),
        evaluation=EvaluationConfig(every=3, num_prompts=6),
    )
    return tiny_runs.replaced(config, changes)


@pytest.fixture(scope="module")
def trained(root):
    return Path(run_reward(reward_config(root, "reward"))).parent


def test_what_it_logs_is_what_the_model_it_leaves_says(trained, capsys):
    lines = tiny_runs.lines(trained, "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(-1, 6))
    # A head of zeros tells nothing apart.
    assert lines[0]["eval_nll"] == pytest.approx(np.log(2)) and lines[0]["eval_ece"] == 0
    assert lines[1]["loss"] == pytest.approx(np.log(2)) and lines[1]["accuracy"] == 0.5
    assert lines[-1]["loss"] < lines[1]["loss"] and lines[-1]["eval_accuracy"] == 1

    # The held-out rows, from a file, in other batches.
    with open_run(trained) as run:
        rows = [run.task.test.source[int(i)] for i in run.task.test.places]
    file, scores = trained.parent / "held-out.jsonl", trained.parent / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["reward", "score", str(trained), str(file), "--output", str(scores), "--batch-size", "4"])
    said = capsys.readouterr().out
    found = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in found] == rows
    margins = np.array([row["score_chosen"] - row["score_rejected"] for row in found])
    nll, last = np.mean(np.log1p(np.exp(-margins))), lines[-1]
    assert last["eval_nll"] == pytest.approx(nll, abs=1e-6)
    assert last["eval_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    longer = np.mean([np.sign(len(r["chosen"]) - len(r["rejected"])) / 2 + 0.5 for r in rows])
    assert last["eval_length_accuracy"] == pytest.approx(longer)
    assert f"6 pairs\n  accuracy                          {last['eval_accuracy']:.3f}" in said
    calibration = tiny_runs.lines(trained, "calibration.jsonl")
    assert [line["step"] for line in calibration] == [-1, 2, 5]
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    bins = calibration[-1]["bins"]
    assert sum(b["pairs"] * b["confidence"] for b in bins) == pytest.approx(confidence.sum())


def test_the_first_update_is_the_losss_gradient_by_hand(root):
    """From a head of zeros every margin is 0, and −∂loss/∂w = ½ mean(φ_chosen − φ_rejected)."""
    sgd = OptimConfig(learning_rate=0.5, optimizer="sgd", max_grad_norm=0.0)
    changes = {"train__steps": 1, "train__microbatches": 2, "optim": sgd, "evaluation__every": 0}
    directory = run_reward(reward_config(root, "one-step", **changes))
    with open_run(Path(directory).parent) as run:
        task, model = run.task, run.loaded.model
        examples = examples_of(task, 0)
        before = run.loaded.params
    features = [last_feature(model, before, row) for row in pair_rows(task, examples)]
    chosen, rejected = np.array(features[::2]), np.array(features[1::2])
    _, params = load_reward_model(directory)
    wanted = 0.5 * 0.5 * np.mean(chosen - rejected, axis=0)
    np.testing.assert_allclose(params["classifier"]["weight"][0], wanted, rtol=1e-4, atol=1e-7)
    # Nothing reaches the body through a head of zeros.
    jax.tree.map(np.testing.assert_array_equal, params["backbone"], before["backbone"])


def test_killed_and_started_again_it_ends_the_same(root, trained, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def at_call(task, state, stage, step, original=loop.STEPS["reward"]):
        if step == 4:
            raise Killed
        return original(task, state, stage, step)

    config = reward_config(root, str(tmp_path / "run"))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setitem(loop.STEPS, "reward", at_call)
        run_reward(config)
    again = Path(run_reward(config)).parent
    for name in ("metrics.jsonl", "calibration.jsonl"):
        got, expected = (tiny_runs.lines(r, name) for r in (again, trained))
        assert tiny_runs.without_times(got) == tiny_runs.without_times(expected)
    weights = Path("model") / "model.safetensors"
    assert (again / weights).read_bytes() == (trained / weights).read_bytes()


def test_a_reward_model_goes_on_from_a_reward_model_and_may_move_its_head_alone(root, trained):
    config = reward_config(
        root,
        "further",
        model__path=str(trained / "model"),
        optim__schedule="linear_probe",
        train__steps=1,
    )
    directory = run_reward(config)
    start = tiny_runs.lines(Path(directory).parent, "metrics.jsonl")[0]
    assert start["eval_nll"] == tiny_runs.lines(trained, "metrics.jsonl")[-1]["eval_nll"]
    (_, old), (_, new) = load_reward_model(trained / "model"), load_reward_model(directory)
    jax.tree.map(np.testing.assert_array_equal, new["backbone"], old["backbone"])
    assert np.any(new["classifier"]["weight"] != old["classifier"]["weight"])


def test_rl_is_rewarded_by_its_scores_and_watched_by_a_judge(root, trained):
    """The judge is the same model with its head turned round, as a metric."""
    model, params = load_reward_model(trained / "model")
    turned = {**params, "classifier": {"weight": -params["classifier"]["weight"]}}
    other = root / "turned"
    if not other.exists():
        save_pretrained(other, model, turned, stop_ids=(2,))
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (other / name).write_bytes((trained / "model" / name).read_bytes())
    config = tiny_runs.rl_config(root, "rl-learned", train__steps=1, probe__every=0)
    reward = RewardConfig(
        ("model",), model=LearnedReward(str(trained / "model")), judge=LearnedReward(str(other))
    )
    evaluation = dataclasses.replace(config.evaluation, metrics=("judge",))
    run = run_rl(dataclasses.replace(config, reward=reward, evaluation=evaluation))
    start, step = tiny_runs.lines(run, "metrics.jsonl")
    assert start["eval_metrics/judge"] == pytest.approx(-start["eval_reward"], rel=1e-6)
    with open_run(run) as saved:
        scorer = saved.task.scorers["model"]
        told = saved.task.told(evaluation=evaluation)
        assert told.scorers["model"] is scorer
    # The completions' rewards by a plain pass over prompt, completion and stop token.
    rows = tiny_runs.lines(run, "completions.jsonl")
    ids = [[*scorer.tokenizer.encode(r["prompt"] + r["completion"]), 2] for r in rows]
    by_hand = []
    for row in ids:
        phi = last_feature(model, params, row)
        by_hand.append(float(phi @ params["classifier"]["weight"][0]))
    np.testing.assert_allclose([r["reward"] for r in rows], by_hand, atol=1e-5)
    assert step["rewards/model/mean"] == pytest.approx(np.mean(by_hand), abs=1e-5)


def test_what_wants_a_policy_says_that_there_is_none(trained):
    with pytest.raises(JaxdynError, match="is a run of jaxdyn reward: it has no policy"):
        analyze(trained)


def test_scores_on_a_mesh_are_those_of_one_device(root, trained):
    scores = []
    for changes in ({}, {"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__devices": 4}):
        config = tiny_runs.rl_config(root, "nowhere", **changes)
        reward = RewardConfig(("model",), model=LearnedReward(str(trained / "model")))
        config = dataclasses.replace(config, reward=reward)
        scorer = open_task(config).scorers["model"]
        scores.append(scorer(["1=", "23="] * 3, ["a", "bb", "", "abab", "b", "aa"]))
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
    assert np.std(scores[0]) > 0.1


ONE = {"prompt": "1=", "chosen": "a"}


@pytest.mark.parametrize(
    "rows, changes, words",
    [
        ([ONE], {}, "has no 'rejected': a reward model learns from"),
        (
            [{"prompt": "1=", "chosen": "a", "rejected": "a"}],
            {},
            "'chosen' and 'rejected' are equal",
        ),
        (
            [{**ONE, "chosen": "a" * 9, "rejected": "b"}],
            {},
            "prompt and answer have 13 tokens, train.max_length is 8; data.overlong may be",
        ),
        (
            [{**ONE, "chosen": "a" * 9, "rejected": "b"}],
            {"data__overlong": "drop"},
            "data.overlong drop leaves no pair: the shortest has 13 tokens",
        ),
        ([], {"train__max_length": 64}, "train.max_length (64) exceeds the model's context of 32"),
        (
            [],
            {"evaluation__temperatures": (0.5,)},
            "evaluation.temperatures is of runs that sample",
        ),
        ([], {"optim__classifier": "lora"}, "optim.classifier must be full or frozen"),
    ],
)
def test_what_it_refuses(rows, changes, words, root, tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = [{"prompt": "1=", "chosen": "a", "rejected": "b"}] * (not rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows + good) * 3))
    with pytest.raises(JaxdynError) as error:
        run_reward(reward_config(root, str(tmp_path / "run"), data__path=str(path), **changes))
    assert words in str(error.value) and "\n" not in str(error.value)
