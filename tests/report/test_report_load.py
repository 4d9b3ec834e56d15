"""Reading run directories: what is there, what an abort leaves, what is wrong."""

import numpy as np
import pytest
from synthetic import bare_run, write_lines, write_run

from jaxdyn.errors import JaxdynError
from jaxdyn.report import load_run, load_runs


def test_a_run_is_read_whole(tmp_path):
    run = load_run(write_run(tmp_path / "a", "classifier_first", seed=3, steps=30))
    assert (run.schedule, run.seed, run.name) == ("classifier_first", 3, "a")
    assert (run.steps, run.probed, run.classifier_steps()) == (30, 3, 15)
    assert list(run.probe_files) == [-1, 0, 10, 20]
    assert run.in_classifier_stage(10) and not run.in_classifier_stage(20)
    assert run.series("confidence/max_prob")[29] == 0.45 + 0.004 * (29 - 12) + 0.006
    assert run.series("probe/kl/prompt")[-1] == 0.0
    assert run.probe(0)["actual"].shape == (48,)


def test_only_finite_numbers_enter_a_series_and_the_last_of_a_step_counts(tmp_path):
    directory = bare_run(tmp_path / "a")
    values = [1.0, float("nan"), None, "x", True, 2.0]
    lines = [{"step": t, "reward": v} for t, v in enumerate(values)]
    lines += [{"step": 6, "other": 1.0}, {"step": 0, "reward": 7.0}]
    write_lines(directory / "metrics.jsonl", lines)
    assert load_run(directory).series("reward") == {0: 7.0, 5: 2.0}
    assert load_run(directory).series("absent") == {}


def test_missing_files_count_as_empty(tmp_path):
    run = load_run(bare_run(tmp_path / "a"))
    assert (run.metrics, run.dynamics, run.samples, run.probe_files) == ([], [], [], {})
    assert run.classifier_steps() == 0


def test_what_a_kill_cuts_short_is_ignored(tmp_path):
    directory = write_run(tmp_path / "a", steps=21)
    for name in ("metrics.jsonl", "dynamics.jsonl", "samples.jsonl"):
        text = (directory / name).read_text()
        (directory / name).write_bytes(text.encode()[:-20] + "é".encode()[:1])
    last = directory / "dynamics" / "step_000020.npz"
    last.write_bytes(last.read_bytes()[:500])
    run = load_run(directory)
    assert run.steps == 20 and max(run.probe_files) == 10
    assert [record["step"] for record in run.dynamics] == [-1, 0, 10]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", r"should hold a JSON object, got \[\]"),
        ("metrics.jsonl", '{"step": 0}\n{"ste\n{"step": 2}\n', "metrics.jsonl, line 2 is not JSON"),
        ("dynamics.jsonl", '{"reward": 1}\n', 'line 1 must be an object with an integer "step"'),
        ("samples.jsonl", '{"step": 0}\n3\n', "samples.jsonl, line 2 must be an object"),
    ],
)
def test_malformed_files_are_named_in_one_line(tmp_path, file, text, message):
    directory = bare_run(tmp_path / "a")
    (directory / file).write_text(text)
    with pytest.raises(JaxdynError, match=message) as caught:
        load_run(directory)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(JaxdynError, match="is not a directory"):
        load_run(tmp_path / "absent")
    with pytest.raises(JaxdynError, match=r"is not a run: it has no config\.json"):
        load_run(tmp_path)
    with pytest.raises(JaxdynError, match="at least one run directory"):
        load_runs([])


def test_pickled_arrays_are_refused(tmp_path):
    directory = bare_run(tmp_path / "a")
    (directory / "dynamics").mkdir()
    evil = np.array([{"a": 1}], dtype=object)
    np.savez(directory / "dynamics" / "step_000000.npz", actual=evil)
    with pytest.raises(JaxdynError, match=r"step_000000\.npz is not a readable file of arrays"):
        load_run(directory).probe(0)


def test_runs_are_named_below_their_common_parent_and_never_twice(tmp_path):
    first = bare_run(tmp_path / "joint" / "s1", seed=1)
    second = bare_run(tmp_path / "cf" / "s1", "classifier_first")
    third = bare_run(tmp_path / "joint" / "s0", seed=0)
    runs = load_runs([first, second, third, first])
    assert [run.name for run in runs] == ["cf/s1", "joint/s0", "joint/s1"]
