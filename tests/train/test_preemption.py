"""SIGTERM: the step in progress is saved, and the same command goes on to the same end."""

import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from crash import interrupt_unheard, interruptible
from tiny_runs import assert_same_run

from jaxdyn import cli
from jaxdyn.errors import Preempted
from jaxdyn.grammar import save_config
from jaxdyn.train import loop, run_rl, run_sft
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.train.preemption import Preemption


def told_in_call(number, original):
    """`original`, but in its `number`-th call this process is told to end."""
    calls = [0]

    def function(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    return function


def test_a_second_signal_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with interruptible(), Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    reached = []
    thread = threading.Thread(target=lambda: reached.append(watched()))
    thread.start()
    thread.join()
    assert reached == [False]


def watched():
    with Preemption() as preemption:
        return preemption.reached()


@pytest.mark.parametrize("command", ["rl", "sft"])
def test_the_command_line_ends_with_a_code_of_its_own(command, monkeypatch, capsys):
    def run(config):
        raise Preempted("preempted; 3 of 9 steps are in runs/x")

    monkeypatch.setattr(f"jaxdyn.train.run_{command}", run)
    with pytest.raises(SystemExit) as ended:
        cli.main([command])
    assert ended.value.code == 75
    said = capsys.readouterr()
    assert said.err == (
        "jaxdyn: preempted; 3 of 9 steps are in runs/x; the same command goes on from there\n"
    )
    assert said.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["joint", "classifier_first"])
def test_preempted_and_started_again(schedule, root, joint_run, first_run, tmp_path, monkeypatch):
    """In a step without a checkpoint, in the third (a stage's last), and in the run's last."""
    changes = {"optim__schedule": schedule, "train__checkpoint_every": 100}
    config = tiny_runs.rl_config(root, str(tmp_path / "run"), **changes)
    done = 0
    for number in (2, 1):
        done += number
        with monkeypatch.context() as patched, pytest.raises(Preempted) as ended:
            patched.setitem(loop.STEPS, "rl", told_in_call(number, loop.STEPS["rl"]))
            run_rl(config)
        last = 9 if schedule == "classifier_first" else 6
        assert str(ended.value) == f"preempted; {done} of {last} steps are in {config.output}"
        assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == done
        assert tiny_runs.lines(tmp_path / "run", "metrics.jsonl")[-1]["step"] == done - 1
    with monkeypatch.context() as patched:  # in its last step a run just ends
        patched.setitem(loop.STEPS, "rl", told_in_call(last - done, loop.STEPS["rl"]))
        run = run_rl(config)
    assert_same_run(run, joint_run if schedule == "joint" else first_run)
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [last]


@pytest.mark.slow
def test_supervised_training_told_to_end_and_started_again(root, tmp_path, monkeypatch, capsys):
    """By SIGTERM; by Ctrl-C, which is heard wherever it comes; by SIGTERM in the last step."""
    changes = {"train__steps": 4, "train__checkpoint_every": 100}
    whole = run_sft(tiny_runs.sft_config(root, str(tmp_path / "whole"), **changes)).parent
    config = tiny_runs.sft_config(root, str(tmp_path / "run"), **changes)
    with monkeypatch.context() as patched, pytest.raises(Preempted, match="2 of 4 steps are in"):
        patched.setitem(loop.STEPS, "sft", told_in_call(2, loop.STEPS["sft"]))
        run_sft(config)
    save_config(config, tmp_path / "run.json")
    with monkeypatch.context() as patched, interruptible(), pytest.raises(SystemExit) as ended:
        patched.setitem(loop.STEPS, "sft", lambda *_: interrupt_unheard())
        cli.main(["sft", "--config", str(tmp_path / "run.json")])
    assert ended.value.code == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "jaxdyn: interrupted; the same command goes on from there"
    with monkeypatch.context() as patched:
        patched.setitem(loop.STEPS, "sft", told_in_call(2, loop.STEPS["sft"]))
        run = run_sft(config).parent
    got, expected = (tiny_runs.lines(r, "metrics.jsonl") for r in (run, whole))
    assert tiny_runs.without_times(got) == tiny_runs.without_times(expected)
    for directory in (run, whole):
        with Checkpoints(directory / "checkpoints") as checkpoints:
            assert checkpoints.steps() == [4]
            assert checkpoints.position(4)["preempted"] is False
    models = [
        (directory / "model" / "model.safetensors").read_bytes() for directory in (run, whole)
    ]
    assert models[0] == models[1]


PROCESS = """
import os, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
address, index, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(address, 2, index)
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.train.preemption import Preemption
spread = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), P("d"))
zeros = np.zeros((8, 4), np.float32)
state = {"weight": jax.make_array_from_callback(zeros.shape, spread, lambda i: zeros[i])}
update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
for told in (2, 6):
    with Checkpoints(directory, keep=2) as checkpoints, Preemption() as preemption:
        first = 0
        if saved := checkpoints.steps():
            first = saved[-1]
            state = checkpoints.state(first, state)
        for step in range(first, 100):
            state = update(state)
            if (index, step) == (1, told):
                os.kill(os.getpid(), signal.SIGTERM)
            if preemption.reached():
                checkpoints.save(step + 1, state, {"step": step + 1, "process": index})
                break
    print("ended after", step + 1)
"""


@pytest.mark.slow
def test_one_process_is_told_and_all_save_the_same_step(tmp_path):
    """Twice with two processes, then taken up by this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), str(tmp_path / "c")],
            env={**os.environ, **flags, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for out, _ in said:
        assert [x for x in out.splitlines() if "ended" in x] == ["ended after 3", "ended after 7"]
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.steps() == [3, 7]
    assert checkpoints.position(7) == {"step": 7, "process": 0}
    for step in (3, 7):
        got = checkpoints.state(step, {"weight": jnp.zeros((8, 4))})["weight"]
        assert got.sharding.device_set == {jax.local_devices()[0]}
        assert np.array_equal(got, np.full((8, 4), step))
