"""Killed before any of its file operations and given again, a command ends as one never killed."""

import contextlib
import dataclasses
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from crash import content, kill_everywhere, killed_at, operations
from test_reward_runs import reward_config
from tiny_runs import assert_same_run

from jaxdyn.data import load_tokenizer
from jaxdyn.models import load_pretrained
from jaxdyn.train import loop, run_reward, run_rl, run_sft
from jaxdyn.train.step import Taken

# The package gives their names to the functions.
analysis, exporting = (sys.modules[f"jaxdyn.train.{name}"] for name in ("analyze", "export"))

# What is killed closes nothing.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def model(root, monkeypatch):
    """A saved run's model without the run: what is tried here is how it is written."""
    directory = Path(tiny_runs.parts(root)["model"].path)
    model, params = load_pretrained(directory)
    loaded = SimpleNamespace(tokenizer=load_tokenizer(directory))
    saved = SimpleNamespace(find=lambda step: 3, policy=lambda step: (model, params), loaded=loaded)
    monkeypatch.setattr(exporting, "open_run", lambda run: contextlib.nullcontext(saved))
    return directory


def test_an_export_is_there_whole_or_not_at_all(model, tmp_path):
    for output in kill_everywhere(tmp_path, lambda output: exporting.export("run", output)):
        assert not output.exists() or content(output) == content(model)


def test_a_model_that_is_replaced_is_the_old_one_or_the_new(model, tmp_path):
    loaded = load_pretrained(model)
    old = content(model) | {"notes.txt": b""}

    def work(output):
        exporting.save_policy(output, *loaded, load_tokenizer(model))

    named = operations(tmp_path / "counted", work, tmp_path / "counted" / "model")
    for end in range(len(named) + 4):  # those of putting the old one away
        output = tmp_path / str(end) / "model"
        for name, data in old.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(data)
        killed_at(output.parent, end, work, output)
        assert not output.exists() or content(output) in (old, content(model))
        work(output)
        assert content(output.parent) == {f"model/{k}": x for k, x in content(model).items()}


def test_an_analysis(root, tmp_path, monkeypatch):
    """The steps are not taken here: their measures are made up."""
    stage = SimpleNamespace(number=2)
    arrays = {"actual": np.arange(3.0)}
    taken = SimpleNamespace(state=None, metrics={"cfrl/stage": 2})
    saved = SimpleNamespace(
        task=SimpleNamespace(params=None),
        steps=[3, 6],
        plan=[stage],
        follows=lambda step: step < 6,
        take=lambda step: (None, taken),
        state=lambda step: SimpleNamespace(params=None),
    )
    probe = SimpleNamespace(
        measure_state=lambda params: ({"entropy": 1.0}, arrays),
        measure=lambda before, state: ({"entropy": 2.0}, arrays),
    )
    monkeypatch.setattr(analysis, "open_run", lambda run: contextlib.nullcontext(saved))
    monkeypatch.setattr(analysis, "require_policy", lambda run: None)
    monkeypatch.setattr(analysis, "Probe", lambda task: probe)
    (tmp_path / "run").mkdir()
    for _ in kill_everywhere(tmp_path, lambda output: analysis.analyze(tmp_path / "run", output)):
        pass


# -- runs -----------------------------------------------------------------------------------------


SHORT = {"train__steps": 3, "train__checkpoint_every": 1, "train__keep_checkpoints": 1}
SHORT |= {"evaluation__every": 2}


# Before an operation whose name begins so, of the last that do; all of them would take minutes.
ENDS = {
    "rl": [
        "ftruncate run.lock",
        "replace .config.json",
        "open samples.jsonl",
        "fsync metrics.jsonl",
        "replace dynamics/.step",
        "rmdir checkpoints/deleted",
    ],
    "sft": ["replace .model.partial/config.json", "rename .model.partial"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_a_run(kind, root, tmp_path):
    make, run = {
        "rl": (tiny_runs.rl_config, run_rl),
        "sft": (tiny_runs.sft_config, lambda config: run_sft(config).parent),
    }[kind]
    config_of = lambda name: make(root, str(tmp_path / name), **SHORT)
    whole = run(config_of("whole"))
    named = operations(tmp_path / "counted", run, config_of("counted"))
    for number, kind_of_end in enumerate(ENDS[kind]):
        end = max(i for i, name in enumerate(named) if name.startswith(kind_of_end))
        killed_at(tmp_path / str(number), end, run, config_of(str(number)))
        again = run(config_of(str(number)))
        if kind == "rl":
            assert_same_run(again, whole)
        got, expected = (tiny_runs.lines(r, "metrics.jsonl") for r in (again, whole))
        assert tiny_runs.without_times(got) == tiny_runs.without_times(expected), kind_of_end
        assert names(again) == names(whole), kind_of_end
        if kind == "sft":
            assert content(again / "model") == content(whole / "model")


@pytest.mark.slow
def test_a_reward_model(root, tmp_path, monkeypatch):
    """Before every kind of operation, as its file is called but for numbers; of those that remove a
    checkpoint one in the middle. Its steps are made up, what is evaluated and written is not."""
    changes = {"train__steps": 2, "train__checkpoint_every": 1, "train__keep_checkpoints": 1}
    changes |= {"evaluation__every": 1, "train__trackers": ()}
    config_of = lambda name: reward_config(root, str(tmp_path / name / "run"), **changes)
    task = loop.open_task(config_of("whole"))

    def take(task, state, stage, step):
        params = jax.tree.map(lambda x: x + jnp.asarray(step + 1, x.dtype), state.params)
        return Taken(state.replace(params=params), {"loss": 0.5 * step, "step_time": 0.0}, 3, [])

    monkeypatch.setattr(loop, "open_task", lambda config: dataclasses.replace(task, config=config))
    monkeypatch.setitem(loop.STEPS, "reward", take)
    whole = run_reward(config_of("whole")).parent
    named = operations(tmp_path / "counted", run_reward, config_of("counted"))
    removing = [end for end, name in enumerate(named) if "/deleted/1/" in name]
    changing = [end for end, name in enumerate(named) if not name.startswith("mkdir")]
    last = {re.sub(r"\d+", "N", named[end]): end for end in changing if end not in removing}
    ends = sorted({*last.values(), removing[len(removing) // 2]})
    assert len(ends) > 15
    logs = ("metrics.jsonl", "calibration.jsonl")
    logged = lambda run: [tiny_runs.without_times(tiny_runs.lines(run, log)) for log in logs]
    for end in ends:
        killed_at(tmp_path / str(end), end, run_reward, config_of(str(end)))
        again = run_reward(config_of(str(end))).parent
        assert logged(again) == logged(whole), named[end]
        assert names(again) == names(whole), named[end]
        assert content(again / "model") == content(whole / "model"), named[end]
        shutil.rmtree(tmp_path / str(end))


def names(run):
    """What there is in a run, without the names that are new every time."""
    found = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    return {re.sub(r"tfevents.*|/d/[0-9a-f]+", "", name) for name in found}
