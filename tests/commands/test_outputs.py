"""Outputs that cannot be written, or are somebody else's, are found before any work."""

import json
import sys

import jaxtyping
import pytest
import tiny_runs
from etils.epath import gpath

from jaxdyn.cli import main
from jaxdyn.commands import evaluate, plan
from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import save_config
from jaxdyn.train import loop

analysis = sys.modules["jaxdyn.train.analyze"]
"""The package gives its name to the function."""


@pytest.fixture(autouse=True)
def _without_work(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    worked = lambda *_, **__: pytest.fail("work was done")
    for module, name in (
        (evaluate, "open_policy"),
        (plan, "open_topology"),
        (analysis, "Probe"),
        (loop, "open_task"),
    ):
        monkeypatch.setattr(module, name, worked)


@pytest.fixture
def config(tmp_path):
    """A run's configuration, whose model nobody reads."""
    save_config(tiny_runs.rl_config(tmp_path, "run"), tmp_path / "c.json")
    return str(tmp_path / "c.json")


@pytest.mark.parametrize("command", ["evaluate", "plan", "presets", "rl", "quickstart"])
@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere/x"])
def test_what_cannot_be_written(command, place, config, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    output = str(tmp_path / place)  # of an absolute path that alone
    words = {
        "evaluate": ["--model", "m", "--config", config, "--output", output],
        "plan": ["tiny", "--topology", "here", "--json", output],
        "presets": ["--json", output],
        "rl": ["--config", config, "--output", output],
        "quickstart": ["--output", output],
    }[command]
    with pytest.raises(SystemExit) as stop:
        main([command, *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith("jaxdyn: cannot write to ") and output.rsplit("/", 1)[0] in said
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["kernel", "sketch", "ledger", "quickstart"])
def test_a_store_that_is_not_a_directory(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    prompts = ["--prompts", "p.jsonl"]
    words = {
        "kernel": ["--model", "m", *prompts],
        "sketch": ["--model", "m", *prompts],
        "ledger": ["m", "n", *prompts],
        "quickstart": [],
    }[command]
    with pytest.raises(SystemExit) as stop:
        main([command, *words, "--output", "s3://a/b"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said == "jaxdyn: cannot write to s3:/a/b: it is no directory of this machine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize("content", ["mine", "{}", '{"steps": 3}', "[" * 10**5])
def test_a_plan_replaces_a_plan_alone(content, tmp_path, capsys):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        main(["plan", "tiny", "--topology", "here", "--json", str(path)])
    assert f"{path} already exists and is no plan; choose another --json" in capsys.readouterr().err
    assert path.read_text() == content


def test_an_analysis_replaces_an_analysis_alone(tmp_path):
    for name, content, words in (
        ("config.json", "{}", r"already holds config\.json; choose another output"),
        ("dynamics.jsonl", '{"step": -1}\n', r"already holds dynamics\.jsonl"),
        ("analysis.json", "{}", r"analysis\.json is not of an analysis"),
        ("analysis.json", "[" * 10**5, "is not JSON that we read"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(JaxdynError, match=words):
            analysis.require_analysis(tmp_path)
        assert (tmp_path / name).read_text() == content
        (tmp_path / name).unlink()
    (tmp_path / "analysis.json").write_text(json.dumps({"format": analysis.FORMAT}))
    analysis.require_analysis(tmp_path)


@pytest.mark.parametrize("command", ["report", "check", "export", "analyze", "evaluate"])
def test_a_run_in_a_bucket_that_cannot_be_asked(command, tmp_path, monkeypatch, capsys):
    missing = lambda *_, **__: __import__("gcsfs_is_not_here")
    backend = type("Missing", (), dict.fromkeys(("isdir", "exists", "makedirs", "open"), missing))
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", backend())
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    output = {"export": [str(tmp_path / "out")], "report": ["--output", str(tmp_path / "out")]}
    with pytest.raises(SystemExit) as stop:
        main([command, "gs://b/run", *output.get(command, [])])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert said.startswith("jaxdyn: gs://b/run needs the package gcsfs: pip install gcsfs")
