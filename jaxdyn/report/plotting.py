"""How every figure looks, and the lines over steps that most of them are made of.

A panel draws a quantity for all runs: a thin line a seed, a thick one for the mean over the seeds
of a schedule. Drawing returns the rows of the table behind it, so the two cannot disagree.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxdyn.report.load import Run

Rows = list[tuple[Any, ...]]

SERIES_COLUMNS = ("quantity", "schedule", "seed", "run", "step", "value")


class Look(NamedTuple):
    """How a schedule is named and drawn."""

    label: str
    colour: str
    dashes: Any


# Okabe and Ito's palette: told apart under the common colour-vision deficiencies, and by their
# dashes in grey.
LOOKS = {
    "joint": Look("standard RL", "#0072B2", "-"),
    "classifier_first": Look("CF-RL", "#D55E00", "-"),
    "joint_extra": Look("standard RL + extra steps", "#009E73", (0, (5, 1.5))),
    "classifier_only": Look("classifier only", "#AA4499", (0, (1.5, 1.2))),
    "linear_probe": Look("linear probe", "#AA4499", (0, (1.5, 1.2))),
    "linear_probe_then_finetune": Look("linear probe, then fine-tuning", "#D55E00", "-"),
}
STAGE_COLOUR = "#FBE3D0"
COSINE_BINS = np.linspace(-1.0, 1.0, 41)
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

    def csv(self) -> str:
        """The table as comma-separated values."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class Exhibit:
    """A figure or a table of HTML, the data behind it, and what to make of it.

    One sentence says what it shows and one what the paper expects.
    """

    name: str
    title: str
    shows: str
    expects: str
    figure: Figure | str
    tables: dict[str, Table]


@dataclass(frozen=True)
class Panel:
    """A quantity over steps: its key in the log, its title and its axis label with the unit.

    `smooth`: the mean line is a running mean. `from_zero`: the axis starts at 0. `evaluated`:
    circles mark the same quantity on the evaluation prompts, logged under `eval_` and the key.
    `levels`: where thin lines lie across. `against`: another logged quantity in place of the
    steps, which `place` names.
    """

    key: str
    title: str
    unit: str
    smooth: bool = False
    from_zero: bool = False
    evaluated: bool = False
    levels: tuple[float, ...] = ()
    against: str | None = None
    place: str = "RL step"


def by_schedule(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs grouped by schedule, in the order in which legends name them."""
    order = [*LOOKS, *sorted({run.schedule for run in runs} - set(LOOKS))]
    groups = {s: [run for run in runs if run.schedule == s] for s in order}
    return {schedule: group for schedule, group in groups.items() if group}


def look(schedule: str) -> Look:
    return LOOKS.get(schedule, Look(schedule, "#555555", (0, (6, 1.5, 1, 1.5))))


def line_style(schedule: str) -> dict[str, Any]:
    """The keyword arguments of a schedule's mean line; standard RL lies on top.

    With the same seed it is the beginning of standard RL with extra steps, which would hide it.
    """
    _, colour, dashes = look(schedule)
    level = 4 if schedule == "joint" else 3
    return {"color": colour, "linestyle": dashes, "linewidth": 2.2, "zorder": level}


def thin_line(colour: str) -> dict[str, Any]:
    """The keyword arguments of one seed's line."""
    return {"color": colour, "linewidth": 0.8, "alpha": 0.4}


def grid_of_panels(rows: int, columns: int, height: float = 2.9) -> tuple[Figure, np.ndarray]:
    """A page-wide figure of rows x columns axes."""
    figure = Figure(figsize=(11.0, height * rows + 0.45), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def series_exhibit(
    runs: Sequence[Run],
    panels: Sequence[Panel],
    *,
    columns: int,
    height: float,
    also: Sequence[str] = (),
    **words: str,
) -> Exhibit | None:
    """A figure of nothing but panels over steps, and its table; None without data.

    `also` are quantities that are tabulated and not drawn, `words` the exhibit's texts by name.
    """
    figure, axes = grid_of_panels(len(panels) // columns, columns, height)
    rows = Rows()
    for cell, panel in zip(axes.flat, panels, strict=True):
        drawn = draw_series(cell, runs, panel)
        rows += [] if panel.against else drawn  # the same quantity has a panel over steps
    rows += [row for key in also for run in runs for row in _logged(run, key)]
    if not rows:
        return None
    finish(figure, axes, runs, rows)
    return Exhibit(**words, figure=figure, tables={words["name"]: Table(SERIES_COLUMNS, rows)})


def draw_series(axes: Axes, runs: Sequence[Run], panel: Panel) -> Rows:
    """Draw a quantity over steps, or against another logged one; return rows of SERIES_COLUMNS.

    The mean is over the seeds at the steps all of them logged, so that it never jumps where one
    run ends; smoothed, it is a running mean over a twentieth of the steps.
    """
    rows: Rows = []
    for schedule, group in by_schedule(runs).items():
        colour, lines = look(schedule).colour, []
        for run in group:
            rows += _logged(run, panel.key)
            line = _line(run, panel.key, panel.against)
            if line:
                lines.append(line)
                marker = "." if len(line) == 1 else None
                axes.plot(*zip(*line.values(), strict=True), marker=marker, **thin_line(colour))
            if panel.evaluated:
                rows += _logged(run, f"eval_{panel.key}")
                circles = _line(run, f"eval_{panel.key}", panel.against)
                if circles:
                    axes.plot(*zip(*circles.values(), strict=True), **circle(colour))
        shared, points = mean_line(lines)
        if not shared:
            continue
        place, mean = points.T
        means = {"mean": mean}
        if panel.smooth:
            mean = means["mean, smoothed"] = running_mean(mean)
        for name, values in means.items():
            items = zip(shared, values.tolist(), strict=True)
            rows += [(panel.key, schedule, None, name, *item) for item in items]
        marker = "o" if len(shared) < 3 else None
        axes.plot(place, mean, marker=marker, markersize=4, **line_style(schedule))
    axes.set(title=panel.title, xlabel=panel.place, ylabel=panel.unit)
    if panel.from_zero:
        top = max((row[-1] for row in rows), default=0.0) or 1.0
        axes.set_ylim(-0.03 * top, 1.05 * top)
    if not rows:
        say_empty(axes)
        return rows
    for level in panel.levels:
        axes.axhline(level, color="#999999", linewidth=0.9, zorder=1)
    shade_classifier_stage(axes, runs, panel.against)
    return rows


def _logged(run: Run, key: str) -> Rows:
    about = (key, run.schedule, run.seed, run.name)
    return [(*about, *item) for item in run.series(key).items()]


def _line(run: Run, key: str, against: str | None) -> dict[int, tuple[float, float]]:
    """A run's points (place, value) by step."""
    values = run.series(key)
    if against is None:
        return {step: (float(step), value) for step, value in values.items()}
    places = {-1: 0.0} | run.series(against)  # nothing was spent before training
    return {step: (places[step], value) for step, value in values.items() if step in places}


def mean_line(lines: Sequence[Mapping[Any, tuple]]) -> tuple[list[Any], np.ndarray]:
    """The keys that all lines share, in order, and the means [keys, ...] of their points there."""
    if not lines:
        return [], np.zeros(0)
    shared = sorted(set.intersection(*map(set, lines)))
    return shared, np.mean([[line[key] for key in shared] for line in lines], axis=0)


def draw_cosines(axes: Axes, cosines: np.ndarray, **style: Any) -> np.ndarray:
    """Draw how cosines spread over COSINE_BINS; return the share of them in each."""
    share = np.histogram(np.clip(cosines, -1, 1), COSINE_BINS)[0] / len(cosines)
    axes.stairs(share, COSINE_BINS, **style)
    return share


def circle(face: str) -> dict[str, Any]:
    """The keyword arguments of evaluation markers."""
    dot = {"marker": "o", "markersize": 6, "markeredgecolor": "white", "linestyle": "none"}
    return {"color": face, **dot}


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
    handles: list[Artist] = [*schedule_handles(runs)]
    if any(run.classifier_steps() for run in runs):
        handles.append(Patch(color=STAGE_COLOUR, label="CF-RL's classifier stage"))
    if any(row[0].startswith("eval_") for row in rows):
        handles.append(Line2D([], [], label="evaluation prompts", **circle("#555555")))
    figure.legend(handles=[*handles, *extra], loc="outside upper left", ncols=5)


def schedule_handles(runs: Sequence[Run], when: str = "") -> list[Line2D]:
    """A legend's entry for each schedule: its line, its name after `when`, its number of runs."""
    return [
        Line2D([], [], label=f"{when}{look(s).label} (n = {len(g)})", **line_style(s))
        for s, g in by_schedule(runs).items()
    ]


def say_empty(axes: Axes) -> None:
    """An honest empty panel."""
    axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="#777777")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
