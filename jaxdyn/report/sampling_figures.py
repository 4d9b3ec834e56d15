"""What sampling more, or at another temperature, is worth; None if no run has the data."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxdyn.report.load import Record, Run, is_number
from jaxdyn.report.plotting import (
    Exhibit,
    Panel,
    Rows,
    Table,
    by_schedule,
    grid_of_panels,
    line_style,
    mean_line,
    say_empty,
    schedule_handles,
    thin_line,
)

COLUMNS = ("quantity", "when", "schedule", "seed", "run", "step", "at", "value", "low", "high")
BEFORE = "#777777"
BEFORE_STYLE: dict[str, Any] = {"color": BEFORE, "linewidth": 2.2, "zorder": 2}
BAND = 0.16
BEST = Panel(
    "eval_best_of@", "Best of N", "expected largest reward", place="N, samples of a prompt"
)
PASSED = Panel("eval_pass@", "pass@k", "chance of a correct one", place="k, samples of a prompt")
GAIN = replace(BEST, title="Best of N: gain over before", unit="after − before")
SWEPT = (
    Panel("reward", "Reward", "mean reward"),
    Panel("diversity/unique", "Diversity: unique completions", "share of a prompt's samples"),
    Panel("entropy", "Entropy", "nats per token"),
)


class Point(NamedTuple):
    """A value at a number of samples or a temperature, with its interval's ends (or nan)."""

    value: float
    low: float
    high: float


Curve = dict[float, Point]
"""A run's points at one step, by their place on the x axis."""

End = tuple[int, Curve] | None
"""The step of a run's first or last evaluation and its curve; None if it has no such."""


def sampling(runs: Sequence[Run]) -> Exhibit | None:
    """Best-of-N and pass@k before and after; reward, diversity and entropy by temperature."""
    swept = [run for run in runs if run.temperatures]
    figure, axes = grid_of_panels(2 if swept else 1, 3, height=3.1)
    rows = draw_curves(axes[0, 0], runs, BEST)
    rows += draw_curves(axes[0, 1], runs, PASSED)
    rows += draw_curves(axes[0, 2], runs, GAIN, gained=True)
    if swept:
        rows += draw_temperatures(axes[1], runs)
    if not rows:
        return None
    before = Line2D([], [], label="before training", **BEFORE_STYLE)
    band = Patch(color=BEFORE, alpha=2 * BAND, linewidth=0, label="95 % interval over prompts")
    handles = [before, *schedule_handles(runs, "after "), band]
    figure.legend(handles=handles, loc="outside upper left", ncols=5)
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


def draw_curves(axes: Axes, runs: Sequence[Run], panel: Panel, gained: bool = False) -> Rows:
    """Draw key and N of every run's first and last evaluation, or the last less the first."""
    name = panel.key.removeprefix("eval_").rstrip("@")
    if gained:
        rows = draw_ends(axes, runs, partial(_gain_of, panel.key), f"{name}, gain", after="gain")
        axes.axhline(0, color="#999999", linewidth=0.9, zorder=1)
    else:
        rows = draw_ends(axes, runs, partial(_curve_of, panel.key), name)
    axes.set(title=panel.title, xlabel=panel.place, ylabel=panel.unit)
    if rows:
        places = sorted({row[6] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    return rows


def _curve_of(prefix: str, run: Run, last: bool) -> End:
    """The first or last evaluation's values by N; nothing if there is one only.

    An evaluation before training, at step -1, is never an end.
    """
    lines = [r for r in run.metrics if any(key.startswith(prefix) for key in r)]
    chosen = lines[-1 if last else 0] if lines else {"step": -1}
    if not lines or (chosen["step"] >= 0) != last:
        return None
    curve = {}
    for key in chosen:
        match = re.fullmatch(re.escape(prefix) + r"(\d+)", key)
        if match and is_number(chosen[key]):
            curve[float(match[1])] = _point(chosen, key)
    return (chosen["step"], curve) if curve else None


def _gain_of(prefix: str, run: Run, last: bool) -> End:
    """The differences; their intervals are not known, for the two are of the same prompts."""
    start, end = (_curve_of(prefix, run, at_end) for at_end in (False, True))
    if not last or end is None:
        return None
    step, after = end
    before = start[1] if start else {}
    shared = [n for n in after if n in before]
    return step, {n: Point(after[n].value - before[n].value, np.nan, np.nan) for n in shared}


# -- against the temperature ----------------------------------------------------------------------


def draw_temperatures(line: np.ndarray, runs: Sequence[Run]) -> Rows:
    """Reward, unique completions and entropy of the first and the last temperature sweep."""
    rows = Rows()
    for cell, panel in zip(line, SWEPT, strict=True):
        name = f"{panel.key} by temperature"
        found = draw_ends(cell, runs, partial(_sweep_of, panel.key), name)
        cell.set(title=panel.title, xlabel="temperature (0 is greedy)", ylabel=panel.unit)
        if panel.key != "reward":
            cell.set_ylim(bottom=0)
        if found:
            cell.set_xlim(line[0].get_xlim())
        rows += found
    return rows


def _sweep_of(key: str, run: Run, last: bool) -> End:
    """A quantity by temperature before training, or at the last sweep."""
    steps = [r["step"] for r in run.temperatures if (r["step"] >= 0) == last]
    curve = {
        float(r["temperature"]): _point(r, key)
        for r in run.temperatures
        if r["step"] == max(steps, default=None)
        and is_number(r.get(key))
        and is_number(r.get("temperature"))
        # The greedy sampler draws from no distribution that could have an entropy.
        and not (key == "entropy" and r["temperature"] == 0)
    }
    return (max(steps), curve) if curve else None


# -- lines and bands ------------------------------------------------------------------------------

Drawn = list[tuple[Run, int, Curve]]


def draw_ends(
    axes: Axes,
    runs: Sequence[Run],
    end_of: Callable[[Run, bool], End],
    name: str,
    after: str = "after",
) -> Rows:
    """Draw a mean of all runs before training, and one of each schedule's after it.

    Runs of one seed that start from the same checkpoint have the same evaluation before training;
    it is counted once.
    """
    first: dict[Any, tuple[Run, int, Curve]] = {}
    for run in runs:
        if start := end_of(run, False):
            first.setdefault(tuple(sorted(start[1].items())), (run, *start))
    rows = _draw(axes, [*first.values()], "before", name, BEFORE_STYLE)
    for schedule, group in by_schedule(runs).items():
        curves = [(run, *end) for run in group if (end := end_of(run, True))]
        rows += _draw(axes, curves, after, name, line_style(schedule))
    if not rows:
        say_empty(axes)
    return rows


def _draw(axes: Axes, curves: Drawn, when: str, name: str, style: dict[str, Any]) -> Rows:
    """Thin lines of the runs, their mean where all of them have a point, and the mean interval."""
    rows = Rows()

    def tabulate(about: tuple, points: Iterable[tuple[float, Point]]) -> None:
        rows.extend((name, when, *about, place, *_known(point)) for place, point in points)

    for run, step, curve in curves:
        points = sorted(curve.items())
        tabulate((run.schedule, run.seed, run.name, step), points)
        if len(curves) > 1:
            values = [point.value for _, point in points]
            axes.plot(sorted(curve), values, **thin_line(style["color"]))
    shared, mean = mean_line([curve for *_, curve in curves])
    if not shared:
        return rows
    value, low, high = mean.T
    axes.plot(shared, value, marker="o", markersize=3.5, **style)
    if np.isfinite(low).all():
        axes.fill_between(shared, low, high, color=style["color"], alpha=BAND, linewidth=0)
    if len(curves) > 1:
        schedule = "" if when == "before" else curves[0][0].schedule
        means = zip(shared, map(Point._make, mean.tolist()), strict=True)
        tabulate((schedule, None, "mean", None), means)
    return rows


def _point(record: Record, key: str) -> Point:
    ends = [record.get(f"{key}_ci_{end}", np.nan) for end in ("low", "high")]
    low, high = (end if is_number(end) else np.nan for end in ends)
    return Point(float(record[key]), low, high)


def _known(point: Point) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(x) else x for x in point)
