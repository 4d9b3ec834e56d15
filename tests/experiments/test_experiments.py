"""The experiments on tiny models: that they run, and what they write."""

import csv
import dataclasses
import string
import sys

import components
import numpy as np
import pytest
import stories
import tiny_runs

from jaxdyn.data import StoriesConfig
from jaxdyn.presets import RL
from jaxdyn.train import run_rl


@pytest.mark.slow
def test_components(monkeypatch, tmp_path):
    run = run_rl(tiny_runs.rl_config(tmp_path, "run", train__steps=1, evaluation__every=0))
    command = ["components.py", str(run), "--prompts", "3", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    components.main()
    with (tmp_path / "out/components.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == components.COLUMNS
    kinds = {(row["between"], row["metric"], row["pairs"]) for row in rows}
    assert len(kinds) == len(rows) == 2 * 2 * 2 and {row["step"] for row in rows} == {"1"}
    for row in rows:
        # An untied kernel has no third part.
        parts = float(row["representation"]) + float(row["gradient"])
        np.testing.assert_allclose(parts, 1, rtol=1e-5)
        assert row["pairs"] == "different" or row["positive"] == "1.0"


@pytest.mark.slow
def test_stories(monkeypatch, tmp_path):
    """One of its schedules, a step a stage, and the report."""
    alphabet = string.ascii_letters + string.digits + string.punctuation + " \n"
    model = tiny_runs.make_model(tmp_path / "model", alphabet=alphabet, max_positions=256)
    monkeypatch.setenv("JAXDYN_CACHE", str(tmp_path / "cache"))
    base = RL["stories260k"]
    few = {"num_prompts": 2, "num_generations": 2}
    changes = {
        "data": dataclasses.replace(base.data, stories=StoriesConfig(8, 4)),
        "train": dataclasses.replace(base.train, steps=1, max_prompt_length=128, **few),
        "optim": dataclasses.replace(base.optim, classifier_steps=1),
        "sampling": dataclasses.replace(base.sampling, max_completion_length=8),
        "evaluation": dataclasses.replace(base.evaluation, **few),
        "probe": dataclasses.replace(base.probe, every=1, num_prompts=2),
    }
    monkeypatch.setitem(RL, "stories260k", dataclasses.replace(base, **changes))
    monkeypatch.setattr(stories, "SCHEDULES", ("classifier_first",))
    command = ["stories.py", "--model", model, "--output", str(tmp_path / "runs"), "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", command)
    stories.main()
    lines = tiny_runs.lines(tmp_path / "runs/classifier_first-3", "metrics.jsonl")
    assert [line.get("cfrl/stage") for line in lines] == [None, 1, 2]
    assert "classifier_first-3" in (tmp_path / "runs/report/report.html").read_text()
