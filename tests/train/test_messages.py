"""A run on messages, with stop strings, of which some prompts are too long."""

import json

import pytest
import tiny_runs

from jaxdyn.errors import JaxdynError
from jaxdyn.rollout import step_key
from jaxdyn.train import open_run, run_rl
from jaxdyn.train.experience import gather_experience


@pytest.fixture
def config(root, tmp_path):
    def make(output, contents, **changes):
        path = tmp_path / "messages.jsonl"
        rows = [{"prompt": [{"role": "user", "content": content}]} for content in contents]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {
            "data__path": str(path),
            "data__completion_field": None,
            "data__prompt_template": "plain",
            "data__overlong": "drop",
            "sampling__stop": ("a", "3"),
            "train__steps": 1,
            "probe__every": 0,
            "train__checkpoint_every": 1,
            **changes,
        }
        return tiny_runs.rl_config(root, output, **changes)

    return make


def test_a_run_on_messages(config, capsys):
    contents = [f"{i}=" for i in range(18)] + ["1234567890="] * 2
    run = run_rl(config("messages", contents))
    start, step = tiny_runs.lines(run, "metrics.jsonl")
    dropped = {k: v for k, v in start.items() if k.startswith("data/overlong")}
    assert sum(dropped.values()) == 2
    said = capsys.readouterr().err
    assert said.count("prompts of more than 8 tokens are left out (data.overlong)") == 1
    completions = tiny_runs.lines(run, "completions.jsonl")
    assert len(completions) == 8
    texts = [row["completion"] for row in completions]
    # Of 8 x 6 tokens of a random model about a tenth are one of the two.
    assert not any(set(text) & set("a3") for text in texts)
    assert any(row["finished"] for row in completions)
    assert step["completions/max_length"] <= 6
    with open_run(run) as saved:
        assert len(saved.task.train) + len(saved.task.test) == 18
        example = saved.task.train[0]
        assert example["messages"] == [{"role": "user", "content": example["prompt"]}]
        task, params = saved.task, saved.state().params
        sampled = gather_experience(task, params, task.train[:2], step_key(0, "rollout", 1), 4)
    ends = {task.tokenizer.encode(letter)[-1] for letter in "a3"} | {*task.tokenizer.stop_ids}
    lengths = sampled.rollout.completion_mask.sum(axis=1).tolist()
    assert any(ids[-1] in ends - {*task.tokenizer.stop_ids} for ids in sampled.completion_ids)
    for ids, length, finished in zip(
        sampled.completion_ids, lengths, sampled.finished, strict=True
    ):
        assert len(ids) == length and not ends & {*ids[:-1]} and finished == (ids[-1] in ends)


def test_a_model_without_a_template_says_what_to_set(config):
    with pytest.raises(
        JaxdynError, match="prompt_template must be one of plain, hh, alpaca, got auto"
    ):
        run_rl(config("refused", ["1=", "2="], data__prompt_template="auto"))
