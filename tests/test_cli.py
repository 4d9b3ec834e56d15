"""The commands as a user types them: what they do, and the one line they say when they cannot."""

import errno
import json
import resource
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import tiny_runs

from jaxdyn.cli import COMMANDS, main
from jaxdyn.grammar import save_config
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.types import JaxdynError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def config_file(root, tmp_path):
    """One step of the tiny RL run, as a file to give to --config."""
    changes = {"train__steps": 1, "optim__classifier_steps": 1, "evaluation__every": 0}
    config = tiny_runs.rl_config(root, str(tmp_path / "run"), **changes)
    save_config(config, tmp_path / "given.json")
    return str(tmp_path / "given.json")


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run a command that must end with exit code 2 and one line on standard error; the line."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        said = capsys.readouterr()
        assert stop.value.code == 2, said.err
        complaint = said.err.rstrip("\n").split("\n")[-1]
        assert complaint.startswith("jaxdyn: ") and "Traceback" not in said.err
        assert said.err.count("jaxdyn: ") == 1
        return complaint

    return run


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments, capsys):
    main(arguments)
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    "command, options",
    {
        "quickstart": "--output --seed",
        "sft": "--preset --config --train.steps --evaluation.every --train.target-reward",
        "rl": "--preset --config --optim.schedule --loss.beta --probe.every",
        "reward": "--preset --config --train.max-length --data.name --evaluation.num-prompts",
        "reward score": "MODEL FILE --output --prompt-template --overlong --mesh.fsdp",
        "evaluate": "[RUN] --model --preset --temperatures --pass-at --success-threshold",
        "analyze": "RUN --output",
        "kernel": "--prompts --quantity --by-part --preconditioned --memory-budget",
        "sketch": "--prompts --quantity --replicates --side --sites-per-completion --memory-budget",
        "influence": "[RUN] --step --sites --by-token --model --completions --from-sketch --top",
        "ledger": "CHECKPOINT --prompts --sample --through --by-layer --by-token --tolerance",
        "presets": "--json",
        "plan": "PRESET --topology --mesh.fsdp --meshes --num-prompts --remat --no-largest",
        "report": "RUN --output",
        "check": "RUN",
        "export": "RUN OUTPUT --step",
    }.items(),
)
def test_every_command_has_help(command, options, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    said = capsys.readouterr()
    assert stop.value.code in (0, None) and said.err == ""
    assert f"usage: jaxdyn {command}" in said.out
    assert set(options.split()) <= set(said.out.replace(",", " ").split())


def test_the_help_of_every_command_is_tried():
    (tried,) = (m for m in test_every_command_has_help.pytestmark if m.name == "parametrize")
    assert dict(tried.args[1]).keys() == COMMANDS.keys()


# -- what cannot be understood --------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["repport"], "unknown command 'repport'; did you mean 'report'?"),
        (["rl", "--preset", "nonesuch"], "unknown preset 'nonesuch'"),
        (["rl", "--preset"], "--preset needs a value"),
        (["rl", "--preset", "a", "--config", "b"], "give --preset or --config, not both"),
        (["rl", "--config", "/nowhere/config.json"], "no such configuration file"),
        (["rl", "--optim.learning-rat", "1"], "did you mean '--optim.learning-rate'?"),
        (["rl", "--train.steps", "many"], "many"),
        (["rl", "--optim.schedule", "both"], "both"),
        (["rl", "--train.num-prompts", "0"], "train.num_prompts must be at least 1, got 0"),
        (["rl", "--sampling.top-p", "1.5"], "sampling.top_p must lie in (0, 1], got 1.5"),
        (["rl", "--seed", "-1"], "seed"),
        (["sft", "--seed", "-1"], "seed"),
        (["rl"], "model.path names no model: give --model.path"),
        (["rl", "--output", "a\0b"], "an argument cannot have a NUL in it"),
        (["report", "\ud800"], "an argument must be valid Unicode"),
        (
            ["plan", "tiny", "--num-prompts", "1000000", "--num-generations", "10000"],
            "at most 2147",
        ),
        (["sft", "--train.num-prompts", "0"], "train.num_prompts must be at least 1, got 0"),
        (["analyze"], "RUN"),
        (["report"], "at least one run directory"),
        (["analyze", "/nowhere"], "/nowhere holds no run"),
        (["export", "/nowhere", "/nowhere/out"], "/nowhere holds no run"),
    ],
)
def test_what_cannot_be_understood_is_said_in_a_line(arguments, words, refused):
    assert words in refused(*arguments)


def test_a_configurations_unknown_field_is_named(tmp_path, refused):
    (tmp_path / "c.json").write_text('{"optim": {"learning_rte": 1e-3}}')
    line = refused("rl", "--config", str(tmp_path / "c.json"))
    assert "unknown field 'learning_rte'; did you mean 'learning_rate'?" in line


# -- what does not fit together -------------------------------------------------------------------


def damaged(root, tmp_path, how):
    """A copy of the tiny model with something wrong."""
    directory = tmp_path / "damaged"
    tiny_runs.make_model(directory)
    weights = directory / "model.safetensors"
    if how == "empty":
        weights.write_bytes(b"")
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "without weights":
        weights.unlink()
    elif how == "without config.json":
        (directory / "config.json").unlink()
    elif how == "without a tokenizer":
        (directory / "tokenizer.json").unlink()
    elif how == "of another vocabulary":
        path = directory / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 1}))
    return str(directory)


@pytest.mark.parametrize(
    "how, words",
    [
        ("empty", "model.safetensors is not a whole safetensors file"),
        ("cut short", "model.safetensors is not a whole safetensors file"),
        ("without weights", "has neither model.safetensors nor"),
        ("without config.json", "config.json"),
        ("without a tokenizer", "no tokenizer.json in"),
        ("of another vocabulary", "has shape [18, 16], wanted [17, 16]"),
    ],
)
def test_damaged_checkpoints(how, words, root, config_file, tmp_path, refused):
    line = refused("rl", "--config", config_file, "--model.path", damaged(root, tmp_path, how))
    assert words in line
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_models_vocabulary(config_file, tmp_path, refused):
    directory = tmp_path / "small"
    tiny_runs.make_model(directory, vocab_size=9)
    line = refused("rl", "--config", config_file, "--model.path", str(directory))
    assert "has 18 tokens, more than the model's vocabulary of 9" in line


def test_a_stop_token_outside_the_vocabulary(config_file, tmp_path, refused):
    directory = Path(tiny_runs.make_model(tmp_path / "stops"))
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 99}))
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "pad_token"}))
    line = refused("rl", "--config", config_file, "--model.path", str(directory))
    assert "99" in line and "vocabulary of 18" in line


def test_a_tied_model_has_no_classifier_of_its_own(root, config_file, refused):
    tied = tiny_runs.parts(root, tied=True)["model"].path
    arguments = ["--model.path", tied, "--optim.schedule", "classifier_first"]
    assert "set model.untie" in refused("rl", "--config", config_file, *arguments)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is empty"),
        ('{"prompt": "1="}\n{"prompt": \n', "line 2 is not JSON"),
        ('{"prompt": "1="}\n\n[1]\n', "line 3 should hold a JSON object"),
        ('{"prompt": "1="}\n{"question": "2="}\n', "line 2 has no field 'prompt'"),
        ('{"prompt": "1="}\n{"prompt": ""}\n', "line 2: 'prompt' should be a non-empty text"),
    ],
)
def test_prompt_files(text, words, config_file, tmp_path, refused):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    arguments = ["--data.path", str(path), "--data.completion-field", "None"]
    line = refused("rl", "--config", config_file, *arguments)
    assert words in line and str(path) in line


def test_prompts_that_do_not_fit(config_file, tmp_path, refused):
    line = refused("rl", "--config", config_file, "--train.max-prompt-length", "27")
    assert "27) + sampling.max_completion_length (6) = 33 exceeds the model's context of 32" in line
    long = tmp_path / "long.jsonl"
    short = '{"prompt": "12=", "completion": "a"}\n'
    long.write_text(19 * short + '{"prompt": "123456789=", "completion": "a"}\n')
    never = tmp_path / "never"
    arguments = ["--data.path", str(long), "--output", str(never)]
    line = refused("rl", "--config", config_file, *arguments)
    assert "'123456789='" in line and "11 tokens, max_prompt_length is 8" in line
    assert not never.exists()
    missing = refused("rl", "--config", config_file, "--data.path", str(tmp_path / "none.jsonl"))
    assert "none.jsonl" in missing


def test_supervised_training_needs_completions(root, tmp_path, refused):
    config = tiny_runs.sft_config(root, str(tmp_path / "sft"))
    config = tiny_runs.replaced(config, {"data__completion_field": None})
    (tmp_path / "plain.jsonl").write_text('{"prompt": "1="}\n{"prompt": "2="}\n')
    save_config(config, tmp_path / "c.json")
    arguments = ["--data.path", str(tmp_path / "plain.jsonl")]
    assert "supervised training needs" in refused(
        "sft", "--config", str(tmp_path / "c.json"), *arguments
    )


REWARDS = """
def raises(prompts, completions, **columns):
    raise KeyError("no such thing")

def short(prompts, completions, **columns):
    return [1.0]

def infinite(prompts, completions, **columns):
    return [float("inf")] * len(prompts)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("raises", "reward 'raises' failed for example 0"),
        ("short", "reward 'short' returned 1 values for 3 completions"),
        ("infinite", "reward 'infinite' returned inf for example 0"),
        ("absent", "cannot import the reward 'failing_rewards:absent'"),
    ],
)
def test_rewards_that_fail(name, words, config_file, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("failing_rewards.py").write_text(REWARDS)
    arguments = ["--reward.functions", f"failing_rewards:{name}"]
    assert words in refused("rl", "--config", config_file, *arguments)


# -- what cannot be written -----------------------------------------------------------------------


def test_an_output_that_cannot_be_made(config_file, tmp_path, refused):
    (tmp_path / "file").write_text("")
    line = refused("rl", "--config", config_file, "--output", str(tmp_path / "file" / "run"))
    assert str(tmp_path / "file") in line


@pytest.mark.slow
def test_a_full_disk(config_file, refused, monkeypatch):
    def log(self, name, *records):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path / name))

    monkeypatch.setattr(RunDirectory, "log", log)
    line = refused("rl", "--config", config_file)
    assert "No space left on device" in line and "jsonl" in line


def test_a_checkpoint_that_does_not_fit_the_disk_leaves_the_earlier_ones(tmp_path):
    """A limit on the size of files stands for a full disk: the write fails with an OSError."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    rng = np.random.default_rng(0)
    checkpoints.save(1, {"x": rng.standard_normal(4)}, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(JaxdynError, match=f"cannot save step 2 in {tmp_path}") as caught:
            checkpoints.save(2, {"x": rng.standard_normal(100_000)}, {"step": 2})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.steps() == [1] and again.position(1) == {"step": 1}


# -- what it does ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_repeats_exactly_from_its_own_configuration(config_file, tmp_path, capsys, refused):
    main(["rl", "--config", config_file, "--optim.schedule", "classifier_first"])
    first = tmp_path / "run"
    assert f"run: {first}" in capsys.readouterr().out
    second = tmp_path / "again"
    main(["rl", "--config", str(first / "config.json"), "--output", str(second)])
    for name in ("metrics.jsonl", "dynamics.jsonl", "samples.jsonl", "completions.jsonl"):
        got, expected = (tiny_runs.lines(run, name) for run in (first, second))
        assert tiny_runs.without_times(got) == tiny_runs.without_times(expected)
    assert len(tiny_runs.lines(first, "metrics.jsonl")) == 3

    # Another run has no place here, and leaves what is there as it was.
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    line = refused("rl", "--config", config_file, "--seed", "5")
    assert f"{first} already holds another run (seed: 0 there, 5 here; optim.schedule" in line
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before

    main(["analyze", str(first)])
    assert (first / "analysis" / "dynamics.jsonl").exists()
    main(["export", str(first), str(tmp_path / "model")])
    assert (tmp_path / "model" / "model.safetensors").exists()

    # A checkpoint cut short afterwards is named, not half restored.
    for path in (first / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert "cannot restore step 2" in refused("analyze", str(first))


@pytest.mark.slow
def test_sft_then_rl(root, tmp_path, capsys, config_file):
    config = tiny_runs.sft_config(root, str(tmp_path / "sft"), train__steps=1)
    save_config(config, tmp_path / "sft.json")
    main(["sft", "--config", str(tmp_path / "sft.json")])
    model = tmp_path / "sft" / "model"
    assert f"model: {model}" in capsys.readouterr().out
    main(["rl", "--config", config_file, "--model.path", str(model)])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["path"] == str(model)
