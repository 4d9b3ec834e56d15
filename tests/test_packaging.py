"""The package as installed and documented: its contents and its commands."""

from importlib.metadata import entry_points, version
from pathlib import Path

from setuptools import find_packages

import jaxdyn

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


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_readme_has_the_commands_on_a_line_each_and_ci_runs_the_second():
    lines = (ROOT / "README.md").read_text().splitlines()
    make = "python3 -m venv .venv && .venv/bin/pip install -e "
    main = make + ". && .venv/bin/jaxdyn quickstart"
    tests = make + "'.[test]' && .venv/bin/python -m pytest -n auto"
    assert [line for line in lines if line.startswith("python3 -m venv")] == [main, tests]
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
