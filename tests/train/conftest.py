"""Runs that several files compare with: a standard one and a classifier-first one."""

import pytest
import tiny_runs

from jaxdyn.train import run_rl


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def joint_run(root):
    return run_rl(tiny_runs.rl_config(root, "joint"))


@pytest.fixture(scope="session")
def first_run(root):
    return run_rl(tiny_runs.rl_config(root, "first", optim__schedule="classifier_first"))
