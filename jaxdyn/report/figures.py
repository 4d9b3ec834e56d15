"""Figures of the training itself; each draws all runs, and is None if no run has the data."""

from collections.abc import Sequence
from dataclasses import replace

from jaxdyn.report.load import Run
from jaxdyn.report.plotting import (
    SERIES_COLUMNS,
    Exhibit,
    Panel,
    Rows,
    Table,
    draw_series,
    finish,
    grid_of_panels,
)


def reward(runs: Sequence[Run]) -> Exhibit | None:
    """Reward against steps and against the time spent training."""
    figure, axes = grid_of_panels(1, 2, height=3.7)
    left, right = axes[0]
    unit = "mean reward of a step's completions"
    panel = Panel("reward", "Against RL steps", unit, smooth=True, evaluated=True)
    rows = draw_series(left, runs, panel)
    draw_series(right, runs, replace(panel, title="Against time"), against="time/wall")
    right.set_xlabel("training time (s)")
    if not rows:
        return None
    finish(figure, axes, runs, rows)
    return Exhibit(
        name="reward",
        title="Reward",
        shows="The mean reward of the sampled completions against RL steps and against training "
        "time: a thin line is one seed, a thick line the mean over seeds (smoothed), a circle the "
        "reward on the evaluation prompts.",
        expects="The paper leads one to expect that training the classifier alone moves the "
        "reward little, and that full RL after it then improves faster, for a while, than "
        "standard RL.",
        figure=figure,
        tables={"reward": Table(SERIES_COLUMNS, rows)},
    )


def confidence(runs: Sequence[Run]) -> Exhibit | None:
    """Confidence and entropy on sampled and on fixed text, and diversity of the samples."""
    places = {
        "confidence": (
            Panel("confidence/max_prob", "Confidence, sampled text", "mean max π", smooth=True),
            Panel("probe/confidence/completion", "… at fixed completion sites", "mean max π"),
            Panel("probe/confidence/prompt", "… at fixed prompt sites", "mean max π"),
        ),
        "entropy": (
            Panel("entropy", "Entropy, sampled text", "nats per token", smooth=True),
            Panel("probe/entropy/completion", "… at fixed completion sites", "nats per token"),
            Panel("probe/entropy/prompt", "… at fixed prompt sites", "nats per token"),
        ),
        "diversity": (
            Panel("diversity/distinct_2", "Diversity: distinct 2-grams", "share of 2-grams", True),
            Panel("diversity/vendi", "… Vendi score", "effective number of samples", True),
            Panel("diversity/unique", "… unique completions", "share of a prompt's samples", True),
        ),
    }
    figure, axes = grid_of_panels(3, 3, height=2.5)
    rows = Rows()
    for line, panels in zip(axes, places.values(), strict=True):
        for cell, panel in zip(line, panels, strict=True):
            rows += draw_series(cell, runs, panel)
    if not rows:
        return None
    finish(figure, axes, runs, rows)
    return Exhibit(
        name="confidence",
        title="Confidence, entropy and diversity",
        shows="How sure the policy is of its next token (top: largest probability; middle: "
        "entropy), both on what it samples itself and on fixed probe sites that do not change "
        "with it, and how varied a prompt's completions are (bottom).",
        expects="The paper leads one to expect that RL raises confidence, and with it lowers "
        "entropy and diversity, and that CF-RL raises confidence more than standard RL.",
        figure=figure,
        tables={"confidence": Table(SERIES_COLUMNS, rows)},
    )


def distance(runs: Sequence[Run]) -> Exhibit | None:
    """How far the policy has moved: KL to the reference, the classifier's norm, lengths."""
    figure, axes = grid_of_panels(2, 2, height=2.7)
    panels = (
        Panel("kl", "KL to the reference, sampled text", "nats per token", smooth=True),
        Panel(
            "probe/kl/completion", "KL to the reference, fixed completion sites", "nats per site"
        ),
        Panel("classifier/norm", "Norm of the classifier", "Frobenius norm of W"),
        Panel("completions/mean_length", "Length of the completions", "tokens", smooth=True),
    )
    rows = Rows()
    for cell, panel in zip(axes.flat, panels, strict=True):
        rows += draw_series(cell, runs, panel)
    if not rows:
        return None
    finish(figure, axes, runs, rows)
    return Exhibit(
        name="distance",
        title="Distance from the start",
        shows="How far the policy moves away from the reference it started from, how large its "
        "classifier grows, and how long its completions are.",
        expects="In supervised learning, training the classifier first makes its norm grow and "
        "the features change less; the paper leads one to expect that CF-RL works differently.",
        figure=figure,
        tables={"distance": Table(SERIES_COLUMNS, rows)},
    )
