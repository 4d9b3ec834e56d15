"""The trace of chosen steps: what is in it, and choices that cannot be."""

import collections
import dataclasses
import gzip
import json

import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.train import profile, run_rl, run_sft

SHORT = {"train__steps": 2, "train__checkpoint_every": 2, "evaluation__every": 0}


def only(directory, pattern):
    (found,) = directory.glob(f"plugins/profile/*/{pattern}")
    return found


def spans(directory):
    """The host's spans by name, (from, to) in microseconds, in order."""
    events = json.loads(gzip.decompress(only(directory, "*.trace.json.gz").read_bytes()))
    found = collections.defaultdict(list)
    for event in events["traceEvents"]:
        if event.get("ph") == "X":
            found[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    return {name: sorted(times) for name, times in found.items()}


def scopes(directory, *names):
    """Those of the names that are scopes of operations, `jit(PROGRAM)/SCOPE/...`."""
    written = only(directory, "*.xplane.pb").read_bytes()
    return [name for name in names if f")/{name}/".encode() in written]


@pytest.mark.slow
def test_the_trace_of_an_rl_step_names_its_parts(root):
    changes = {**SHORT, "loss__beta": 0.1, "profile": (1,)}
    run = run_rl(tiny_runs.rl_config(root, "profiled", **changes))
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "step_000001"
    parts = ["rollout", "reference", "update", "probe", "ledger"]
    assert scopes(trace, *parts) == parts
    found = spans(trace)
    (step,) = found["step"]
    one_after_another = [found[name][0] for name in parts]
    times = [step[0], *(time for span in one_after_another for time in span), step[1]]
    assert times == sorted(times)
    (evaluation,) = found["evaluation"]  # the last step's
    assert evaluation[0] > times[-2] and evaluation[1] < step[1]
    # What Python calls is left out.
    assert not any(name.startswith("$") for name in found)


@pytest.mark.slow
def test_of_a_supervised_step_and_none_without_a_choice(root):
    config = tiny_runs.sft_config(root, "sft-profiled", **SHORT)
    directory = root / "sft-profiled"
    run_sft(config)
    assert not (directory / "profile").exists()
    # The same command with another choice is the same run; this one has no step left.
    run_sft(dataclasses.replace(config, profile=(1,)))
    assert not (directory / "profile").exists()
    run_sft(dataclasses.replace(config, output=str(root / "sft-again"), profile=(0, 1)))
    traces = sorted((root / "sft-again/profile").iterdir())
    assert [trace.name for trace in traces] == ["step_000000", "step_000001"]
    for trace in traces:
        assert scopes(trace, "update", "rollout", "probe")[0] == "update"
        assert spans(trace)["update"]


def test_a_step_that_is_taken_again_replaces_its_trace(tmp_path):
    for _ in range(2):
        for step in profile.profiled(range(3), (1, 2), tmp_path):
            if step == 2:
                break  # as where a run reaches its goal: the trace ends too
    assert only(tmp_path / "step_000001", "*.xplane.pb").stat().st_size
    assert only(tmp_path / "step_000002", "*.xplane.pb").stat().st_size


BAD = {
    "2": "profile must name steps of the run, 0 to 1, got 2",
    "-1": "profile must be at least 0, got -1",
    "1.5": "Error parsing --profile",
    "last": "Error parsing --profile",
}


@pytest.mark.parametrize("value", BAD)
def test_what_cannot_be_profiled_is_one_line(value, tmp_path, capsys):
    command = ["rl", "--output", str(tmp_path / "run"), "--train.steps", "2", "--profile", value]
    with pytest.raises(SystemExit) as stop:
        main(command)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and not (tmp_path / "run").exists()
    assert BAD[value] in said
