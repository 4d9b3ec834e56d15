"""What sampling more, or at another temperature, is worth; None if no run has the data."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxdyn.report.load import Record, Run, is_number
from jaxdyn.report.plotting import (
    Exhibit,
    Rows,
    Table,
    by_schedule,
    grid_of_panels,
    label,
    line_style,
    say_empty,
)

COLUMNS = ("quantity", "when", "schedule", "seed", "run", "step", "at", "value", "low", "high")
BEFORE = "#777777"
BAND = 0.16


class Point(NamedTuple):
    """A value at a number of samples or a temperature, with its interval's ends (or nan)."""

    value: float
    low: float
    high: float


Curve = dict[float, Point]
"""A run's points at one step, by their place on the x axis."""


def sampling(runs: Sequence[Run]) -> Exhibit | None:
    """Best-of-N and pass@k before and after; reward, diversity and entropy by temperature."""
    swept = [run for run in runs if run.temperatures]
    figure, axes = grid_of_panels(2 if swept else 1, 3, height=3.1)
    best, passed, gain = axes[0]
    rows = draw_curves(best, runs, "eval_best_of@")
    rows += draw_curves(passed, runs, "eval_pass@")
    rows += draw_curves(gain, runs, "eval_best_of@", gained=True)
    for cell, title, x, y in (
        (best, "Best of N", "N, samples of a prompt", "expected largest reward"),
        (passed, "pass@k", "k, samples of a prompt", "chance of a correct one"),
        (gain, "Best of N: gain over before", "N, samples of a prompt", "after − before"),
    ):
        cell.set(title=title, xlabel=x, ylabel=y)
    gain.axhline(0, color="#999999", linewidth=0.9, zorder=1)
    if swept:
        rows += draw_temperatures(axes[1], runs)
    if not rows:
        return None
    handles = [Line2D([], [], color=BEFORE, linewidth=2.2, label="before training")]
    handles += [
        Line2D([], [], linewidth=2.2, label=f"after {label(s)} (n = {len(g)})", **line_style(s))
        for s, g in by_schedule(runs).items()
    ]
    band = Patch(color=BEFORE, alpha=2 * BAND, linewidth=0, label="95 % interval over prompts")
    figure.legend(handles=[*handles, band], loc="outside upper left", ncols=5)
    return Exhibit(
        name="sampling",
        title="Sampling",
        shows="On the evaluation prompts before and after training, the expected reward of the "
        "best of N completions, the chance that one of k is correct, what training added to the "
        "best of N, and, where other temperatures were sampled, what they do to reward, diversity "
        "and entropy (a thin line is one seed, a thick line the mean over seeds, a band the mean "
        "of the seeds’ intervals).",
        expects="The paper leads one to expect that the gap between the policies narrows as N "
        "grows, as it must where training makes likely what could be sampled before.",
        figure=figure,
        tables={"sampling": Table(COLUMNS, rows)},
    )


# -- against the number of samples ----------------------------------------------------------------


def draw_curves(axes: Axes, runs: Sequence[Run], prefix: str, gained: bool = False) -> Rows:
    """Draw the `prefix`N of every run's first and last evaluation, or the last less the first."""
    before = {run.name: _curve_of(run, prefix, last=False) for run in runs}
    after = {run.name: _curve_of(run, prefix, last=True) for run in runs}
    name = prefix.removeprefix("eval_").rstrip("@")
    rows = Rows()
    if gained:
        for schedule, group in by_schedule(runs).items():
            pairs = [(run, before[run.name], after[run.name]) for run in group]
            curves = [(run, end[0], _less(end[1], start[1])) for run, start, end in pairs if end[1]]
            rows += _draw(axes, curves, "gain", f"{name}, gain", line_style(schedule))
    else:
        for when, style, curves in _groups(runs, before, after):
            rows += _draw(axes, curves, when, name, style)
    if not rows:
        say_empty(axes)
        return rows
    places = sorted({row[6] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    return rows


def _curve_of(run: Run, prefix: str, last: bool) -> tuple[int, Curve]:
    """The step of the first or last evaluation and its values by N; nothing if there is one only.

    An evaluation before training, at step -1, is never an end.
    """
    lines = [r for r in run.metrics if any(key.startswith(prefix) for key in r)]
    chosen = lines[-1] if last and lines else lines[0] if lines else {"step": -1}
    if not lines or (chosen["step"] >= 0) != last:
        return -1, {}
    curve = {}
    for key in chosen:
        match = re.fullmatch(re.escape(prefix) + r"(\d+)", key)
        if match and is_number(chosen[key]):
            curve[float(match[1])] = _point(chosen, key)
    return chosen["step"], dict(sorted(curve.items()))


def _less(after: Curve, before: Curve) -> Curve:
    """The differences; their intervals are not known, for the two are of the same prompts."""
    shared = [n for n in after if n in before]
    return {n: Point(after[n].value - before[n].value, np.nan, np.nan) for n in shared}


# -- against the temperature ----------------------------------------------------------------------


def draw_temperatures(line: np.ndarray, runs: Sequence[Run]) -> Rows:
    """Reward, unique completions and entropy of the first and the last temperature sweep."""
    rows = Rows()
    for cell, key, title, unit in zip(
        line,
        ("reward", "diversity/unique", "entropy"),
        ("Reward", "Diversity: unique completions", "Entropy"),
        ("mean reward", "share of a prompt's samples", "nats per token"),
        strict=True,
    ):
        before = {run.name: _sweep_of(run, key, last=False) for run in runs}
        after = {run.name: _sweep_of(run, key, last=True) for run in runs}
        found = Rows()
        for when, style, curves in _groups(runs, before, after):
            found += _draw(cell, curves, when, f"{key} by temperature", style)
        cell.set(title=title, xlabel="temperature (0 is greedy)", ylabel=unit)
        if key != "reward":
            cell.set_ylim(bottom=0)
        if found:
            cell.set_xlim(line[0].get_xlim())
        else:
            say_empty(cell)
        rows += found
    return rows


def _sweep_of(run: Run, key: str, last: bool) -> tuple[int, Curve]:
    """A quantity by temperature before training, or at the last sweep."""
    steps = [r["step"] for r in run.temperatures if (r["step"] >= 0) == last]
    if not steps:
        return -1, {}
    # The greedy sampler draws from no distribution that could have an entropy.
    lines = [
        r
        for r in run.temperatures
        if r["step"] == max(steps)
        and is_number(r.get(key))
        and is_number(r.get("temperature"))
        and not (key == "entropy" and r["temperature"] == 0)
    ]
    ordered = sorted(lines, key=lambda r: r["temperature"])
    return max(steps), {float(r["temperature"]): _point(r, key) for r in ordered}


# -- lines and bands ------------------------------------------------------------------------------

Drawn = list[tuple[Run, int, Curve]]


def _groups(
    runs: Sequence[Run],
    before: dict[str, tuple[int, Curve]],
    after: dict[str, tuple[int, Curve]],
) -> Iterator[tuple[str, dict[str, Any], Drawn]]:
    """What is drawn as one mean: all runs before training, and each schedule's after it.

    Runs of one seed that start from the same checkpoint have the same evaluation before training;
    it is counted once.
    """
    first: dict[Any, tuple[Run, int, Curve]] = {}
    for run in runs:
        step, curve = before[run.name]
        if curve:
            first.setdefault(tuple(curve.items()), (run, step, curve))
    yield "before", {"color": BEFORE, "zorder": 2}, list(first.values())
    for schedule, group in by_schedule(runs).items():
        curves = [(run, *after[run.name]) for run in group if after[run.name][1]]
        yield "after", line_style(schedule), curves


def _draw(axes: Axes, curves: Drawn, when: str, name: str, style: dict[str, Any]) -> Rows:
    """Thin lines of the runs, their mean where all of them have a point, and the mean interval."""
    rows = Rows()
    for run, step, curve in curves:
        about = (name, when, run.schedule, run.seed, run.name, step)
        rows += [(*about, place, *_known(point)) for place, point in curve.items()]
        if len(curves) > 1:
            values = [point.value for point in curve.values()]
            axes.plot([*curve], values, color=style["color"], linewidth=0.8, alpha=0.4)
    shared = sorted(set.intersection(*(set(curve) for *_, curve in curves))) if curves else []
    if not shared:
        return rows
    stacked = np.array([[curve[place] for place in shared] for *_, curve in curves])
    value, low, high = np.mean(stacked, axis=0).T
    axes.plot(shared, value, linewidth=2.2, marker="o", markersize=3.5, **style)
    if np.isfinite(low).all():
        axes.fill_between(shared, low, high, color=style["color"], alpha=BAND, linewidth=0)
    if len(curves) > 1:
        schedule = "" if when == "before" else curves[0][0].schedule
        points = zip(shared, map(Point._make, stacked.mean(axis=0).tolist()), strict=True)
        rows += [
            (name, when, schedule, None, "mean", None, place, *_known(point))
            for place, point in points
        ]
    return rows


def _point(record: Record, key: str) -> Point:
    ends = [record.get(f"{key}_ci_{end}", np.nan) for end in ("low", "high")]
    low, high = (end if is_number(end) else np.nan for end in ends)
    return Point(float(record[key]), low, high)


def _known(point: Point) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(x) else x for x in point)
