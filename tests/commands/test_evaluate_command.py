"""`jaxdyn evaluate`: a run's own numbers again, a model's, and what it refuses."""

import json

import jaxtyping
import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.commands.evaluate import EvaluateOptions
from jaxdyn.grammar import save_config
from jaxdyn.train import export, run_rl
from jaxdyn.types import JaxdynError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps with a checkpoint after each."""
    root = tmp_path_factory.mktemp("evaluate")
    changes = {"train__steps": 2, "train__checkpoint_every": 1, "evaluation__every": 1}
    return run_rl(tiny_runs.rl_config(root, "run", **changes))


def logged(run, step):
    lines = {line["step"]: line for line in tiny_runs.lines(run, "metrics.jsonl")}
    return {k.removeprefix("eval_"): v for k, v in lines[step].items() if k.startswith("eval_")}


def read(path):
    return json.loads(path.read_text())


def measures(line):
    return {k: v for k, v in line.items() if k not in ("temperature", "samples")}


@pytest.mark.slow
def test_a_runs_checkpoints_give_the_logged_numbers(run, capsys):
    main(["evaluate", str(run)])
    said = capsys.readouterr().out
    found = read(run / "evaluation.json")
    assert found["step"] == 2 and found["run"] == str(run)
    (line,) = found["temperatures"]
    assert measures(line) == logged(run, 1)
    samples = [s for s in tiny_runs.lines(run, "samples.jsonl") if s["step"] == 1]
    assert [{"step": 1, **s} for s in line["samples"]] == samples
    value, low, high = (line[f"pass@2{end}"] for end in ("", "_ci_low", "_ci_high"))
    assert f"{value:.3f}  [{low:.3f}, {high:.3f}]" in said
    assert "run, step 2: 2 held-out prompts, 4 completions each" in said
    assert f"evaluation: {run / 'evaluation.json'}" in said

    main(["evaluate", str(run), "--step", "1"])
    (line,) = read(run / "evaluation-1.json")["temperatures"]
    assert measures(line) == logged(run, 0)


@pytest.mark.slow
def test_a_model_with_a_runs_settings_and_other_options(run, tmp_path, capsys):
    model = export(run, tmp_path / "model")
    options = ["--model", str(model), "--config", str(run), "--output", str(tmp_path / "a.json")]
    main(["evaluate", *options])
    (line,) = read(tmp_path / "a.json")["temperatures"]
    assert measures(line) == logged(run, 1)

    options[-1] = str(tmp_path / "b.json")
    more = ["--temperatures", "1.5", "0", "--num-generations", "3", "--num-prompts", "3"]
    main(["evaluate", *options, *more, "--metrics", "finished", "--seed", "7"])
    cold, hot = read(tmp_path / "b.json")["temperatures"]
    assert (cold["temperature"], hot["temperature"]) == (0, 1.5)
    assert cold["pass@3"] == cold["pass@1"] and "best_of@3" in hot and "best_of@4" not in hot
    assert len(hot["samples"]) == 9
    assert hot["metrics/finished"] == pytest.approx(
        sum(s["finished"] for s in hot["samples"]) / 9, rel=1e-12
    )
    said = capsys.readouterr().out
    assert "greedy" in said and "temperature 1.5" in said and "finished" in said


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "give a RUN or --model, got none"),
        ({"run": "a", "model": "b"}, "give a RUN or --model, not both"),
        ({"run": "a", "preset": "anagrams"}, "--preset goes with --model"),
        ({"run": "a", "untie": True}, "--untie goes with --model"),
        ({"model": "a", "preset": "b", "step": 3}, "--step is of a run: give RUN, not --model"),
        ({"model": "a"}, "--model needs --config or --preset, .*, got none"),
        ({"model": "a", "config": "b", "preset": "c"}, "not both"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(JaxdynError, match=words):
        EvaluateOptions(**options)


@pytest.fixture
def refused(capsys, monkeypatch):
    """The one line of a command that must end with exit code 2."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *arguments])
        said = capsys.readouterr()
        assert stop.value.code == 2 and "Traceback" not in said.err
        assert said.err.count("jaxdyn: ") == 1
        return said.err.rstrip("\n").split("\n")[-1]

    return run


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_said_in_a_line(run, tmp_path, refused):
    output = ["--output", str(tmp_path / "out.json")]
    assert "has checkpoints at steps [1, 2], not at 7" in refused(str(run), "--step", "7", *output)
    assert "evaluation.metrics: unknown reward 'acuracy'" in refused(
        str(run), "--metrics", "acuracy", *output
    )
    assert "evaluation.pass_at must lie between 1 and num_generations (4), got 9" in refused(
        str(run), "--pass-at", "9", *output
    )
    assert "holds no run" in refused(str(tmp_path), *output)
    assert "unknown preset 'nonesuch'" in refused("--model", "a", "--preset", "nonesuch", *output)
    (tmp_path / "out.json").write_text("mine")
    assert "out.json already exists; choose another --output" in refused(str(run), *output)
    assert (tmp_path / "out.json").read_text() == "mine"


def test_a_configuration_file_is_named_if_it_is_none(tmp_path, refused):
    save_config(tiny_runs.rl_config(tmp_path, "run", train__steps=1), tmp_path / "config.json")
    line = refused("--model", str(tmp_path / "nowhere"), "--config", str(tmp_path / "none.json"))
    assert "no such configuration file" in line
    line = refused("--model", str(tmp_path / "nowhere"), "--config", str(tmp_path / "config.json"))
    assert str(tmp_path / "nowhere") in line
