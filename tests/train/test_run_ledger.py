"""The ledger that a run keeps: against its own checkpoints, and across restarts."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_runs

from jaxdyn.dynamics import ledger
from jaxdyn.train import open_run, run_rl
from jaxdyn.train.probe import Probe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(root):
    """Probed every two steps, kept every three; steps large enough to see."""
    changes = {"probe__every": 2, "train__keep_checkpoints": 5, "optim__learning_rate": 3e-3}
    return run_rl(tiny_runs.rl_config(root, "kept", evaluation__every=0, **changes))


def test_segments_lead_from_what_is_measured_or_saved_to_the_next(run):
    lines = tiny_runs.lines(run, "ledger.jsonl")
    assert [(line["from"], line["step"]) for line in lines] == [(0, 1), (2, 2), (3, 3), (4, 5)]
    for line in lines:
        for of in (line["log_prob"], line["entropy"]):
            parts = np.add(of["representation"], of["gradient"])
            scale = np.abs(of["change"]).max()
            np.testing.assert_allclose(parts, of["change"], atol=1e-4 * scale + 1e-6)


def test_the_whole_is_the_change_of_the_policy_and_its_parts_those_of_its_checkpoints(run):
    lines = tiny_runs.lines(run, "ledger.jsonl")
    total = lambda name, part: np.sum([line[name][part] for line in lines], axis=0)
    with open_run(run) as saved:
        probe = Probe(saved.task)
        start = {part: saved.task.params[part] for part in ("backbone", "classifier")}
        trajectory = [start, *(saved.policy(step)[1] for step in saved.steps)]
        found = ledger(saved.loaded.model, trajectory, probe.sites)
    for name in ("log_prob", "entropy"):
        whole = found.values[name][-1] - found.values[name][0]
        scale = np.abs(whole).max()
        assert scale > 3e-3
        np.testing.assert_allclose(total(name, "change"), whole, atol=1e-5)
        # Shorter segments of another path: near, not equal.
        parts = found.parts[name]["representation"].sum(axis=0)
        np.testing.assert_allclose(total(name, "representation"), parts, atol=0.05 * scale)
    logged = tiny_runs.lines(run, "dynamics.jsonl")[-1]
    is_prompt = np.asarray(probe.sites.is_prompt)
    mean = total("entropy", "gradient")[~is_prompt].mean()
    np.testing.assert_allclose(logged["ledger/entropy/gradient/completion"], mean, rtol=1e-6)
    change = total("log_prob", "change")
    share = total("log_prob", "gradient") @ change / (change @ change)
    np.testing.assert_allclose(logged["ledger/log_prob/share/gradient"], share, rtol=1e-6)


def test_a_tied_run_in_bfloat16_has_a_ledger_that_closes(root):
    changes = {"probe__every": 2, "optim__learning_rate": 3e-3, "evaluation__every": 0}
    config = tiny_runs.rl_config(root, "narrow", tied=True, **changes)
    model = dataclasses.replace(config.model, dtype="bfloat16")
    run = run_rl(dataclasses.replace(config, model=model))
    moved = 0.0
    for line in tiny_runs.lines(run, "ledger.jsonl"):
        for of in (line["log_prob"], line["entropy"]):
            parts = np.add(of["representation"], of["gradient"])
            scale = np.abs(of["change"]).max()
            np.testing.assert_allclose(parts, of["change"], atol=1e-4 * scale + 1e-6)
            moved = max(moved, scale)
    assert moved > 1e-3


def test_a_run_that_goes_on_has_the_same_ledger(root, run):
    changes = {"probe__every": 2, "train__keep_checkpoints": 5, "optim__learning_rate": 3e-3}
    config = tiny_runs.rl_config(root, "again", evaluation__every=0, **changes)
    run_rl(config)
    again = root / "again"
    for step in (6,):  # as if it had been killed after the checkpoint at 3
        for path in sorted((again / "checkpoints").glob(f"*{step}*"), reverse=True):
            for inner in sorted(path.rglob("*"), reverse=True):
                inner.unlink() if inner.is_file() else inner.rmdir()
            path.rmdir()
    run_rl(config)
    read = lambda path: [json.loads(x) for x in (path / "ledger.jsonl").read_text().splitlines()]
    assert read(again) == read(run)
