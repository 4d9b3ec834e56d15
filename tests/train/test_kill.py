"""SIGKILL at ten random moments of one run's life, in saves too."""

import gc
import multiprocessing
import os
import random
import signal
import time

import pytest
import tiny_runs
from tiny_runs import assert_same_run

from jaxdyn.train import run_rl
from jaxdyn.train.checkpoint import Checkpoints

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["jaxdyn.train"])  # imported once, not at each restart


def attempt(config):
    """The run, or the rest of it, in a process of its own with the others' compiled programs."""
    gc.disable()  # for so short a life
    run_rl(config)


def start(config):
    process = CONTEXT.Process(target=attempt, args=(config,))
    process.start()
    return process


def unfinished(run):
    """Saves that have begun: what Orbax writes before it gives the checkpoint its name."""
    return {path for path in (run / "checkpoints").glob("*tmp*")}


def logged(run):
    """Which file the metrics are in, which an attempt begins by replacing, and how many."""
    path = run / "metrics.jsonl"
    try:
        return path.stat().st_ino, path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return None, 0


def wait_for(process, condition):
    """The condition's value, once it is true."""
    while not (found := condition()):
        assert process.is_alive(), "the run ended before it was killed often enough"
        time.sleep(0.002)
    return found


def kill_at(moment, process, run, draw, before, begun):
    """Kill the process once it has logged a few steps, and in a save if that is the moment."""
    if moment == "start":
        process.join(draw.uniform(0, 1))
    else:
        first = wait_for(process, lambda: (now := logged(run))[0] != before[0] and now)[1]
        new = draw.randint(1, 2)
        wait_for(process, lambda: logged(run)[1] >= first + new)
        if moment == "save":
            wait_for(process, lambda: unfinished(run) - begun)
        time.sleep(draw.uniform(0, 0.01))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_like_one_never_killed(root, tmp_path):
    """Four times inside a save, four between two, twice before the first step of the attempt."""
    changes = {"train__steps": 32, "probe__every": 7, "evaluation__every": 9}
    changes |= {"train__keep_checkpoints": 2, "train__keep_best": "eval_reward"}
    config_of = lambda name, every: tiny_runs.rl_config(
        root, str(tmp_path / name), **changes, train__checkpoint_every=every
    )
    for name, every in (("whole", 32), ("saved as often", 2)):
        run_rl(config_of(name, every))
    config = config_of("run", 2)
    run, draw = tmp_path / "run", random.Random(5)
    moments = ["save"] * 4 + ["step"] * 4 + ["start"] * 2
    draw.shuffle(moments)
    inside = 0
    for moment in moments:
        before, begun = logged(run), unfinished(run)
        kill_at(moment, start(config), run, draw, before, begun)
        inside += bool(unfinished(run) - begun)
    process = start(config)
    process.join()
    assert process.exitcode == 0
    assert inside >= 2
    # The ledger's segments end at checkpoints; nothing else knows how often there is one.
    often = tmp_path / "saved as often"
    assert_same_run(run, often)
    assert tiny_runs.lines(run, "ledger.jsonl") == tiny_runs.lines(often, "ledger.jsonl")
    assert_same_run(run, tmp_path / "whole", apart="ledger/")

    evaluated = {
        x["step"]: x["eval_reward"]
        for x in tiny_runs.lines(run, "metrics.jsonl")[1:]
        if "eval_reward" in x
    }
    best = max(evaluated, key=evaluated.get) + 1
    for directory in (run, tmp_path / "whole"):
        assert Checkpoints(directory / "checkpoints", metric="eval_reward").find("best") == best
