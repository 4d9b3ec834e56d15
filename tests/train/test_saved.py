"""Opening a saved run: what it holds, what it imports, what it leaves behind."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.models import has_adapters
from jaxdyn.train import checkpoint, open_run, run_rl, run_sft
from jaxdyn.types import JaxdynError

pytestmark = pytest.mark.slow


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_a_run_has_its_configuration_its_steps_and_what_they_hold(root, joint_run):
    with open_run(joint_run) as run:
        assert (run.steps, run.path, run.config.output) == ([3, 6], joint_run, str(joint_run))
        assert run.find() == 6 and run.find(3) == 3
        state = run.state(3)
        assert state.params.keys() == {"backbone", "classifier"}
        assert int(state.opt_state[1]["backbone"][0].count) == 3
        model, params = run.policy(3)
        assert model == run.loaded.model and same(params, state.params)
        assert not same(run.policy()[1], params)
        assert len(run.task.train) + len(run.task.test) == 20
        with pytest.raises(JaxdynError, match=r"checkpoints at steps \[3, 6\], not at 4"):
            run.state(4)


def test_a_step_taken_again_leads_where_training_went(joint_run):
    """From the checkpoint before step 3 to the one before step 6, by three steps of the loop."""
    with open_run(joint_run) as run:
        assert run.follows(3) and not run.follows(6)
        before, taken = run.take(3)
        assert same(before, run.state(3).params)
        logged = tiny_runs.lines(joint_run, "metrics.jsonl")[4]
        assert logged["step"] == 3
        for name, value in taken.metrics.items():
            if not name.startswith("time/") and name != "step_time":
                assert logged[name] == value, name
        with pytest.raises(JaxdynError, match="step 6 lies outside the schedule"):
            run.take(6)


def test_a_value_head_and_adapters_are_no_part_of_the_policy(root):
    changes = {"loss__loss_type": "ppo", "train__steps": 1, "optim__backbone": "lora"}
    path = run_rl(tiny_runs.rl_config(root, "saved-ppo", evaluation__every=0, **changes))
    with open_run(path) as run:
        stored = run.state().params
        assert "value" in stored and has_adapters(stored)
        for merged in (True, False):
            _, params = run.policy(merged=merged)
            assert params.keys() == {"backbone", "classifier"}
            assert has_adapters(params) is not merged


def test_a_supervised_run_opens_too(root):
    path = run_sft(tiny_runs.sft_config(root, "saved-sft")).parent
    with open_run(path) as run:
        assert run.config.kind == "sft" and run.steps == [4, 6]
        _, taken = run.take(4)
        logged = tiny_runs.lines(path, "metrics.jsonl")
        assert {line["step"]: line.get("loss") for line in logged}[4] == taken.metrics["loss"]


REWARD = "print('the reward was imported')\ndef score(prompts, completions, **c):\n    return [1.0]"
OPEN = """
import sys
from jaxdyn.train import open_run
with open_run(sys.argv[1]) as run:
    run.policy(), run.state()
    assert "named_by_a_run" not in sys.modules
    run.task
    assert "named_by_a_run" in sys.modules
"""


def test_opening_a_run_imports_no_code_that_it_names(joint_run, root, tmp_path):
    """Only its task, which scores, does."""
    config = joint_run / "config.json"
    text = config.read_text()
    try:
        config.write_text(text.replace('"regex_match"', '"named_by_a_run:score"', 1))
        (tmp_path / "named_by_a_run.py").write_text(REWARD)
        command = [sys.executable, "-c", OPEN, str(joint_run)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    finally:
        config.write_text(text)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "the reward was imported\n"


STRANGERS = (
    "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nscore = metric = len\n"
)
REFUSED = "a run's code is not imported; start from elsewhere"
LOOKED_AT = {
    # What is done with a stranger's run inside it; whether that needs its reward.
    "export": (["export", ".", "../out"], False),
    "kernel": (["kernel", "--run", ".", "--prompts", "../p.jsonl", "--output", "../out"], False),
    "check": (["check", "."], False),
    "analyze": (["analyze", ".", "--output", "../out"], True),
    "evaluate": (["evaluate", ".", "--output", "../out.json"], True),
    "influence": (["influence", ".", "--step", "3", "--output", "../out"], True),
    "rl": (["rl", "--config", "config.json", "--output", "."], True),
}


@pytest.mark.parametrize("command", LOOKED_AT)
def test_a_strangers_run_runs_none_of_its_code(command, joint_run, tmp_path, monkeypatch, capsys):
    """From inside it, as the console script starts and as `python -m jaxdyn.cli` does."""
    words, scores = LOOKED_AT[command]
    run = shutil.copytree(joint_run, tmp_path / "run")
    told = json.loads((run / "config.json").read_text())
    told["reward"]["functions"] = ["strangers:score"]
    told["evaluation"]["metrics"] = ["strangers:metric"]
    told["output"] = "."
    (run / "config.json").write_text(json.dumps(told))
    (run / "strangers.py").write_text(STRANGERS)
    (tmp_path / "p.jsonl").write_text('{"prompt": "1="}\n')
    monkeypatch.chdir(run)
    for path in ([], [""]) if scores else ([""],):
        monkeypatch.setattr(sys, "path", [*path, *(p for p in sys.path if p not in ("", str(run)))])
        if scores:
            with pytest.raises(SystemExit) as stop:
                main(words)
            assert stop.value.code == 2
            said = capsys.readouterr().err
            assert REFUSED in said and f"lies in the run {run}" in said
            assert not (tmp_path / "out").exists() and not (tmp_path / "out.json").exists()
        else:
            main(words)
        assert "strangers" not in sys.modules and not (run / "ran").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_opened_is_closed(joint_run, monkeypatch, fails):
    closed = []
    original = checkpoint.Checkpoints.close
    note = lambda self: (closed.append(self.directory), original(self))
    monkeypatch.setattr(checkpoint.Checkpoints, "close", note)
    try:
        with open_run(joint_run) as run:
            assert np.isfinite(run.steps).all()
            if fails:
                raise KeyError("the user's own")
    except KeyError:
        assert fails
    assert closed == [joint_run / "checkpoints"]


def test_what_holds_no_run(root, tmp_path):
    with (
        pytest.raises(JaxdynError, match=r"holds no run: it has no config\.json"),
        open_run(tmp_path),
    ):
        pass
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JaxdynError, match="no whole checkpoint yet"), open_run(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
