"""Killed anywhere and started again, a run ends with the files of one never interrupted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint._src.path.atomicity as atomicity
import pytest
import tiny_runs
from tiny_runs import assert_same_run

from jaxdyn.data import Tokenizer
from jaxdyn.grammar import save_config
from jaxdyn.train import loop, open_run, run_directory, run_rl, run_sft
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.types import JaxdynError


class Killed(BaseException):
    """Stands for the process's end: nothing in the package may catch it."""


def at_call(number, original, before=True):
    """`original`, but its `number`-th call is the end of the process."""
    calls = [0]

    def function(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number and before:
            raise Killed
        result = original(*args, **kwargs)
        if calls[0] == number:
            raise Killed
        return result

    return function


def half_a_line(monkeypatch):
    """Dies with half of step 4's metrics written, in the middle of a character."""
    original = RunDirectory.log

    def log(self, name, *records):
        if name == "metrics.jsonl" and records[0]["step"] == 4:
            with open(self.local / name, "ab") as file:
                file.write('{"step": 4, "reward": "é'.encode()[:-1])
            raise Killed
        original(self, name, *records)

    monkeypatch.setattr(RunDirectory, "log", log)


def before_rename(monkeypatch, number):
    """Dies with a checkpoint's data written under its temporary name."""
    cls = atomicity.AtomicRenameTemporaryPath
    monkeypatch.setattr(cls, "finalize", at_call(number, cls.finalize))


POINTS = {
    "writing the configuration": lambda m: m.setattr(
        run_directory, "save_config", at_call(1, run_directory.save_config, before=False)
    ),
    "before a step": lambda m: m.setitem(loop.STEPS, "rl", at_call(5, loop.STEPS["rl"])),
    "before a checkpoint": lambda m: m.setattr(
        loop.Checkpoints, "save", at_call(1, loop.Checkpoints.save)
    ),
    "after a checkpoint": lambda m: m.setattr(
        loop.Checkpoints, "save", at_call(1, loop.Checkpoints.save, before=False)
    ),
    "inside the first checkpoint": lambda m: before_rename(m, 1),
    "inside a later checkpoint": lambda m: before_rename(m, 5),
    "inside a line": half_a_line,
    "inside an array file": lambda m: m.setattr(
        np, "savez_compressed", at_call(6, np.savez_compressed, before=False)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("point", POINTS)
def test_killed_and_started_again(point, every, root, first_run, monkeypatch, tmp_path):
    """Checkpoints at the stages' boundary, step 3, and on either side of it."""
    changes = {"optim__schedule": "classifier_first", "train__checkpoint_every": every}
    config = tiny_runs.rl_config(root, str(tmp_path / "run"), **changes)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        POINTS[point](patched)
        run_rl(config)
    assert_same_run(run_rl(config), first_run)


@pytest.mark.slow
def test_killed_again_and_again(root, joint_run, tmp_path, monkeypatch):
    config = tiny_runs.rl_config(root, str(tmp_path / "run"))
    for calls in (2, 3, 4, 1):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setitem(loop.STEPS, "rl", at_call(calls, loop.STEPS["rl"]))
            run_rl(config)
    assert_same_run(run_rl(config), joint_run)
    assert_same_run(run_rl(config), joint_run)  # a finished run stays as it is


SCRIPT = """
import os, signal, sys
from pathlib import Path
import orbax.checkpoint._src.path.atomicity as atomicity
from jaxdyn.config import RunConfig
from jaxdyn.grammar import load_config
from jaxdyn.train import run_rl
calls, original = [0], atomicity.AtomicRenameTemporaryPath.finalize
def finalize(*args, **kwargs):
    calls[0] += 1
    if calls[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
atomicity.AtomicRenameTemporaryPath.finalize = finalize
run_rl(load_config(RunConfig, Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_process_killed_inside_a_save(root, joint_run, tmp_path):
    """SIGKILL in another process, taken up in this one: nothing lives in the process alone."""
    config = tiny_runs.rl_config(root, str(tmp_path / "run"))
    save_config(config, tmp_path / "config.json")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "config.json")],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert any("tmp" in p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert_same_run(run_rl(config), joint_run)


@pytest.mark.slow
def test_supervised_training_killed_and_started_again(root, tmp_path, monkeypatch):
    whole = run_sft(tiny_runs.sft_config(root, "sft")).parent
    config = tiny_runs.sft_config(root, str(tmp_path / "run"))
    for calls in (4, 2):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setitem(loop.STEPS, "sft", at_call(calls, loop.STEPS["sft"]))
            run_sft(config)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Tokenizer, "save", at_call(1, Tokenizer.save))
        run_sft(config)
    model = run_sft(config)
    got, expected = (tiny_runs.lines(r, "metrics.jsonl") for r in (model.parent, whole))
    assert [line["step"] for line in expected] == list(range(-1, 6))
    assert expected[-1]["loss"] < expected[1]["loss"]
    assert [x["step"] for x in expected if "eval_reward" in x] == [-1, 2, 5]
    assert tiny_runs.without_times(got) == tiny_runs.without_times(expected)
    assert (model / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_supervised_training_stops_at_its_target(root):
    config = tiny_runs.sft_config(
        root, "sft-target", train__target_reward=1e-9, train__steps=9, evaluation__every=1
    )
    config = tiny_runs.replaced(config, {"reward__functions": ("length",)})
    for _ in range(2):  # and started again it stays as it is
        run = run_sft(config).parent
        assert [line["step"] for line in tiny_runs.lines(run, "metrics.jsonl")] == [-1, 0]
    with open_run(run) as saved:
        assert saved.steps == [1] and not saved.follows(1)


# -- the run's directory alone --------------------------------------------------------------------


def directory_of(root, path, **changes) -> RunDirectory:
    return RunDirectory(path, tiny_runs.rl_config(root, "unused", **changes))


def test_rewinding_forgets_a_step_and_what_follows(root, tmp_path):
    directory = directory_of(root, tmp_path / "run")
    directory.rewind(-1)
    texts = ["a", "line\u2028break\x85and\u2029more", "é", "z"]
    for i, text in enumerate(texts):
        directory.log("samples.jsonl", {"step": i, "completion": text})
        directory.save_arrays(i, {"x": np.array([i])})
    (directory.dynamics / "step_000009.partial").write_bytes(b"PK")
    directory.rewind(3)
    kept = tiny_runs.lines(tmp_path / "run", "samples.jsonl")
    assert [row["completion"] for row in kept] == texts[:3]
    names = sorted(p.name for p in directory.dynamics.glob("*.npz"))
    assert names == [f"step_{i:06d}.npz" for i in range(3)]
    directory.close()


def test_a_directory_holds_one_run(root, tmp_path):
    directory_of(root, tmp_path / "run")
    directory_of(root, tmp_path / "run")  # the same command goes on
    with pytest.raises(JaxdynError, match=r"another run \(optim.b1: 0.9 there, 0.5 here\)"):
        directory_of(root, tmp_path / "run", optim__b1=0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(JaxdynError, match="is not empty and holds no run"):
        directory_of(root, tmp_path / "mine")
    assert [p.name for p in Path(tmp_path / "mine").iterdir()] == ["thesis.txt"]
