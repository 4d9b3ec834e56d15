"""What reward models learned of preferences; None if no run trained one."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from jaxdyn.report.load import Run, is_number
from jaxdyn.report.plotting import (
    SERIES_COLUMNS,
    Exhibit,
    Panel,
    Rows,
    Table,
    draw_series,
    grid_of_panels,
    line_style,
    look,
    say_empty,
)

BINS = ("run", "when", "step", "low", "high", "pairs", "confidence", "accuracy")
PLACE = "step"
PANELS = (
    Panel(
        "accuracy",
        "Chosen scored above rejected",
        "share of pairs",
        smooth=True,
        levels=(0.5,),
        place=PLACE,
    ),
    Panel("loss", "Bradley–Terry loss, training pairs", "nats per pair", True, place=PLACE),
    Panel("eval_nll", "… held-out pairs", "nats per pair", place=PLACE),
)
BEFORE = "#777777"


def preferences(runs: Sequence[Run]) -> Exhibit | None:
    """Accuracy and likelihood along training, and what a probability is worth at both ends."""
    runs = [run for run in runs if run.config.get("kind") == "reward"]
    if not runs:
        return None
    figure, axes = grid_of_panels(2, 2)
    rows = Rows()
    for cell, panel in zip(axes.flat[:3], PANELS, strict=True):
        rows += draw_series(cell, runs, panel)
    rows += held_out(axes[0, 0], runs)
    bins = reliability(axes[1, 1], runs)
    if not rows:
        return None
    style = {**line_style(runs[0].schedule), "label": f"reward models (n = {len(runs)})"}
    dot: dict[str, Any] = {"color": style["color"], "marker": "o", "linestyle": "none"}
    handles = [
        Line2D([], [], **style),
        Line2D([], [], **dot, markersize=5, label="held-out pairs, 95 % interval"),
        Line2D([], [], color=BEFORE, linestyle=":", label="preferring the longer, held-out"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=5)
    return Exhibit(
        name="preferences",
        title="Reward models",
        shows="How often a reward model scores the preferred answer above the other, on training "
        "pairs (a thin line a run, a thick one smoothed) and on held-out pairs, beside what "
        "preferring the longer answer would have right; its loss; and how often it is right where "
        "it says it is so sure (a disc’s area is its share of the held-out pairs).",
        expects="A model that has learned something is above both levels by more than its "
        "interval; one that is calibrated lies on the diagonal.",
        figure=figure,
        tables={
            "preferences": Table(SERIES_COLUMNS, rows),
            "calibration": Table(BINS, bins),
        },
    )


def held_out(axes: Axes, runs: Sequence[Run]) -> Rows:
    """Accuracy on held-out pairs with its interval, and that of the longer answer."""
    rows = Rows()
    for run in runs:
        keys = [f"eval_{name}" for name in ("accuracy", "accuracy_ci_low", "accuracy_ci_high")]
        found = [run.series(key) for key in (*keys, "eval_length_accuracy")]
        for key, values in zip((*keys, "eval_length_accuracy"), found, strict=True):
            rows += [(key, run.schedule, run.seed, run.name, *item) for item in values.items()]
        value, low, high, length = found
        for step in value:
            ends = [[max(value[step] - low.get(step, value[step]), 0.0)]]
            ends += [[max(high.get(step, value[step]) - value[step], 0.0)]]
            colour = look(run.schedule).colour
            axes.errorbar([step], [value[step]], ends, fmt="o", markersize=5, color=colour)
        if length:
            axes.axhline(list(length.values())[-1], color=BEFORE, linestyle=":", linewidth=1.2)
    return rows


def reliability(axes: Axes, runs: Sequence[Run]) -> Rows:
    """How often pairs are ordered rightly against the probability that the model gives to it."""
    rows = Rows()
    axes.set(title="Calibration", xlabel="probability given", ylabel="share ordered rightly")
    axes.plot([0.5, 1.0], [0.5, 1.0], color="#999999", linewidth=0.9, zorder=1)
    for run in runs:
        ends = [record for record in run.calibration if isinstance(record.get("bins"), list)]
        if not ends:
            continue
        when = {"after": ends[-1]} if len(ends) == 1 else {"before": ends[0], "after": ends[-1]}
        for name, record in when.items():
            whole = lambda one: (
                isinstance(one, dict) and all(map(is_number, map(one.get, BINS[3:])))
            )
            found = [one for one in record["bins"] if whole(one) and one["pairs"] > 0]
            colour = BEFORE if name == "before" else look(run.schedule).colour
            total = sum(one["pairs"] for one in found) or 1
            style: dict[str, Any] = {"color": colour, "alpha": 0.7, "linewidths": 0}
            places = [one["confidence"] for one in found], [one["accuracy"] for one in found]
            axes.scatter(*places, s=[20 + 300 * one["pairs"] / total for one in found], **style)
            rows += [
                (run.name, name, record["step"], *(one[key] for key in BINS[3:])) for one in found
            ]
    if not rows:
        say_empty(axes)
    return rows


def is_whole(bin_: Any) -> bool:
    """Whether it is a bin as a run writes them, with pairs in it."""
    has = isinstance(bin_, dict) and all(is_number(bin_.get(name)) for name in BINS[3:])
    return has and bin_["pairs"] > 0
