"""The whole report of synthetic runs: its tables hold the right numbers, its page stands alone."""

import base64
import csv
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from html import unescape

import numpy as np
import pytest
from synthetic import bare_run, reward, solved, write_lines, write_run

from jaxdyn.errors import JaxdynError
from jaxdyn.report import load_run, load_runs, summary, write_report
from jaxdyn.report.figures import confidence, distance
from jaxdyn.report.figures import reward as reward_figure
from jaxdyn.report.page import EXHIBITS, PAPER
from jaxdyn.report.plotting import running_mean
from jaxdyn.report.preference_figures import preferences
from jaxdyn.report.sampling_figures import sampling
from jaxdyn.report.update_figures import correlation, features, prediction, shares

FIGURES = {"reward", "confidence", "sampling", "prediction", "shares", "ledger", "features"}
FIGURES |= {"distance"}
STEPS = {"joint": 40, "classifier_first": 40, "joint_extra": 50}


def moved(schedule, step):
    """The synthetic runs' clock: a classifier stage of 15 steps runs at a fifth of the speed."""
    return step - 0.8 * min(step, 15) if schedule == "classifier_first" else step


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    plan = [("joint", 0), ("joint", 1), ("classifier_first", 0), ("classifier_first", 1)]
    plan.append(("joint_extra", 0))
    return [write_run(root / f"{s}-{seed}", s, seed, STEPS[s]) for s, seed in plan]


@pytest.fixture(scope="module")
def page(directories):
    return write_report(directories)


@pytest.fixture(scope="module")
def runs(directories):
    return load_runs(directories)


def read(page, name):
    with (page.parent / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_default_place_is_the_common_parent(page, directories):
    assert page == directories[0].parent / "report" / "report.html"


def test_page_embeds_every_figure_and_needs_nothing_else(page):
    text = page.read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    written = {path.stem: path.read_bytes() for path in (page.parent / "figures").glob("*.png")}
    assert set(written) == FIGURES
    assert {base64.b64decode(data) for data in embedded} == set(written.values())
    addresses = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'>\s]+)', text)
    outside = {a for a in addresses if not a.startswith(("data:image/png", "tables/"))}
    assert outside == {PAPER}
    for address in addresses:
        assert not address.startswith("tables/") or (page.parent / address).is_file()
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert not re.search(r"<[^>]+\sstyle=|<[^>]+\son\w+=", text)
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text) == [
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    ]


def test_each_figure_has_one_sentence_each(runs):
    # A reward model's run has another log.
    line = {"step": 0, "accuracy": 0.5}
    scored = dataclasses.replace(runs[0], config={"kind": "reward"}, metrics=[line])
    for draw in EXHIBITS:
        exhibit = draw([scored] if draw is preferences else runs)
        for sentence in (exhibit.shows, exhibit.expects):
            assert sentence.endswith(".") and not re.search(r"[.!?]\s", sentence), sentence


def test_reward_table_holds_the_logged_values_their_mean_and_the_running_mean(page):
    rows = read(page, "reward")
    runs = [r for r in rows if r["quantity"] == "reward" and not r["run"].startswith("mean")]
    assert len(runs) == 2 * 40 + 2 * 40 + 50
    for row in runs:
        clock = moved(row["schedule"], int(row["step"]))
        assert float(row["value"]) == pytest.approx(reward(clock, int(row["seed"])), rel=1e-12)
    means = [r for r in rows if r["run"] == "mean" and r["schedule"] == "joint"]
    expected = [(reward(t, 0) + reward(t, 1)) / 2 for t in range(40)]
    assert [float(r["value"]) for r in means] == pytest.approx(expected, rel=1e-12)
    smoothed = [r for r in rows if r["run"] == "mean, smoothed" and r["schedule"] == "joint"]
    inner = [(expected[t - 1] + expected[t] + expected[t + 1]) / 3 for t in range(1, 39)]
    assert [float(r["value"]) for r in smoothed] == pytest.approx(
        [expected[0], *inner, expected[39]], rel=1e-12
    )
    evaluated = {
        int(r["step"]): float(r["value"])
        for r in rows
        if (r["quantity"], r["run"]) == ("eval_reward", "joint-1")
    }
    assert sorted(evaluated) == [-1, 0, 20, 39]
    assert evaluated[39] == pytest.approx(reward(39, 1) - 0.05, rel=1e-12)


def test_prediction_table_and_correlations_come_from_the_probe_files(page, directories, runs):
    rows = read(page, "prediction")
    assert {int(r["step"]) for r in rows if r["run"] == "joint-0"} == {0, 20, 30}
    assert {r["stage"] for r in rows if r["schedule"] == "classifier_first"} == {"1", "2"}
    points = {"x": [], "y": []}
    for directory in directories[:2]:
        for step in (0, 20, 30):
            with np.load(directory / "dynamics" / f"step_{step:06d}.npz") as arrays:
                total = arrays["representation"] + arrays["gradient"] + arrays["cross"]
                points["x"].append(total)
                points["y"].append(arrays["actual"])
    mine = [r for r in rows if r["schedule"] == "joint"]
    x, y = (np.concatenate(points[k]) for k in "xy")
    np.testing.assert_allclose([float(r["predicted"]) for r in mine], x, rtol=1e-12)
    np.testing.assert_allclose([float(r["actual"]) for r in mine], y, rtol=1e-12)
    title = prediction(runs).figure.axes[0].get_title("left")
    center = prediction(runs).figure.axes[0].get_title()
    assert f"r = {np.corrcoef(x, y)[0, 1]:.3f}" in title + center


def test_cosine_table_is_the_histogram_of_pairs_before_and_after(page, directories):
    rows = [r for r in read(page, "cosines") if r["place"] == "completion"]
    edges = np.linspace(-1, 1, 41)

    def expected(chosen, step):
        pairs = []
        for directory in chosen:
            with np.load(directory / "dynamics" / f"step_{step:06d}.npz") as arrays:
                matrix = arrays["cosines_completion"]
            pairs += [matrix[i, j] for i in range(32) for j in range(i + 1, 32)]
        assert len(pairs) == len(chosen) * 32 * 31 // 2
        return np.histogram(pairs, edges)[0] / len(pairs)

    for when, schedule, chosen, step in (
        ("before", "", directories, -1),
        ("after", "joint", directories[:2], 30),
        ("after", "joint_extra", directories[4:], 40),
    ):
        mine = [r for r in rows if (r["when"], r["schedule"]) == (when, schedule)]
        assert {int(r["runs"]) for r in mine} == {len(chosen)}
        np.testing.assert_allclose(
            [float(r["share"]) for r in mine], expected(chosen, step), atol=1e-12
        )


def test_summary_numbers(page, directories):
    rows = {(r["quantity"], r["schedule"]): r for r in read(page, "summary")}

    def value(quantity, schedule, column):
        return float(rows[quantity, schedule][column])

    final = [reward(39, seed) - 0.05 for seed in (0, 1)]
    assert value("eval_reward", "joint", "before_mean") == pytest.approx(0.155, rel=1e-12)
    assert value("eval_reward", "joint", "after_mean") == pytest.approx(np.mean(final), rel=1e-12)
    assert value("eval_reward", "joint", "after_sd") == pytest.approx(
        abs(final[1] - final[0]) / 2**0.5, rel=1e-9
    )
    # A task metric is found by its prefix, and its interval's ends are no metrics.
    assert value("eval_metrics/accuracy", "joint", "after_mean") == pytest.approx(0.3 + 0.002 * 39)
    assert not any("_ci_" in quantity for quantity, _ in rows)
    # The first and the last tenth of 40 steps; entropy is 2 - 0.015 t whatever the seed.
    assert value("entropy", "joint", "before_mean") == pytest.approx(2 - 0.015 * 1.5, rel=1e-12)
    assert value("entropy", "joint", "after_mean") == pytest.approx(2 - 0.015 * 37.5, rel=1e-12)
    # Fixed sites: before training, and at the last probe (step 30).
    key = "probe/confidence/completion"
    assert value(key, "classifier_first", "before_mean") == 0.5
    assert value(key, "classifier_first", "after_mean") == pytest.approx(0.5 + 0.002 * 18)
    # Shares count the updates of all parameters: steps 20 and 30 of CF-RL, not 0 and 10.
    expected = []
    for directory in directories[2:4]:
        for step in (20, 30):
            with np.load(directory / "dynamics" / f"step_{step:06d}.npz") as arrays:
                part, total = (
                    arrays["representation"],
                    arrays["representation"] + arrays["gradient"],
                )
            expected.append(part @ total / (total @ total))
    assert value("share/representation", "classifier_first", "after_mean") == pytest.approx(
        np.mean(expected), rel=1e-9
    )
    assert rows["eval_reward", "joint_extra"]["after_sd"] == ""  # one seed has no deviation


def test_page_shows_the_summary_and_states_differences_at_equal_seeds(page, runs):
    text = unescape(page.read_text())
    gaps = [reward(moved("classifier_first", 39), s) - reward(39, s) for s in (0, 1)]
    mean, deviation, pairs = summary.paired_difference(runs, "classifier_first", "joint")
    assert (mean, pairs) == (pytest.approx(np.mean(gaps), rel=1e-9), 2)
    assert deviation == pytest.approx(np.std(gaps, ddof=1), abs=1e-12)
    assert f"CF-RL's reward ended {-mean:.3f} below that of standard RL" in text
    after = np.mean([reward(39, seed) - 0.05 for seed in (0, 1)])
    assert f"0.155 ± 0.007 → {after:.3f} ± 0.007" in text
    assert "2 (0, 1)" in text
    assert "<td>joint_extra-0</td><td>joint_extra</td><td>0</td><td>50</td><td>5</td>" in text


def test_samples_stand_side_by_side_escaped(page):
    text = page.read_text()
    table = text[text.index('<table class="samples">') :].split("</table>")[0]
    assert table.count("<tr>") == 1 + 6
    assert "After CF-RL (seed 0, step 39)" in table
    assert "&lt;script&gt;alert(1)" in table and "&lt;b&gt;tree&lt;/b&gt; &amp; pond" in table
    rows = read(page, "samples")
    assert len(rows) == 6 * 4 * 2  # prompts, columns, completions
    assert {r["prompt_index"] for r in rows} == {"0", "1", "3", "4", "6", "7"}
    assert {r["step"] for r in rows if r["when"] == "before"} == {"-1"}
    first = [r for r in rows if r["prompt_index"] == "3" and r["when"] == "before"]
    assert [float(r["reward"]) for r in first] == [0.75, 0.75]


def test_sampling_table_holds_the_ends_of_every_run_and_their_means(page):
    rows = read(page, "sampling")
    mine = [r for r in rows if r["quantity"] == "best_of" and r["run"] == "joint-1"]
    # Its start is that of CF-RL with its seed, and counted once.
    assert {(r["when"], r["step"]) for r in mine} == {("after", "39")}
    for row in mine:
        value = solved(39, int(float(row["at"])), 1)
        found = [float(row[name]) for name in ("value", "low", "high")]
        assert found == pytest.approx([value, value - 0.1, value + 0.1], rel=1e-12)
    before = [r for r in rows if (r["quantity"], r["when"]) == ("pass", "before")]
    assert {r["run"] for r in before} == {"classifier_first-0", "classifier_first-1", "mean"}
    means = {float(r["at"]): float(r["value"]) for r in before if r["run"] == "mean"}
    expected = {k: (solved(0, k, 0) + solved(0, k, 1)) / 2 for k in (1.0, 2.0, 4.0)}
    assert means == pytest.approx(expected, rel=1e-12)
    gains = [r for r in rows if r["quantity"] == "best_of, gain" and r["run"] == "joint-0"]
    assert {float(r["at"]): float(r["value"]) for r in gains} == pytest.approx(
        {k: solved(39, k, 0) - solved(0, k, 0) for k in (1.0, 2.0, 4.0)}, rel=1e-12
    )
    assert {r["low"] for r in gains} == {""}


def test_sweeps_are_tabulated_by_temperature(page):
    rows = [r for r in read(page, "sampling") if "by temperature" in r["quantity"]]
    hot = [r for r in rows if (r["run"], r["when"]) == ("joint-1", "after")]
    found = {(r["quantity"].split(" ")[0], float(r["at"])): float(r["value"]) for r in hot}
    expected = {("reward", t): reward(39, 1) - 0.1 * t for t in (0.0, 0.5, 1.0)}
    expected |= {("diversity/unique", t): 0.25 + 0.6 * t / 1.78 for t in (0.0, 0.5, 1.0)}
    expected |= {("entropy", t): 1.5 * t for t in (0.5, 1.0)}  # greedy has none
    assert found == pytest.approx(expected, rel=1e-12)


def test_samples_by_temperature_are_the_same_prompts_at_each(page):
    rows = read(page, "samples_by_temperature")
    assert len(rows) == 2 * 3 * 4 * 2  # prompts, temperatures, columns, completions
    assert {r["prompt_index"] for r in rows} == {"0", "1"}
    for row in rows:
        start = f"at {float(row['temperature']):g} number {row['prompt_index']}."
        assert row["completion"].startswith(start)
        assert row["completion"].endswith(f"step {row['step']}")
    text = page.read_text()
    table = text[text.index('id="samples_by_temperature"') :]
    assert table.count('rowspan="3"') == 2 and "<td>0 (greedy)</td>" in table
    assert "&lt;i&gt;of&lt;/i&gt;" in table


def test_sampling_without_sweeps_intervals_or_a_start(tmp_path):
    directory = bare_run(tmp_path / "a")
    write_lines(directory / "metrics.jsonl", [{"step": 3, "eval_pass@1": 0.5, "eval_pass@2": None}])
    exhibit = sampling([load_run(directory)])
    assert len(exhibit.figure.axes) == 3
    (row,) = exhibit.tables["sampling"].rows
    assert row == ("pass", "after", "joint", 0, "a", 3, 1.0, 0.5, None, None)
    broken = [{"step": -1, "temperature": 1.0, "samples": [3]}, {"step": 2, "temperature": "hot"}]
    write_lines(directory / "temperatures.jsonl", broken)
    page = write_report([directory]).read_text()
    assert "samples_by_temperature" not in page and 'id="sampling"' in page


def test_the_classifier_stage_is_shaded_in_steps_and_in_seconds(runs):
    steps, seconds = reward_figure(runs).figure.axes
    for axes, end in ((steps, 14.5), (seconds, 0.5 * 15 * 0.6 + 3.5)):
        (span,) = axes.patches
        assert span.get_extents().x1 == pytest.approx(
            axes.transData.transform((end, 0))[0], rel=1e-9
        )
    joint = [run for run in runs if run.schedule == "joint"]
    assert all(not axes.patches for axes in reward_figure(joint).figure.axes)


def test_the_mean_never_jumps_where_one_run_ends(tmp_path):
    lengths = (6, 4)
    for seed, length in enumerate(lengths):
        directory = bare_run(tmp_path / str(seed), seed=seed)
        lines = [{"step": t, "kl": 10.0 * seed + t} for t in range(length)]
        write_lines(directory / "metrics.jsonl", lines)
    exhibit = distance(load_runs([tmp_path / "0", tmp_path / "1"]))
    means = [row for row in exhibit.tables["distance"].rows if row[3] == "mean"]
    assert [row[4:] for row in means] == [(t, 5.0 + t) for t in range(4)]


def test_a_cross_component_gets_its_own_panels(tmp_path):
    run = load_run(write_run(tmp_path / "tied", steps=21, cross=0.5))
    assert len(prediction([run]).figure.axes) == 4 and len(shares([run]).figure.axes) == 8
    untied = load_run(write_run(tmp_path / "untied", steps=21))
    assert len(prediction([untied]).figure.axes) == 3 and len(shares([untied]).figure.axes) == 6


def test_a_reward_models_run_shows_accuracy_and_calibration(tmp_path):
    directory = bare_run(tmp_path / "a", schedule="joint")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "kind": "reward"}))
    ends = {"eval_accuracy_ci_low": 0.4, "eval_accuracy_ci_high": 0.7, "eval_length_accuracy": 0.55}
    before = {"step": -1, "eval_accuracy": 0.5, "eval_nll": 0.69, "eval_ece": 0.0, **ends}
    steps = [{"step": i, "accuracy": 0.5 + i / 10, "loss": 0.7 - i / 10} for i in range(3)]
    steps[-1] |= {"eval_accuracy": 0.6, "eval_nll": 0.5, "eval_ece": 0.125, **ends}
    write_lines(directory / "metrics.jsonl", [before, *steps])
    one = {"low": 0.5, "high": 0.55, "pairs": 40, "confidence": 0.52, "accuracy": 0.6}
    lines = [{"step": -1, "bins": [one]}, {"step": 2, "bins": [one, {"pairs": "many"}, 3]}]
    write_lines(directory / "calibration.jsonl", lines)
    page = write_report([directory], tmp_path / "page")
    rows = read(page, "preferences")
    of = lambda key: [float(r["value"]) for r in rows if r["quantity"] == key and r["seed"]]
    assert of("accuracy") == [0.5, 0.6, 0.7] and of("eval_accuracy") == [0.5, 0.6]
    assert of("eval_length_accuracy") == [0.55, 0.55] and of("eval_nll") == [0.69, 0.5]
    bins = [(r["when"], r["pairs"], r["accuracy"]) for r in read(page, "calibration")]
    assert bins == [("before", "40", "0.6"), ("after", "40", "0.6")]
    summary = {r["quantity"]: (r["before"], r["after"]) for r in read(page, "summary_by_run")}
    assert summary["eval_accuracy"] == ("0.5", "0.6") and summary["eval_ece"] == ("0.0", "0.125")


def test_a_run_without_anything_logged_still_gets_a_page(tmp_path):
    page = write_report([bare_run(tmp_path / "a", schedule="made $up")])
    assert page == tmp_path / "a" / "report" / "report.html"
    assert "<img" not in page.read_text() and "made $up" in page.read_text()


def test_one_step_with_missing_and_undefined_numbers(tmp_path):
    directory = bare_run(tmp_path / "a", schedule="made $up$ name")
    record = {"step": 0, "reward": 0.25, "entropy": float("nan"), "eval_reward": None}
    write_lines(directory / "metrics.jsonl", [record])
    (directory / "dynamics").mkdir()
    ones = np.ones(3)
    arrays = {"representation": 0 * ones, "gradient": 0 * ones, "actual": 0 * ones}
    np.savez(directory / "dynamics" / "step_000000.npz", **arrays, cosines_prompt=np.eye(1))
    write_lines(directory / "samples.jsonl", [{"step": 0, "prompt": "p\ud800\x00"}, {"step": 0}])
    page = write_report([directory], tmp_path / "elsewhere")
    assert {p.stem for p in (tmp_path / "elsewhere" / "figures").iterdir()} == {
        "reward",
        "prediction",
    }
    assert "<i>(empty)</i>" in page.read_text()
    assert [r["after_mean"] for r in read(page, "summary")] == ["0.25"]
    assert confidence([load_run(directory)]) is None and features([load_run(directory)]) is None


def test_sites_that_are_not_finite_are_left_out(tmp_path):
    directory = bare_run(tmp_path / "a")
    (directory / "dynamics").mkdir()
    arrays = {
        "representation": np.array([0.1, 0.2, np.nan, 0.4]),
        "gradient": np.array([0.1, 0.1, 0.1, 0.1]),
        "actual": np.array([0.3, np.inf, 0.1, 0.2]),
    }
    np.savez(directory / "dynamics" / "step_000005.npz", **arrays)
    rows = prediction([load_run(directory)]).tables["prediction"].rows
    assert [(row[6], row[-1]) for row in rows] == [(0.2, 0.3), (0.5, 0.2)]


def test_a_report_that_cannot_be_written_says_so_in_one_line(tmp_path):
    run = bare_run(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxdynError, match=r"cannot write to .*file/report \(.*/file\)") as caught:
        write_report([run], tmp_path / "file" / "report")
    assert "\n" not in str(caught.value)


def test_importing_the_room_loads_no_jax_and_no_matplotlib():
    code = (
        "import sys, jaxdyn.report; light = {'jax', 'matplotlib'} & set(sys.modules);"
        "import jaxdyn.report.page; print(light, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "False"]


def test_running_mean_and_correlation_against_plain_sums():
    rng = np.random.default_rng(0)
    values = rng.normal(size=100)
    expected = []
    for i in range(100):
        reach = min(2, i, 99 - i)  # 100 points: a twentieth is five
        expected.append(sum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
    np.testing.assert_allclose(running_mean(values), expected, rtol=0, atol=1e-14)
    other = values + rng.normal(size=100)
    assert correlation(values, other) == pytest.approx(np.corrcoef(values, other)[0, 1], rel=1e-12)
    assert np.isnan(correlation(values, np.ones(100)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.1234, "0.123"), (0.0, "0.000"), (12.345, "12.35"), (123.45, "123.5")),
        *((12345.6, "12,346"), (0.00123, "0.0012"), (-0.5, "-0.500"), (3e-9, "0.000000")),
    ],
)
def test_numbers_are_written_plainly(value, text):
    assert summary.number(value) == text
