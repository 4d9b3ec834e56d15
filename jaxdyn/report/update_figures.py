"""Figures of what the updates did; each draws all runs, and is None if no run has the data."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxdyn import COMPONENTS
from jaxdyn.report.load import Run
from jaxdyn.report.plotting import (
    COSINE_BINS,
    SERIES_COLUMNS,
    Exhibit,
    Panel,
    Rows,
    Table,
    by_schedule,
    draw_cosines,
    draw_series,
    finish,
    grid_of_panels,
    line_style,
    look,
    say_empty,
    series_exhibit,
)

BEFORE_COLOUR = "#D0D0D0"
DOTS: dict[str, Any] = {"s": 13, "alpha": 0.55, "linewidth": 0.7, "rasterized": True}

CHANGES = ("predicted", *COMPONENTS, "actual")
PREDICTION_COLUMNS = ("schedule", "seed", "run", "step", "stage", "site", *CHANGES)
COSINE_COLUMNS = ("place", "when", "schedule", "runs", "pairs", "bin_left", "bin_right", "share")

Change = tuple[Run, int, bool, dict[str, np.ndarray]]
"""An update of a run: its step, whether it moved the classifier alone, the arrays over sites."""


def prediction(runs: Sequence[Run]) -> Exhibit | None:
    """Predicted against actual change of log-probability, in total and by component."""
    groups = {s: _changes(group) for s, group in by_schedule(runs).items()}
    groups = {s: changes for s, changes in groups.items() if changes}
    if not groups:
        return None
    cross = any(np.any(c["cross"]) for changes in groups.values() for *_, c in changes)
    columns = ("predicted", *(COMPONENTS if cross else COMPONENTS[:2]))
    figure, axes = grid_of_panels(len(groups), len(columns), height=11.5 / len(columns))
    rows = Rows()
    for line, (schedule, changes) in zip(axes, groups.items(), strict=True):
        together = {k: np.concatenate([c[k] for *_, c in changes]) for k in (*columns, "actual")}
        reach = {name: 1.08 * float(np.max(np.abs(v))) or 1.0 for name, v in together.items()}
        ink = look(schedule).colour
        tall = reach["actual"] = reach["predicted"] = max(reach["actual"], reach["predicted"])
        for cell, column in zip(line, columns, strict=True):
            for *_, classifier, c in changes:
                inside = "none" if classifier else ink
                cell.scatter(c[column], c["actual"], facecolor=inside, edgecolor=ink, **DOTS)
            cell.plot([-tall, tall], [-tall, tall], color="#333333", linewidth=0.9, zorder=1.5)
            cell.locator_params(nbins=4)
            wide = reach[column]
            cell.set(xlim=(-wide, wide), ylim=(-tall, tall), box_aspect=1)
            name = "total, first order" if column == "predicted" else column
            r = correlation(together[column], together["actual"])
            cell.set(title=f"{name}: r = {r:.3f}", xlabel="predicted Δ log π (nats)")
        line[0].set_ylabel(f"{look(schedule).label}\nactual Δ log π (nats)")
        for run, step, classifier, c in changes:
            about = (schedule, run.seed, run.name, step, 1 if classifier else 2)
            sites = zip(*(c[name].tolist() for name in CHANGES), strict=True)
            rows += [(*about, n, *site) for n, site in enumerate(sites)]
    handles = [Line2D([], [], color="#333333", linewidth=0.9, label="predicted = actual")]
    if any(row[4] == 1 for row in rows):
        rings = Line2D([], [], marker="o", color="#555555", markerfacecolor="none", linestyle="")
        rings.set_label("an update of the classifier alone")
        handles.append(rings)
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return Exhibit(
        name="prediction",
        title="Predicted against actual change",
        shows="Each dot is one probe site at one update (the first, the middle and the last probed "
        "one of every run): how much the log-probability of its token really changed, against the "
        "first-order prediction in total and, each on a scale of its own, by NTK component, with "
        "Pearson's r.",
        expects="The paper's account is a first-order one, so it leads one to expect the total on "
        "the diagonal, and each component to matter as far as it follows the actual change.",
        figure=figure,
        tables={"prediction": Table(PREDICTION_COLUMNS, rows)},
    )


def shares(runs: Sequence[Run]) -> Exhibit | None:
    """The components' shares of the predicted change, and their sizes, along training."""
    cross = any(any(run.series("share/cross").values()) for run in runs)
    names = COMPONENTS if cross else COMPONENTS[:2]
    part, size = "of the prediction", "rms Δ log π (nats)"
    panels = (
        *(Panel(f"share/{c}", f"Share: {c}", part, levels=(0.0, 1.0)) for c in names),
        Panel("delta/correlation", "Predicted against actual", "Pearson's r over sites"),
        *(Panel(f"delta/{c}/rms", f"Size: {c}", size, from_zero=True) for c in names),
        Panel("delta/residual/rms", "Size: beyond first order", size, from_zero=True),
    )
    return series_exhibit(
        runs,
        panels,
        columns=len(names) + 1,
        height=2.6,
        also=("delta/predicted/rms", "delta/actual/rms"),
        name="shares",
        title="What the updates are made of",
        shows="The part of the predicted change of log-probabilities that comes through the "
        "classifier (representation component) and through the body (gradient component) at "
        "each probed update, where shares add up to 1 and one below 0 opposes the whole, and below "
        "them the sizes.",
        expects="The paper leads one to expect that shaping the classifier first acts through the "
        "gradient component, which the classifier enters directly, so that it differs between "
        "CF-RL's second stage and standard RL.",
    )


def ledger(runs: Sequence[Run]) -> Exhibit | None:
    """What all updates together did, by component, beside the shares of single ones."""
    share, nats = "of the change", "nats, from the start"
    place = "completion"
    panels = (
        Panel(
            "delta/share/representation", "One update: log π", "of the prediction", levels=(0.0,)
        ),
        Panel("ledger/log_prob/share/representation", "All so far: log π", share, levels=(0.0,)),
        Panel("ledger/entropy/share/representation", "All so far: entropy", share, levels=(0.0,)),
        *(
            Panel(
                f"ledger/entropy/{part}/{place}", f"Change of entropy: {name}", nats, levels=(0.0,)
            )
            for part, name in (
                ("representation", "representation"),
                ("gradient", "gradient"),
                ("change", "whole"),
            )
        ),
    )
    if not any(run.series("ledger/log_prob/share/representation") for run in runs):
        return None
    return series_exhibit(
        runs,
        panels,
        columns=3,
        height=2.6,
        also=tuple(
            f"ledger/log_prob/{part}/{kind}"
            for part in ("representation", "gradient", "change")
            for kind in ("prompt", "completion")
        ),
        name="ledger",
        title="What they add up to",
        shows="The representation component’s share of single updates (top left) and of "
        "everything since the start, of the change of log π of the sites’ tokens and of "
        "their entropy, and below them the entropy at completion sites by component, "
        "integrals along the run that add up to the whole: the two kinds of share differ "
        "because steps that go together and steps that cancel look alike one by one, and "
        "what moves W adds up where much of what moves the body is undone; all three are "
        "weighted over the sites’ own tokens, Σ part · change / Σ change² (of a single "
        "update, of its prediction), those of the section above over the whole "
        "vocabulary.",
        expects="The paper speaks of single updates, so what it says of the representation "
        "component has to be asked of the whole training, too.",
    )


def features(runs: Sequence[Run]) -> Exhibit | None:
    """Cosines between the features of pairs of sites, before and after, and the features' drift."""
    figure, axes = grid_of_panels(2, 3, height=2.9)
    pairs, rows = Rows(), Rows()
    drift = (
        Panel("features/drift/cosine_mean", "Same site, now and at the start", "mean cosine"),
        Panel("features/drift/norm_mean", "Distance from the start", "mean norm of φ − φ₀"),
    )
    for line, place, panel in zip(axes, ("prompt", "completion"), drift, strict=True):
        pairs += _cosine_histogram(line[0], runs, place)
        key, title = f"features/{place}/negative_share", f"Negative pairs, {place} sites"
        rows += draw_series(line[1], runs, Panel(key, title, "share of pairs", from_zero=True))
        rows += draw_series(line[2], runs, panel)
    if not rows and not pairs:
        return None
    before = Patch(color=BEFORE_COLOUR, label="before training")
    finish(figure, axes, runs, rows, [before] if pairs else [])
    return Exhibit(
        name="features",
        title="Features",
        shows="Cosines between the features of every two probe sites before and after training, "
        "at the prompts' last tokens (top) and inside completions (bottom), the share of pairs "
        "below 0 along training, and how far each site's feature has moved.",
        expects="The paper leads one to expect features that vary little, with inner products "
        "above 0 between prompts, so that updates push all sites the same way; it says nothing of "
        "completion sites.",
        figure=figure,
        tables={"features": Table(SERIES_COLUMNS, rows), "cosines": Table(COSINE_COLUMNS, pairs)},
    )


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN where either does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")


def _changes(group: Sequence[Run]) -> list[Change]:
    """The first, middle and last probed update of each run, without sites that are not finite."""
    changes = []
    for run in group:
        steps = [step for step in run.probe_files if step >= 0]
        for step in sorted({steps[i] for i in (0, len(steps) // 2, -1)} if steps else ()):
            arrays = run.probe(step)
            if not {"representation", "gradient", "actual"} <= arrays.keys():
                continue
            parts = {name: arrays.get(name, np.zeros_like(arrays["actual"])) for name in COMPONENTS}
            predicted = np.sum([*parts.values()], axis=0)
            change = parts | {"predicted": predicted, "actual": arrays["actual"]}
            finite = np.isfinite(change["predicted"] + change["actual"])
            change = {name: values[finite].astype(float) for name, values in change.items()}
            if finite.any():
                changes.append((run, step, run.in_classifier_stage(step), change))
    return changes


def _cosine_histogram(axes: Axes, runs: Sequence[Run], place: str) -> Rows:
    """Draw the cosines of pairs of sites before training (all runs) and after it (by schedule)."""
    rows, lines = Rows(), []
    key = f"cosines_{place}"
    after = {s: _pairs(group, key, last=True) for s, group in by_schedule(runs).items()}
    for schedule, (count, cosines) in {"": _pairs(runs, key, last=False), **after}.items():
        if not len(cosines):
            continue
        when, ink, style = "before", "#555555", {"fill": True, "color": BEFORE_COLOUR}
        if schedule:
            when, ink = "after", look(schedule).colour
            style = line_style(schedule) | {"linewidth": 1.8}
        share = draw_cosines(axes, cosines, **style)
        bins = zip(COSINE_BINS[:-1].tolist(), COSINE_BINS[1:].tolist(), share.tolist(), strict=True)
        rows += [(place, when, schedule, count, len(cosines), *item) for item in bins]
        mean, negative = float(np.mean(cosines)), float(np.mean(cosines < 0))
        lines.append((f"{when}: mean {round(mean, 2) + 0.0:.2f}, {negative:.0%} below 0", ink))
    axes.set(
        title=f"Pairs of {place} sites",
        xlabel="cosine of two sites' features",
        ylabel="share of pairs",
    )
    axes.set_ylim(top=1.6 * max((row[-1] for row in rows), default=1.0))  # room for the text
    for height, (text, ink) in enumerate(lines):
        spot = (0.02, 0.97 - 0.085 * height)
        axes.annotate(text, spot, xycoords="axes fraction", va="top", fontsize=8.5, color=ink)
    if not rows:
        say_empty(axes)
    return rows


def _pairs(runs: Sequence[Run], key: str, last: bool) -> tuple[int, np.ndarray]:
    """How many runs there are, and the cosines i < j of their first or last probe, side by side."""
    found = []
    for run in runs:
        steps = list(run.probe_files)
        if len(steps) < (2 if last else 1):
            continue
        matrix = run.probe(steps[-1] if last else steps[0]).get(key)
        if matrix is not None:
            found.append(matrix[np.triu_indices(len(matrix), k=1)].astype(float))
    cosines = np.concatenate(found) if found else np.zeros(0)
    return len(found), cosines[np.isfinite(cosines)]
