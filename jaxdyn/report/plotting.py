"""How every figure looks, and the lines over steps that most of them are made of.

A panel draws a quantity for all runs: a thin line a seed, a thick one for the mean over the seeds
of a schedule. Drawing returns the rows of the table behind it, so the two cannot disagree.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxdyn.paths import AnyPath
from jaxdyn.report.load import Run

Rows = list[tuple[Any, ...]]

SERIES_COLUMNS = ("quantity", "schedule", "seed", "run", "step", "value")

LABELS = {
    "joint": "standard RL",
    "classifier_first": "CF-RL",
    "joint_extra": "standard RL + extra steps",
    "classifier_only": "classifier only",
}
COLOURS = {  # Okabe and Ito's palette: told apart under the common colour-vision deficiencies
    "joint": "#0072B2",
    "classifier_first": "#D55E00",
    "joint_extra": "#009E73",
    "classifier_only": "#AA4499",
}
DASHES: dict[str, Any] = {  # and told apart in grey
    "joint": "-",
    "classifier_first": "-",
    "joint_extra": (0, (5, 1.5)),
    "classifier_only": (0, (1.5, 1.2)),
}
STAGE_COLOUR = "#FBE3D0"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "text.color": "#1A1A1A",
    "axes.labelcolor": "#1A1A1A",
    "axes.titlecolor": "#1A1A1A",
    "text.parse_math": False,  # a schedule's name is not a formula
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Table:
    """What a figure drew: column names and rows."""

    columns: tuple[str, ...]
    rows: Rows

    def write(self, path: AnyPath) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        path.write_bytes(text.getvalue().encode("utf-8", errors="replace"))


@dataclass(frozen=True)
class Exhibit:
    """A figure, its tables, one sentence on what it shows and one on what the paper expects."""

    name: str
    title: str
    shows: str
    expects: str
    figure: Figure
    tables: dict[str, Table]


@dataclass(frozen=True)
class Panel:
    """A quantity over steps: its key in the log, its title and its axis label with the unit.

    `smooth`: the mean line is a running mean. `from_zero`: the axis starts at 0. `evaluated`:
    circles mark the same quantity on the evaluation prompts, logged under `eval_` and the key.
    """

    key: str
    title: str
    unit: str
    smooth: bool = False
    from_zero: bool = False
    evaluated: bool = False


def by_schedule(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs grouped by schedule, in the order in which legends name them."""
    order = [*LABELS, *sorted({run.schedule for run in runs} - set(LABELS))]
    groups = {s: [run for run in runs if run.schedule == s] for s in order}
    return {schedule: group for schedule, group in groups.items() if group}


def label(schedule: str) -> str:
    return LABELS.get(schedule, schedule)


def colour(schedule: str) -> str:
    return COLOURS.get(schedule, "#555555")


def line_style(schedule: str) -> dict[str, Any]:
    """The keyword arguments of a schedule's mean line; standard RL lies on top.

    With the same seed it is the beginning of standard RL with extra steps, which would hide it.
    """
    dashes = DASHES.get(schedule, (0, (6, 1.5, 1, 1.5)))
    return {
        "color": colour(schedule),
        "linestyle": dashes,
        "zorder": 4 if schedule == "joint" else 3,
    }


def grid_of_panels(rows: int, columns: int, height: float = 2.9) -> tuple[Figure, np.ndarray]:
    """A page-wide figure of rows x columns axes."""
    figure = Figure(figsize=(11.0, height * rows + 0.45), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_series(axes: Axes, runs: Sequence[Run], panel: Panel, against: str | None = None) -> Rows:
    """Draw a quantity over steps, or against another logged one; return rows of SERIES_COLUMNS.

    The mean is over the seeds at the steps all of them logged, so that it never jumps where one
    run ends; smoothed, it is a running mean over a twentieth of the steps.
    """
    rows: Rows = []
    for schedule, group in by_schedule(runs).items():
        lines = []
        for run in group:
            line = _line(run, panel.key, against, rows)
            if line:
                lines.append(line)
                thin: dict[str, Any] = {"color": colour(schedule), "linewidth": 0.8, "alpha": 0.4}
                thin["marker"] = "." if len(line) == 1 else None
                axes.plot(*zip(*line.values(), strict=True), **thin)
            circles = _line(run, f"eval_{panel.key}", against, rows) if panel.evaluated else {}
            if circles:
                axes.plot(*zip(*circles.values(), strict=True), **circle(colour(schedule)))
        shared = sorted(set.intersection(*map(set, lines))) if lines else []
        if not shared:
            continue
        place, mean = np.mean([[line[step] for step in shared] for line in lines], axis=0).T
        _tabulate(rows, panel.key, schedule, "mean", shared, mean)
        if panel.smooth:
            mean = running_mean(mean)
            _tabulate(rows, panel.key, schedule, "mean, smoothed", shared, mean)
        marker = "o" if len(shared) < 3 else None
        axes.plot(place, mean, linewidth=2.2, marker=marker, markersize=4, **line_style(schedule))
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("RL step")
    if panel.from_zero:
        top = max((row[-1] for row in rows), default=0.0) or 1.0
        axes.set_ylim(-0.03 * top, 1.05 * top)
    if rows:
        shade_classifier_stage(axes, runs, against)
    else:
        say_empty(axes)
    return rows


def _line(run: Run, key: str, against: str | None, rows: Rows) -> dict[int, tuple[float, float]]:
    """A run's points (place, value) by step, whose values are also added to the rows."""
    values = run.series(key)
    rows += [(key, run.schedule, run.seed, run.name, *item) for item in values.items()]
    if against is None:
        return {step: (float(step), value) for step, value in values.items()}
    places = {-1: 0.0} | run.series(against)  # nothing was spent before training
    return {step: (places[step], value) for step, value in values.items() if step in places}


def _tabulate(
    rows: Rows, key: str, schedule: str, name: str, steps: list[int], values: np.ndarray
) -> None:
    items = zip(steps, values.tolist(), strict=True)
    rows += [(key, schedule, None, name, *item) for item in items]


def circle(face: str) -> dict[str, Any]:
    """The keyword arguments of evaluation markers."""
    return {
        "color": face,
        "marker": "o",
        "markersize": 6,
        "markeredgecolor": "white",
        "linestyle": "none",
    }


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the points (odd, at least 3), narrower at the ends."""
    half = max(1, len(values) // 40)
    totals = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, index[::-1]))
    return (totals[index + reach + 1] - totals[index - reach]) / (2 * reach + 1)


def shade_classifier_stage(axes: Axes, runs: Sequence[Run], against: str | None = None) -> None:
    """Shade the steps, or their values of another quantity, in which CF-RL trains W alone."""
    ends = []
    for run in runs:
        steps = run.classifier_steps()
        if steps:
            place = run.series(against).get(steps - 1) if against else steps - 0.5
            ends += [place] if place is not None else []
    if ends:
        left, right = axes.get_xlim()
        axes.axvspan(left, float(np.mean(ends)), color=STAGE_COLOUR, zorder=0, linewidth=0)
        axes.set_xlim(left, right)


def finish(
    figure: Figure, axes: np.ndarray, runs: Sequence[Run], rows: Rows, extra: Sequence[Artist] = ()
) -> None:
    """Name the x axis below the last row only, and put one legend above all panels."""
    for cell in axes[:-1].flat:
        cell.set_xlabel("")
    handles: list[Artist] = [
        Line2D([], [], linewidth=2.2, label=f"{label(s)} (n = {len(group)})", **line_style(s))
        for s, group in by_schedule(runs).items()
    ]
    if any(run.classifier_steps() for run in runs):
        handles.append(Patch(color=STAGE_COLOUR, label="CF-RL's classifier stage"))
    if any(row[0].startswith("eval_") for row in rows):
        handles.append(Line2D([], [], label="evaluation prompts", **circle("#555555")))
    figure.legend(handles=[*handles, *extra], loc="outside upper left", ncols=5)


def say_empty(axes: Axes) -> None:
    """An honest empty panel."""
    axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="#777777")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
