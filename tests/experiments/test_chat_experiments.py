"""The experiments on chat models, on a tiny one: the problems, and what a run of each leaves."""

import dataclasses
import itertools
import json
import string
import sys

import arithmetic
import preferences
import pytest
import tiny_runs

from jaxdyn.rewards import NumericMatch

ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n"


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDYN_CACHE", str(tmp_path / "cache"))
    return tiny_runs.make_model(tmp_path / "model", alphabet=ALPHABET, max_positions=256)


def test_the_splits_share_no_pair_of_numbers_and_the_answers_are_sums():
    found = arithmetic.problems()
    pairs = {}
    for split, rows in found.items():
        pairs[split] = set()
        for row in rows:
            words = row["prompt"][-1]["content"].split()
            a, b = (int(word) for word in words if word.isdigit())
            pairs[split].add((a, b))
            assert NumericMatch()([""], [f"{a} + {b} = {a + b}"], answer=[row["answer"]]) == [1.0]
    count = (arithmetic.LARGEST - arithmetic.SMALLEST + 1) ** 2
    assert not pairs["train"] & pairs["test"] and len(pairs["train"] | pairs["test"]) == count
    assert len(pairs["test"]) == round(arithmetic.HELD_OUT * count)
    assert len(found["test"]) == arithmetic.WORDINGS * len(pairs["test"])


def test_answers_that_are_written_as_the_sum_that_is_shown_are_counted(tmp_path):
    said = [(-1, "8", 0), (-1, "3 + 4 = 7", 1), (3, "3 + 4 = 8", 0), (3, "3 + 4 = 7 cups", 1)]
    rows = [{"step": step, "completion": text, "reward": reward} for step, text, reward in said]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = arithmetic.written_as_shown(tmp_path)
    assert found == {"before": {"share": 0.5, "right": 1.0}, "after": {"share": 1.0, "right": 0.5}}


@pytest.mark.slow
def test_arithmetic(model, monkeypatch, tmp_path):
    config = arithmetic.run_config

    def plain(*arguments):
        made = config(*arguments)
        data = dataclasses.replace(made.data, prompt_template="plain")
        train = dataclasses.replace(made.train, num_prompts=2, max_prompt_length=128)
        return dataclasses.replace(made, data=data, train=train)

    monkeypatch.setattr(arithmetic, "run_config", plain)
    command = ["arithmetic.py", "--model", model, "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "2", "--test-problems", "2"])
    arithmetic.main()
    found = json.loads((tmp_path / "out/arithmetic.json").read_text())["joint"]
    lines = tiny_runs.lines(tmp_path / "out/joint", "metrics.jsonl")
    assert found["rewards"] == [line["reward"] for line in lines[1:]] and len(lines) == 3
    assert found["after"]["pass@8"] == lines[-1]["eval_pass@8"]
    assert (tmp_path / "out/arithmetic.png").stat().st_size > 1000


@pytest.mark.slow
def test_preferences(model, monkeypatch, tmp_path):
    row = lambda i: {
        "prompt": f"\n\nHuman: {i}?\n\nAssistant:",
        "chosen": f" {i}{'a' * (i % 3)}",
        "rejected": f" b{i}",
    }
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row(i)) + "\n" for i in range(20)))
    config, rewarding = preferences.rl_config, preferences.reward_config
    plain = lambda made: dataclasses.replace(
        made, data=dataclasses.replace(made.data, prompt_template="hh")
    )

    def small(*arguments):
        made = plain(config(*arguments))
        few = {"num_prompts": 2, "num_generations": 2}
        train = dataclasses.replace(made.train, **few)
        evaluation = dataclasses.replace(made.evaluation, **few)
        hh = lambda name: dataclasses.replace(getattr(made.reward, name), prompt_template="hh")
        reward = dataclasses.replace(made.reward, model=hh("model"), judge=hh("judge"))
        sampling = dataclasses.replace(made.sampling, max_completion_length=8)
        changed = {"train": train, "evaluation": evaluation, "reward": reward}
        return dataclasses.replace(made, sampling=sampling, **changed)

    monkeypatch.setattr(preferences, "rl_config", small)
    monkeypatch.setattr(preferences, "reward_config", lambda *given: plain(rewarding(*given)))
    monkeypatch.setattr(preferences, "SCHEDULES", ("classifier_first",))
    command = ["preferences.py", "--model", model, "--pairs", str(pairs)]
    command += ["--output", str(tmp_path / "out"), "--reward-steps", "2", "--test-pairs", "4"]
    few = ["--steps", "1", "--classifier-steps", "1", "--every", "1"]
    monkeypatch.setattr(sys, "argv", [*command, *few])
    preferences.main()
    parts = [
        (tmp_path / f"out/{name}.jsonl").read_text().splitlines() for name in preferences.PARTS
    ]
    assert [len(part) for part in parts] == [8, 8, 4] and len({*itertools.chain(*parts)}) == 20
    found = json.loads((tmp_path / "out/preferences.json").read_text())
    assert found["reward_models"]["reward"]["before"]["eval_accuracy"] == 0.5
    curve = found["runs"]["classifier_first"]["curve"]
    assert [line["step"] for line in curve] == [-1, 0, 1]
    assert all("eval_metrics/judge" in line and "eval_reward" in line for line in curve)
    parts = found["runs"]["classifier_first"]["ledger"]["entropy"]
    change = parts["representation"] + parts["gradient"]
    assert parts["change"] == pytest.approx(change, abs=0.02 * abs(parts["change"]) + 1e-6)
    assert (tmp_path / "out/preferences.png").stat().st_size > 1000
