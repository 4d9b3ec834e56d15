"""Who may import whom, and what importing the package brings along."""

import ast
import os
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import pytest

import jaxdyn
from jaxdyn.cli import COMMANDS

ROOT = Path(jaxdyn.__file__).parent
PACKAGES = sorted(p.name for p in ROOT.iterdir() if (p / "__init__.py").exists())
TPU = glob("/dev/accel*") + glob("/dev/vfio/*")

# What each room may import of jaxdyn beside its own files. A room that is not here fails the test.
PURE = ("rl", "kernels", "optim", "rewards", "rollout", "models", "data")
ALLOWED = {room: {"types", "hosts", "grammar", "storage", "jaxdyn"} for room in PURE} | {
    "distributed": {"types", "hosts", "models", "sections"},
    "dynamics": {"types", "hosts", "grammar", "kernels", "rl", "jaxdyn"},
    "report": {"errors", "storage", "jaxdyn"},
    "storage": {"errors"},
    "train": {"errors", "types", "hosts", "storage", "config", "grammar", "sections", "data"}
    | {"distributed", "dynamics", "models", "optim", "rewards", "rl", "rollout"},
    "plan": {"types", "config", "sections", "distributed", "dynamics", "kernels", "models"}
    | {"optim", "rollout", "train", "jaxdyn"},
}
ALLOWED["commands"] = {*ALLOWED, "errors", "hosts", "presets", "jaxdyn"}
ALLOWED["commands"] |= {"types", "config", "sections", "grammar"}


def imported(path):
    """The modules that a file imports, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def rooms(path):
    """The rooms of jaxdyn that a file imports."""
    names = [name.split(".") for name in imported(path)]
    return {(parts[1] if parts[1:] else "jaxdyn") for parts in names if parts[0] == "jaxdyn"}


def test_every_room_has_a_rule():
    assert set(PACKAGES) == set(ALLOWED)


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_it_may(room):
    for path in (ROOT / room).rglob("*.py"):
        assert rooms(path) <= ALLOWED[room] | {room}, path


def test_what_all_share_is_little():
    assert len(list(ROOT.glob("*.py"))) <= 10


def test_types_import_nobody():
    assert rooms(ROOT / "__init__.py") == rooms(ROOT / "errors.py") == set()
    assert rooms(ROOT / "types.py") <= {"errors", "jaxdyn"}  # the package itself holds names
    assert rooms(ROOT / "hosts.py") == set()
    assert rooms(ROOT / "sections.py") == {"errors", "grammar"}
    assert rooms(ROOT / "grammar.py") == {"errors", "storage"}


def test_reports_are_made_without_a_device():
    for path in [*(ROOT / "report").rglob("*.py"), ROOT / "errors.py", ROOT / "__init__.py"]:
        heavy = {name.split(".")[0] for name in imported(path)} & {"jax", "flax", "optax", "orbax"}
        assert not heavy, path


def test_nothing_imports_the_tests_or_the_experiments():
    for path in ROOT.rglob("*.py"):
        assert not {n.split(".")[0] for n in imported(path)} & {"tests", "experiments", "oracles"}


def modules_after(code):
    """What a new process has imported once it has run `code`."""
    code += "\nimport sys; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_light():
    loaded = modules_after("import jaxdyn")
    assert "jaxdyn" in loaded
    heavy = {"tensorflow", "tensorflow_datasets", "matplotlib", "orbax", "flax", "optax"}
    assert not loaded & heavy
    assert not {name for name in loaded if name.startswith(("jaxdyn.", "orbax.", "tensorflow"))}


def test_the_command_line_answers_without_jax():
    """And says of every command what its options are, but for a run's own, and refuses them."""
    told = [name for name, command in COMMANDS.items() if not command.presets]
    assert sorted(COMMANDS.keys() - told) == ["reward", "rl", "sft"]
    code = f"""
from jaxdyn.cli import main
import contextlib, io, sys
for words in [["--help"], *([*name.split(), "--help"] for name in {told})]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(words)
    assert said.getvalue().startswith("usage: jaxdyn"), words
for words in (["plam"], ["kernel", "--limit", "some"], ["plan", "tiny", "--meshes", "0"]):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(words)
    assert said.getvalue().startswith("jaxdyn: "), words
"""
    loaded = modules_after(code)
    assert "jaxdyn.cli" in loaded and "jaxdyn.commands.plan_options" in loaded
    assert not loaded & {"jax", "tensorflow", "tensorflow_datasets", "matplotlib", "orbax"}


@pytest.mark.skipif(TPU or find_spec("libtpu") is None, reason="has a TPU, or no libtpu")
@pytest.mark.parametrize(
    "code, said",
    [
        ("import jaxdyn.types, jax; jax.devices()", ""),
        (
            "from jaxdyn.cli import main; main(['plan', 'tiny', '--mesh.devices', '999'])",
            "jaxdyn: mesh.devices is 999; here (cpu) has 1\n",
        ),
    ],
)
def test_where_there_is_no_tpu_nobody_complains_of_it(code, said):
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "JAX_", "XLA_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ours)
    assert done.stderr == said


@pytest.mark.slow
def test_tensorflow_is_never_imported(tmp_path):
    """Not even by the training loop, its checkpoints, or a data set that is built and read."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    code = f"""
import jaxdyn, jaxdyn.train, jaxdyn.report
from jaxdyn.data import DataConfig, load_source
config = DataConfig("jsonl", path={str(tmp_path / "prompts.jsonl")!r}, cache_dir={str(tmp_path)!r})
assert len(load_source(config, "train")) == 1
"""
    loaded = modules_after(code)
    assert {"jaxdyn.train", "orbax.checkpoint", "tensorflow_datasets"} <= loaded
    assert "tensorflow" not in loaded
