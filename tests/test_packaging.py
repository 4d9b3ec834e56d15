"""The package as installed and documented: contents, commands, and who imports whom."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from setuptools import find_packages

import jaxdyn
from jaxdyn.data import AnagramsConfig
from jaxdyn.quickstart import make_model

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxdyn"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)

# Rooms that know only the shared types and themselves; `models` and `data` the same, by name,
# because they know nothing of RL. The others compose, and may import anything.
CLOSED = ("rl", "kernels", "optim", "rewards", "rollout", "models", "data", "dynamics", "report")


def imported_modules(code: str) -> set[str]:
    """The modules that a fresh interpreter has after running `code`."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


def imports_of(path: Path) -> set[str]:
    """The names of the modules a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(node.module or "")
    return names


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
    tests = make + "'.[test]' && .venv/bin/python -m pytest"
    assert [line for line in lines if line.startswith("python3 -m venv")] == [main, tests]
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_import_jaxdyn_is_light():
    assert not {"jax", "numpy", "flax"} & imported_modules("import jaxdyn")


def test_nothing_imports_tensorflow():
    every = imported_modules("import " + ", ".join(MODULES))
    assert set(MODULES) <= every
    assert not {"tensorflow", "tf2jax"} & every


@pytest.mark.parametrize("room", CLOSED)
def test_rooms_that_know_only_the_types_and_themselves(room):
    allowed = ("jaxdyn.types", "jaxdyn.errors", f"jaxdyn.{room}")
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imports_of(path):
            if name.split(".")[0] == "jaxdyn":
                assert name.startswith(allowed), f"{path.name} imports {name}"


def test_report_never_touches_a_device():
    every = imported_modules("import jaxdyn.report.page")
    assert "jax" not in every


def test_types_import_no_room():
    for name in imports_of(PACKAGE / "types.py"):
        assert name == "jaxdyn.errors" or name.split(".")[0] != "jaxdyn"


@pytest.mark.slow
def test_readme_example_runs(tmp_path, monkeypatch, capsys):
    """The Python of the README, on a random model in the place of the quickstart's."""
    make_model(tmp_path / "runs/quickstart/sft/model", AnagramsConfig(), seed=0)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    shapes, measured = capsys.readouterr().out.splitlines()
    representation, gradient = re.findall(r"\((\d+), (\d+)\)", shapes)
    assert representation == gradient
    assert gradient[1] == "20"  # the letters, `=` and three special tokens
    share, correlation = map(float, measured.split())
    # An ascent step along the full gradient: both parts of the kernel are positive semi-definite,
    # and at so small a step the first order is the change.
    assert 0 < share < 1
    assert correlation > 0.99
