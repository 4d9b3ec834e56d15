"""Figures of the training itself; each draws all runs, and is None if no run has the data."""

from collections.abc import Sequence
from dataclasses import replace

from jaxdyn.report.load import Run
from jaxdyn.report.plotting import Exhibit, Panel, series_exhibit


def reward(runs: Sequence[Run]) -> Exhibit | None:
    """Reward against steps and against the time spent training."""
    unit = "mean reward of a step's completions"
    steps = Panel("reward", "Against RL steps", unit, smooth=True, evaluated=True)
    seconds = replace(steps, title="Against time", against="time/wall", place="training time (s)")
    return series_exhibit(
        runs,
        [steps, seconds],
        columns=2,
        height=3.7,
        name="reward",
        title="Reward",
        shows="The mean reward of the sampled completions against RL steps and against training "
        "time: a thin line is one seed, a thick line the mean over seeds (smoothed), a circle the "
        "reward on the evaluation prompts.",
        expects="The paper leads one to expect that training the classifier alone moves the "
        "reward little, and that full RL after it then improves faster, for a while, than "
        "standard RL.",
    )


def confidence(runs: Sequence[Run]) -> Exhibit | None:
    """Confidence and entropy on sampled and on fixed text, and diversity of the samples."""
    nats = "nats per token"
    panels = [
        Panel("confidence/max_prob", "Confidence, sampled text", "mean max π", smooth=True),
        Panel("probe/confidence/completion", "… at fixed completion sites", "mean max π"),
        Panel("probe/confidence/prompt", "… at fixed prompt sites", "mean max π"),
        Panel("entropy", "Entropy, sampled text", nats, smooth=True),
        Panel("probe/entropy/completion", "… at fixed completion sites", nats),
        Panel("probe/entropy/prompt", "… at fixed prompt sites", nats),
        Panel("diversity/distinct_2", "Diversity: distinct 2-grams", "share of 2-grams", True),
        Panel("diversity/vendi", "… Vendi score", "effective number of samples", True),
        Panel("diversity/unique", "… unique completions", "share of a prompt's samples", True),
    ]
    return series_exhibit(
        runs,
        panels,
        columns=3,
        height=2.5,
        name="confidence",
        title="Confidence, entropy and diversity",
        shows="How sure the policy is of its next token (top: largest probability; middle: "
        "entropy), both on what it samples itself and on fixed probe sites that do not change "
        "with it, and how varied a prompt's completions are (bottom).",
        expects="The paper leads one to expect that RL raises confidence, and with it lowers "
        "entropy and diversity, and that CF-RL raises confidence more than standard RL.",
    )


def distance(runs: Sequence[Run]) -> Exhibit | None:
    """How far the policy has moved: KL to the reference, the classifier's norm, lengths."""
    fixed = "KL to the reference, fixed completion sites"
    panels = [
        Panel("kl", "KL to the reference, sampled text", "nats per token", smooth=True),
        Panel("probe/kl/completion", fixed, "nats per site"),
        Panel("classifier/norm", "Norm of the classifier", "Frobenius norm of W"),
        Panel("completions/mean_length", "Length of the completions", "tokens", smooth=True),
    ]
    return series_exhibit(
        runs,
        panels,
        columns=2,
        height=2.7,
        name="distance",
        title="Distance from the start",
        shows="How far the policy moves away from the reference it started from, how large its "
        "classifier grows, and how long its completions are.",
        expects="In supervised learning, training the classifier first makes its norm grow and "
        "the features change less; the paper leads one to expect that CF-RL works differently.",
    )
