"""A run that is not whole is refused by name; it has one writer; a false start leaves nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.commands.check import check
from jaxdyn.config import RunConfig
from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import load_config, save_config
from jaxdyn.storage.reading import read_records
from jaxdyn.train import lock, run_rl, seal
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.train.loop import require_position
from jaxdyn.train.run_directory import RunDirectory


@pytest.fixture(scope="module")
def whole(root):
    """Two checkpoints, evaluated and probed."""
    changes = {"train__steps": 4, "train__checkpoint_every": 2, "evaluation__temperatures": (0.5,)}
    changes |= {"evaluation__pass_at": (1,), "probe__every": 2}
    return run_rl(tiny_runs.rl_config(root, "whole-run", **changes))


@pytest.fixture
def run(whole, tmp_path):
    """A copy to do harm to."""
    return shutil.copytree(whole, tmp_path / "run")


def config_of(run):
    config = load_config(RunConfig, run / "config.json")
    config = dataclasses.replace(config, output=str(run))
    save_config(config, run / "config.json")
    return config


def without_line(path, number):
    kept = path.read_bytes().split(b"\n")
    del kept[number]
    path.write_bytes(b"\n".join(kept))


def with_line(path, number, line):
    kept = path.read_bytes().split(b"\n")
    kept[number] = line
    path.write_bytes(b"\n".join(kept))


def cut_short(path):
    """The last line half."""
    path.write_bytes(path.read_bytes()[:-40])


def flipped(path, at=0.5):
    """One bit in the file."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def largest(step):
    return max(
        (p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


HARM = {
    "metrics gone": (lambda r: (r / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
    "a line gone": (
        lambda r: without_line(r / "metrics.jsonl", 2),
        "metrics.jsonl has no line of step 1",
    ),
    "a line damaged": (
        lambda r: with_line(r / "metrics.jsonl", 1, b'{"step": 0, "lo'),
        "metrics.jsonl, line 2 is not JSON",
    ),
    "a line twice": (
        lambda r: with_line(r / "metrics.jsonl", 4, b'{"step": 3}\n{"step": 3}'),
        "metrics.jsonl has two lines of step 3",
    ),
    "samples gone": (lambda r: (r / "samples.jsonl").unlink(), "samples.jsonl is missing"),
    "completions cut": (
        lambda r: (r / "completions.jsonl").write_bytes(b""),
        "completions.jsonl has no line of step 0",
    ),
    "samples twice": (
        lambda r: (r / "samples.jsonl").write_bytes(2 * (r / "samples.jsonl").read_bytes()),
        "samples.jsonl goes back to step -1",
    ),
    "a sample cut off": (
        lambda r: cut_short(r / "samples.jsonl"),
        "samples.jsonl has fewer lines of step 3 than of others",
    ),
    "ledger cut": (
        lambda r: without_line(r / "ledger.jsonl", 0),
        "ledger.jsonl has no segment that begins with step 0",
    ),
    "temperatures gone": (
        lambda r: (r / "temperatures.jsonl").unlink(),
        "temperatures.jsonl is missing",
    ),
    "an array gone": (
        lambda r: (r / "dynamics" / "step_000001.npz").unlink(),
        "step_000001.npz is missing",
    ),
    "checkpoints gone": (
        lambda r: [shutil.rmtree(r / "checkpoints" / s) for s in "24"],
        "checkpoints has lost its checkpoints",
    ),
    "all checkpoints gone": (
        lambda r: shutil.rmtree(r / "checkpoints"),
        "checkpoints has lost its checkpoints",
    ),
    "a bit of an array": (
        lambda r: flipped(r / "dynamics" / "step_000001.npz"),
        "step_000001.npz is damaged",
    ),
    "a bit of the state": (
        lambda r: flipped(largest(r / "checkpoints" / "4")),
        "has changed since it was saved",
    ),
    "a bit of the position": (
        lambda r: flipped(r / "checkpoints/4/position/metadata"),
        "position/metadata has changed since it was saved",
    ),
    "a file of the state gone": (lambda r: largest(r / "checkpoints" / "4").unlink(), "is missing"),
    "checksums that lie deep": (
        lambda r: (r / "checkpoints/4" / seal.NAME).write_text("[" * 10**5),
        "checksums.json is damaged",
    ),
    "no checksums to read": (
        lambda r: (r / "checkpoints/4" / seal.NAME).write_text("[]"),
        "checksums.json is damaged",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARM)
def test_what_is_not_whole_is_refused_by_its_name(harm, run, monkeypatch):
    """By `jaxdyn check` and by going on, which changes nothing."""
    config = config_of(run)
    assert check(run) == f"{run}: rl, checkpoints at 2, 4"
    do, words = HARM[harm]
    do(run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(JaxdynError, match=words):
        check(run)
    with pytest.raises(JaxdynError, match=words) as caught:
        run_rl(config)
    assert "\n" not in str(caught.value) and "put back a copy" in str(caught.value)
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != lock.NAME}
    assert after == {p: x for p, x in before.items() if p.name != lock.NAME}


@pytest.mark.slow
def test_a_damaged_array_is_found_by_reading(run, capsys):
    flipped(run / "dynamics" / "step_000001.npz")
    flipped(largest(run / "checkpoints" / "2"))
    with pytest.raises(SystemExit) as stop:
        main(["check", str(run)])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.startswith(f"jaxdyn: {run} is not whole: ")
    assert said.err.endswith("has changed since it was saved (and 1 more)\n")
    assert said.out.splitlines()[1] == f"{run / 'dynamics' / 'step_000001.npz'} is damaged"


@pytest.mark.slow
def test_every_bit_of_a_checkpoints_weights_counts(run, tmp_path):
    """Wherever it is flipped: 24 of 24 are refused, where a model is taken from it too."""
    step = run / "checkpoints" / "4"
    files = sorted(p for p in (step / "state").rglob("*") if p.is_file())
    rng = np.random.default_rng(0)
    for number in range(24):
        path = files[number % len(files)]
        kept = path.read_bytes()
        flipped(path, rng.random())
        assert seal.damage(step) == f"{path} has changed since it was saved"
        if number == 0:
            with pytest.raises(SystemExit):
                main(["export", str(run), str(tmp_path / "model")])
            assert not (tmp_path / "model").exists()
        path.write_bytes(kept)
    assert seal.damage(step) is None


@pytest.mark.slow
def test_what_a_kill_leaves_is_whole(run):
    """A half line at the end, lines after the checkpoint, and an older run without checksums."""
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "loss": 1.0}\n' + b"[" * 10**5)
    for step in (2, 4):
        (run / "checkpoints" / str(step) / seal.NAME).unlink()
    assert check(run) == f"{run}: rl, checkpoints at 2, 4; of 2, 4 there are no checksums"
    main(["check", str(run)])
    (run / "checkpoints" / seal.SAVED).unlink()  # before its first checkpoint
    for step in "24":
        shutil.rmtree(run / "checkpoints" / step)
    assert check(run) == f"{run}: rl, no checkpoint yet"


def test_a_log_is_read_up_to_its_torn_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"step": 0, "text": "a\u2028b"}\n{"step": 1}\n{"st'.encode())
    assert [record["step"] for record in read_records(path)] == [0, 1]
    for line in (b"[1]", b"nonsense", b'{"step": "0"}', b"{}", b"[" * 10**5):
        path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
        with pytest.raises(JaxdynError, match=r"a.jsonl, line 2 (is not JSON|must be an object)"):
            read_records(path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"3", b"null", b"[" * 10**5, b"\xff\xfe", b"{}"),
        *(b'{"step": "2"}', b'{"step": 3}', b'{"step": 1e999}', b'{"step": true}'),
        b'{"step": 1' + b"0" * 30 + b"}",
        b'{"step": 1' + b"0" * 5000 + b"}",
    ],
)
def test_a_damaged_position_of_a_checkpoint_without_checksums(content, saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "c")
    (directory / "2" / "position" / "metadata").write_bytes(content)
    (directory / "2" / seal.NAME).unlink()
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.steps() == [2]
        with pytest.raises(JaxdynError, match=f"cannot restore step 2 from {directory}") as caught:
            checkpoints.position(2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name, value", [("stage", "third"), ("num_tokens", -1), ("time/wall", float("nan"))]
)
def test_a_position_that_says_what_cannot_be(name, value, saved):
    like = {"step": 0, "stage": "joint", "num_tokens": 0, "time/wall": 0.0}
    with Checkpoints(saved) as checkpoints:
        found = checkpoints.position(2)
        assert require_position(found, like, checkpoints)["step"] == 2
        with pytest.raises(JaxdynError, match=f"is damaged: its {name} is {value}|'{value}'"):
            require_position({**found, name: value}, like, checkpoints)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One checkpoint, of nothing much."""
    directory = tmp_path_factory.mktemp("positions") / "c"
    position = {"step": 2, "stage": "joint", "num_tokens": 5, "time/wall": 1.0, "reached": False}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, {"x": np.ones(3, np.float32)}, position)
    return directory


# -- one writer -----------------------------------------------------------------------------------


HOLDER = """
import sys, time
from pathlib import Path
from jaxdyn.train.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_the_second_writer_is_told_who_the_first_is(root, tmp_path):
    config = tiny_runs.rl_config(root, "unused")
    with RunDirectory(tmp_path / "run", config) as directory:
        directory.rewind(-1)
        directory.log("metrics.jsonl", {"step": -1})
        before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        words = (
            rf"run is being written by process {os.getpid()} on .* since 20.*; wait until it ends"
        )
        with pytest.raises(JaxdynError, match=words):
            RunDirectory(tmp_path / "run", config)
        RunDirectory(tmp_path / "run", config, writes=False).close()  # others of many processes
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
        assert lock.holder(tmp_path / "run").startswith(f"process {os.getpid()}")
    assert lock.holder(tmp_path / "run") is None
    (tmp_path / "run" / "checkpoints").mkdir()
    RunDirectory(tmp_path / "run", config).close()


def test_a_killed_writer_holds_nothing(tmp_path):
    """Nor does a process that it forked, which lives on."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(JaxdynError, match=f"written by process {process.pid} on"):
        lock.Lock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    held = lock.Lock(tmp_path)
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    lock._forget()  # as in a forked child
    lock.Lock(tmp_path).release()
    held.release()


# -- false starts ---------------------------------------------------------------------------------


def test_nothing_is_left_of_a_run_that_failed_before_its_first_line(root, tmp_path):
    config = tiny_runs.rl_config(root, "unused")
    with pytest.raises(JaxdynError), RunDirectory(tmp_path / "a" / "run", config) as directory:
        directory.rewind(-1)
        directory.log("samples.jsonl", {"step": -1})
        raise JaxdynError("the reward failed")
    assert not (tmp_path / "a" / "run").exists()
    with pytest.raises(JaxdynError), RunDirectory(tmp_path / "run", config) as directory:
        directory.rewind(-1)
        directory.log("metrics.jsonl", {"step": -1})
        raise JaxdynError("the disk is full")
    with pytest.raises(JaxdynError), RunDirectory(tmp_path / "run", config):
        raise JaxdynError("and it was begun before")
    assert (tmp_path / "run" / "metrics.jsonl").exists()


# -- preempted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep, left", [(0, [2, 4, 6]), (1, [6]), (2, [4, 6])])
def test_a_preempted_runs_own_checkpoint_goes_with_the_next(keep, left, tmp_path):
    state = {"x": np.ones(3, np.float32)}
    for step in (2, 4, 5, 6):
        with Checkpoints(tmp_path / "c", keep=keep) as checkpoints:
            checkpoints.save(step, state, {"step": step, "preempted": step == 5})
            if step == 5:
                assert checkpoints.steps()[-1] == 5
    assert Checkpoints(tmp_path / "c").steps() == left
    assert not (tmp_path / "c" / "deleted").exists()
