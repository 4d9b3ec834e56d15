"""Who is told a run's metrics: modules of the surface that Trackio and wandb share; refusals."""

import dataclasses
import sys
import types

import pytest
import tiny_runs

from jaxdyn.grammar import from_dict, load_config
from jaxdyn.sections import LoopConfig
from jaxdyn.train import run_rl, trackers
from jaxdyn.train.board import Board
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.types import JaxdynError


class Fake(types.ModuleType):
    """Remembers what it was told; `fails` stands for a refusal of the service's."""

    def __init__(self, name):
        super().__init__(name)
        self.begun, self.logged, self.finished, self.axes, self.fails = [], [], 0, [], False

    def init(self, **told):
        if self.fails:
            raise RuntimeError("api_key not configured\n(no-tty)")
        self.begun.append(told)
        return self

    def define_metric(self, name, step_metric):
        assert self.__name__ == "wandb"  # Trackio has no such thing
        self.axes.append((name, step_metric))

    def log(self, scalars, step=None):
        self.logged.append((scalars, step))

    def finish(self):
        self.finished += 1


@pytest.fixture
def fakes(monkeypatch):
    made = {name: Fake(name) for name in ("trackio", "wandb")}
    for name, fake in made.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return made


def config(root, *names):
    return tiny_runs.rl_config(root, str(root / "run"), train__trackers=names)


def test_all_of_them_get_every_scalar_at_its_step(tmp_path, fakes, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    written = []
    keep = lambda self, step, scalars: written.append((step, scalars))
    monkeypatch.setattr(Board, "log", keep)
    told = config(tmp_path, "tensorboard", "trackio", "wandb")
    for begins in (-1, 3):  # a start, and a start again
        with RunDirectory(told.output, told) as directory:
            directory.rewind(begins)
            directory.checkpoints.mkdir(exist_ok=True)  # a run that goes on has some
            line = {"step": begins, "reward": 0.5, "num_tokens": 7, "text": "no"}
            directory.log("metrics.jsonl", line)
            directory.log("samples.jsonl", {"step": begins, "x": 1})
    scalars = {"reward": 0.5, "num_tokens": 7}
    assert written == [(-1, scalars), (3, scalars)]
    trackio, wandb = fakes["trackio"], fakes["wandb"]
    assert trackio.logged == [(scalars, -1), (scalars, 3)]
    assert wandb.logged == [({"step": step, **scalars}, None) for step in (-1, 3)]
    assert wandb.axes == [("*", "step")] * 2 and trackio.finished == wandb.finished == 2
    first, again = wandb.begun
    assert first == again and first["resume"] == "allow" and len(first["id"]) == 8
    assert first["name"] == f"run-{first['id']}" == trackio.begun[1]["name"]
    assert (first["project"], trackio.begun[0]["project"]) == ("mine", "jaxdyn")
    assert first["config"] == dataclasses.asdict(told) and "id" not in trackio.begun[0]


def test_a_run_goes_on_whoever_is_told(tmp_path, fakes):
    with RunDirectory(tmp_path / "run", config(tmp_path)) as directory:
        directory.rewind(-1)
        directory.checkpoints.mkdir()
        directory.log("metrics.jsonl", {"step": 0, "reward": 1.0})
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "tracker.txt").exists()
    told = config(tmp_path, "wandb")
    RunDirectory(tmp_path / "run", told).close()
    assert not fakes["wandb"].begun  # it has not begun
    saved = load_config(type(told), tmp_path / "run" / "config.json")
    assert saved.train.trackers == ()
    with RunDirectory(tmp_path / "run", told, writes=False) as other:  # another process
        other.rewind(-1)
    assert not fakes["wandb"].begun


def test_what_is_refused(tmp_path, fakes, monkeypatch):
    fakes["wandb"].fails = True
    said = (
        r"^train.trackers: wandb would not begin: RuntimeError: api_key not configured \(no-tty\)$"
    )
    directory = RunDirectory(tmp_path / "run", config(tmp_path, "wandb"))
    with directory, pytest.raises(JaxdynError, match=said):
        directory.rewind(-1)
    with pytest.raises(JaxdynError, match="names one twice"):
        LoopConfig(trackers=("wandb", "wandb"))
    with pytest.raises(JaxdynError, match=r"trackers\[0\]: expected one of .*got 'comet'"):
        from_dict(LoopConfig, {"trackers": ["comet"]})
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    said = (
        r"^train.trackers names trackio, which is not installed: pip install 'jaxdyn\[trackio\]'$"
    )
    with pytest.raises(JaxdynError, match=said):
        run_rl(config(tmp_path / "other", "tensorboard", "trackio"))
    assert not (tmp_path / "other" / "run").exists()
