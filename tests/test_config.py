"""Configurations: JSON and back, and the one-line complaints about what does not fit."""

import dataclasses
import json
import math

import jaxtyping
import pytest

from jaxdyn.config import KINDS, RunConfig, SFTConfig
from jaxdyn.data import DataConfig
from jaxdyn.grammar import from_dict, load_config, save_config
from jaxdyn.optim import OptimConfig
from jaxdyn.presets import RL, SFT, preset
from jaxdyn.rewards import RewardConfig
from jaxdyn.rl import AdvantageConfig, LossConfig, advantage_kind
from jaxdyn.sections import SupervisedConfig, TrainConfig
from jaxdyn.types import JaxdynError

FULL = RunConfig(
    output="somewhere",
    seed=3,
    data=DataConfig("jsonl", path="p.jsonl"),
    reward=RewardConfig(functions=("length", "my.module:reward"), weights=(1.0, 0.1 + 0.2)),
    loss=LossConfig(beta=1 / 3, loss_type="rloo", epsilon_high=None),
    optim=OptimConfig(schedule="classifier_first", classifier_learning_rate=1e-30),
    advantage=AdvantageConfig(kind="plain"),
)


@pytest.mark.parametrize("config", [FULL, RunConfig(), SFTConfig(), *RL.values(), *SFT.values()])
def test_a_configuration_survives_json_exactly(config, tmp_path):
    save_config(config, tmp_path / "config.json")
    assert load_config(type(config), tmp_path / "config.json") == config
    assert load_config(KINDS, tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == config.seed


def test_what_is_not_given_takes_its_default():
    assert from_dict(RunConfig, {"train": {"steps": 7}}) == RunConfig(train=TrainConfig(steps=7))
    assert from_dict(RunConfig, {"loss": {"beta": 1}}).loss.beta == 1.0


BAD = {
    "unknown field": ({"sead": 1}, "unknown field 'sead'; did you mean 'seed'?"),
    "unknown nested field": (
        {"optim": {"learning_rat": 1.0}},
        "optim: unknown field 'learning_rat'; did you mean 'learning_rate'?",
    ),
    "nothing near": ({"zzz": 1}, "unknown field 'zzz'"),
    "text for a number": ({"train": {"steps": "5"}}, "train: steps: expected int, got '5'"),
    "bool for a number": ({"seed": True}, "seed: expected int, got True"),
    "number for a bool": ({"model": {"untie": 1}}, "model: untie: expected bool, got 1"),
    "fraction for a count": ({"train": {"steps": 1.5}}, "steps: expected int, got 1.5"),
    "number for an object": ({"optim": 3}, "optim: expected an object with fields, got 3"),
    "unknown choice": (
        {"optim": {"schedule": "both"}},
        "schedule: expected one of ('joint', 'classifier_first', 'classifier_only', "
        "'joint_extra', 'whitened_first', 'whitened_only', 'spill', 'spill_first', 'linear_probe', "
        "'linear_probe_then_finetune'), got 'both'",
    ),
    "wrong item": (
        {"reward": {"weights": [1.0, "a"]}},
        "reward: weights[1]: expected float, got 'a'",
    ),
    "null": ({"seed": None}, "seed: expected int, got None"),
    "out of range": ({"train": {"num_prompts": 0}}, "train.num_prompts must be at least 1, got 0"),
    "negative": ({"train": {"steps": -1}}, "train.steps must be at least 0, got -1"),
    "indivisible": (
        {"train": {"microbatches": 3}},
        "train.microbatches must divide the 64 sequences of a step, got 3",
    ),
    "too few": (
        {"train": {"num_generations": 1}},
        "train.num_generations must be at least 2, got 1",
    ),
    "too large together": (
        {"train": {"num_prompts": 10**6, "num_generations": 10**4}},
        "sequences of up to 512 tokens; the product must be at most 2147483647, got 5120000000000",
    ),
    "not a number": (
        {"optim": {"learning_rate": math.nan}},
        "optim.learning_rate must be finite, got nan",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_complaints_name_the_field_and_the_value(name, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    data, message = BAD[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(JaxdynError) as caught:
        load_config(RunConfig, path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [("{", "is not JSON: Expecting property name"), ("[1]", "should hold a JSON object, got [1]")],
)
def test_files_that_hold_no_configuration(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(JaxdynError) as caught:
        load_config(RunConfig, path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(JaxdynError, match="no such configuration file"):
        load_config(RunConfig, tmp_path / "none.json")


def test_a_file_says_what_kind_of_run_it_is_of(tmp_path):
    """Supervised training has the sections of RL that it reads, and no others."""
    path = tmp_path / "config.json"
    save_config(SFTConfig(train=SupervisedConfig(microbatches=4, num_prompts=8)), path)
    assert load_config(KINDS, path).train.microbatches == 4
    with pytest.raises(JaxdynError, match=r"expected one of \('rl',\), got 'sft'"):
        load_config(RunConfig, path)
    for field in ("loss", "advantage"):
        with pytest.raises(JaxdynError, match=f"unknown field '{field}'"):
            from_dict(SFTConfig, {field: {}})
    with pytest.raises(JaxdynError, match="train: unknown field 'num_generations'"):
        from_dict(SFTConfig, {"train": {"num_generations": 2}})
    path.write_text("{}")  # as runs were saved before there were kinds
    assert load_config(KINDS, path) == RunConfig()


def test_the_advantage_is_the_losss_own_unless_set():
    kind = lambda loss, **more: advantage_kind(LossConfig(loss_type=loss), AdvantageConfig(**more))
    assert kind("grpo") == "group_relative"
    assert kind("rloo") == "leave_one_out"
    assert kind("reinforce") == "plain"
    assert kind("rloo", kind="plain") == "plain"


def test_presets_are_found_by_name_or_nearly():
    for presets in (RL, SFT):
        name = next(iter(presets))
        assert preset(presets, name) is presets[name]
        with pytest.raises(JaxdynError, match=f"unknown preset .*did you mean '{name}'"):
            preset(presets, name[:-1])


def test_plain_data_only():
    assert dataclasses.asdict(FULL)["reward"]["weights"] == (1.0, 0.1 + 0.2)
    json.dumps(dataclasses.asdict(FULL), allow_nan=False)
