"""The package as installed and documented: its contents, its commands, its example."""

import re
from importlib.metadata import entry_points, version
from pathlib import Path

import jax
import numpy as np
import pytest
from setuptools import find_packages

import jaxdyn
from jaxdyn.commands.quickstart import make_model
from jaxdyn.data import AnagramsConfig

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxdyn"


def test_every_directory_with_code_is_a_package_that_gets_installed():
    found = set(find_packages(str(ROOT), include=["jaxdyn*"]))
    for path in PACKAGE.rglob("*.py"):
        assert ".".join(path.parent.relative_to(ROOT).parts) in found


def test_installed_metadata():
    assert version("jaxdyn") == jaxdyn.__version__
    (command,) = entry_points(group="console_scripts", name="jaxdyn")
    assert command.load().__module__ == "jaxdyn.cli"


def test_readme_has_the_commands_on_a_line_each_and_ci_runs_the_second():
    lines = (ROOT / "README.md").read_text().splitlines()
    make = "python3 -m venv .venv && .venv/bin/pip install -e "
    main = make + ". && .venv/bin/jaxdyn quickstart"
    tests = make + "'.[test]' && .venv/bin/python -m pytest -n auto"
    assert [line for line in lines if line.startswith("python3 -m venv")] == [main, tests]
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.slow
def test_readme_example_runs(tmp_path, monkeypatch, capsys):
    """The Python of the README, on a random model in the place of the quickstart's."""
    make_model(tmp_path / "runs/quickstart/sft/model", AnagramsConfig(), seed=0)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found: dict = {}
    with jax.numpy_rank_promotion("allow"):  # neural-tangents promotes
        exec(compile("\n".join(blocks), "README.md", "exec"), found)
    # The last block's matrix is the first's in neural-tangents' convention, in float32.
    kernel = found["kernels"].trace_kernel(
        found["model"], found["params"], found["sites"], mean=True
    )
    ntk = found["ntk"](found["site_prefixes"](found["sites"]), None, found["params"])
    np.testing.assert_allclose(ntk, kernel.total, rtol=1e-4)
    shapes, measured = capsys.readouterr().out.splitlines()
    representation, gradient = re.findall(r"\((\d+), (\d+)\)", shapes)
    assert representation == gradient
    assert gradient[1] == "20"  # the letters, `=` and three special tokens
    share, correlation = map(float, measured.split())
    # An ascent step along the full gradient: both parts of the kernel are positive semi-definite,
    # and at so small a step the first order is the change.
    assert 0 < share < 1
    assert correlation > 0.99
