"""rl_step.py's suite "sharing": an update and its log-probs, a prompt passed once and G times.

Both in one process, round after round, by the process's seconds and by the clock's: the first
hardly change where the cores are shared with others.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
from peers.protocol import Shape

WAYS = ("apart", "together")
"""A row for every completion, and one for every prompt."""


def suite(shape: Shape, chosen: argparse.Namespace) -> dict:
    """Seconds, ratios apart / together, and the peak memory of the update."""
    import engine

    problem = engine.Problem(shape, chosen.architecture, chosen.remat, chosen.microbatches)
    runs: dict[str, dict[str, Callable]] = {"reference": {}, "update": {}}
    costs = {}
    for way in WAYS:
        with least_gain(math.inf if way == "apart" else 1.0):
            given = problem.update("joint")
        runs["update"][way] = engine.updater(*given)
        runs["reference"][way] = reference(problem, given[1][2])
        costs[way] = dataclasses.asdict(engine.cost_of(*given))
    found = {name: interleaved(ways, chosen) for name, ways in runs.items()}
    print(f"\nsharing: {json.dumps(dataclasses.asdict(shape))}")
    print(f"{'':<12}{'apart s':>10}{'together s':>12}{'ratio':>8}{'of processes':>14}")
    for name, case in found.items():
        apart, together = (statistics.median(case["seconds"][way]) for way in WAYS)
        print(f"{name:<12}{apart:>10.4f}{together:>12.4f}", end="")
        print(f"{case['ratio']['seconds']:>8.2f}{case['ratio']['process_seconds']:>14.2f}")
    peaks = [harness.mebibytes(costs[way]["peak_bytes"]) for way in WAYS]
    print(f"the update's peak: {peaks[0]} MiB apart, {peaks[1]} MiB together")
    return {"shape": dataclasses.asdict(shape), "costs": costs, "cases": found}


@contextlib.contextmanager
def least_gain(least: float) -> Iterator[None]:
    """What `completions_together` wants to gain, inside."""
    from jaxdyn.train import sharing

    usual, sharing.LEAST_GAIN = sharing.LEAST_GAIN, least
    try:
        yield
    finally:
        sharing.LEAST_GAIN = usual


@contextlib.contextmanager
def packed_gain(least: float) -> Iterator[None]:
    """What `packed_slots` wants to gain, inside."""
    from jaxdyn.train import sharing

    usual, sharing.PACKED_GAIN = sharing.PACKED_GAIN, least
    try:
        yield
    finally:
        sharing.PACKED_GAIN = usual


def reference(problem: Any, batch: Any) -> Callable:
    """Log-probs of the batch under the task's parameters."""
    from jaxdyn.train.policy import policy_logps

    task = problem.task
    return lambda: policy_logps(task.model, task.params, batch, 1.0)


def interleaved(ways: dict[str, Callable], chosen: argparse.Namespace) -> dict:
    """Seconds of each way, by the clock and of the process, and medians of ratios by rounds."""
    seconds = {kind: {way: [] for way in ways} for kind in ("seconds", "process_seconds")}
    for number in range(-chosen.warm_up, chosen.rounds):
        for way, run in ways.items():
            began = time.process_time()
            taken = harness.timed(run)[0]
            used = time.process_time() - began
            if number >= 0:
                seconds["seconds"][way].append(taken)
                seconds["process_seconds"][way].append(used)
    by_round = lambda of: [a / b for a, b in zip(of["apart"], of["together"], strict=True)]
    return {**seconds, "ratio": {k: statistics.median(by_round(v)) for k, v in seconds.items()}}
