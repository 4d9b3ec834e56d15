"""The runs in numbers: per schedule, mean ± standard deviation over seeds, before and after."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxdyn.report.load import CLASSIFIER_STAGE, Run
from jaxdyn.report.plotting import Rows, Table, by_schedule, look

Reading = tuple[float | None, float | None]
"""A run's value before and after training; either may be missing."""


def ends(run: Run, key: str) -> Reading:
    """First and last logged value; no `before` if it was logged only once."""
    values = list(run.series(key).values())
    return (values[0] if len(values) > 1 else None, values[-1] if values else None)


def tenths(run: Run, key: str) -> Reading:
    """Means over the first and the last tenth of the logged steps (for quantities with noise)."""
    values = list(run.series(key).values())
    width = max(1, len(values) // 10)
    if len(values) < 2:
        return ends(run, key)
    return float(np.mean(values[:width])), float(np.mean(values[-width:]))


def final(run: Run, key: str) -> Reading:
    """The value after training alone: the mean over the last tenth of the logged steps."""
    return None, tenths(run, key)[1]


def last(run: Run, key: str) -> Reading:
    """The last logged value."""
    return None, ends(run, key)[1]


def full_updates(run: Run, key: str) -> Reading:
    """Mean over the probed updates of all parameters, or of the classifier if there are no such."""
    values, stages = run.series(key), run.series("cfrl/stage")
    full = [v for step, v in values.items() if stages.get(step) != CLASSIFIER_STAGE]
    chosen = full or list(values.values())
    return None, float(np.mean(chosen)) if chosen else None


@dataclass(frozen=True)
class Quantity:
    """A row of the summary: its name, its key in the logs and how a run is read for it."""

    name: str
    key: str
    read: Callable[[Run, str], Reading]


QUANTITIES = (
    Quantity("Reward, evaluation prompts", "eval_reward", ends),
    Quantity("Correct (pass@1), evaluation prompts", "eval_pass@1", ends),
    Quantity("Reward model's accuracy, held-out pairs", "eval_accuracy", ends),
    Quantity("… of preferring the longer answer", "eval_length_accuracy", last),
    Quantity("Reward model's loss, held-out pairs (nats)", "eval_nll", ends),
    Quantity("Reward model's calibration error", "eval_ece", ends),
    Quantity("Reward, training prompts", "reward", tenths),
    Quantity("Confidence (max π), sampled text", "confidence/max_prob", tenths),
    Quantity("Confidence, fixed completion sites", "probe/confidence/completion", ends),
    Quantity("Entropy, sampled text (nats)", "entropy", tenths),
    Quantity("Entropy, fixed completion sites (nats)", "probe/entropy/completion", ends),
    Quantity("Diversity (Vendi score), training", "diversity/vendi", tenths),
    Quantity("Likeness (self-BLEU), training", "diversity/self_bleu", tenths),
    Quantity("Unique completions, training", "diversity/unique", tenths),
    Quantity("Diversity (Vendi score), evaluation", "eval_diversity/vendi", ends),
    Quantity("Likeness (self-BLEU), evaluation", "eval_diversity/self_bleu", ends),
    Quantity("Unique completions, evaluation", "eval_diversity/unique", ends),
    Quantity("KL to the reference (nats per token)", "kl", final),
    Quantity("Share of the representation component", "share/representation", full_updates),
    Quantity("Share of the gradient component", "share/gradient", full_updates),
    Quantity("Share of the cross component", "share/cross", full_updates),
    Quantity("Predicted against actual change (r)", "delta/correlation", full_updates),
    Quantity("Feature pairs below 0, prompts", "features/prompt/negative_share", ends),
    Quantity("Feature pairs below 0, completions", "features/completion/negative_share", ends),
    Quantity("Norm of the classifier", "classifier/norm", ends),
    Quantity("Training time (s)", "time/wall", last),
)


def quantities(runs: Sequence[Run]) -> list[Quantity]:
    """The rows of the summary, with the task metrics that the runs logged after the reward."""
    prefix = "eval_metrics/"
    keys = {key for run in runs for record in run.metrics for key in record}
    names = sorted(
        key.removeprefix(prefix)
        for key in keys
        if key.startswith(prefix) and not key.endswith(("_ci_low", "_ci_high"))
    )
    metrics = [Quantity(f"Metric: {n}, evaluation prompts", f"{prefix}{n}", ends) for n in names]
    return [*QUANTITIES[:1], *metrics, *QUANTITIES[1:]]


def by_run(runs: Sequence[Run]) -> Table:
    """Every quantity of every run, before and after."""
    rows = Rows()
    for quantity in quantities(runs):
        for run in runs:
            before, after = quantity.read(run, quantity.key)
            if after is not None:
                rows.append((quantity.key, run.schedule, run.seed, run.name, before, after))
    return Table(("quantity", "schedule", "seed", "run", "before", "after"), rows)


def by_group(runs: Sequence[Run]) -> Table:
    """Mean and standard deviation (ddof 1) over a schedule's runs; None where there is no value."""
    readings, rows = by_run(runs).rows, Rows()
    for quantity in quantities(runs):
        for schedule in by_schedule(runs):
            chosen = [r[4:] for r in readings if r[:2] == (quantity.key, schedule)]
            if chosen:
                before, after = (_mean_and_sd(values) for values in zip(*chosen, strict=True))
                rows.append((quantity.key, schedule, len(chosen), *before, *after))
    columns = ("quantity", "schedule", "runs", "before_mean", "before_sd", "after_mean", "after_sd")
    return Table(columns, rows)


def display(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The summary as text: a header, and a row a quantity that some run logged."""
    groups = by_schedule(runs)
    cells = {row[:2]: row[3:] for row in by_group(runs).rows}
    header = ["", *(look(schedule).label for schedule in groups)]
    steps = [" / ".join(map(str, sorted({r.steps for r in g}))) for g in groups.values()]
    lines = [
        ["Runs (seeds)", *(f"{len(g)} ({_seeds(g)})" for g in groups.values())],
        ["RL steps", *steps],
    ]
    for quantity in quantities(runs):
        found = [cells.get((quantity.key, schedule)) for schedule in groups]
        zero = quantity.key == "share/cross" and not any(cell and cell[2] for cell in found)
        if any(found) and not zero:
            lines.append([quantity.name, *(_arrow(cell) for cell in found)])
    return header, lines


def in_words(runs: Sequence[Run]) -> list[str]:
    """The main numbers as sentences that say what was measured and conclude nothing."""
    table = {row[:2]: row[3:] for row in by_group(runs).rows}
    sentences = []
    for schedule, group in by_schedule(runs).items():
        parts = []
        for name, keys in _SPOKEN.items():
            cell = next((table[key, schedule] for key in keys if (key, schedule) in table), None)
            if cell and cell[0] is not None:
                parts.append(f"{name} went from {number(cell[0])} to {number(cell[2])}")
        for name, key in _SPOKEN_ALONE.items():
            if (key, schedule) in table:
                parts.append(f"{name} {number(table[key, schedule][2])}")
        if parts:
            sentences.append(f"Under {look(schedule).label} (n = {len(group)}), {_listing(parts)}.")
    for against in ("joint", "joint_extra"):
        difference = paired_difference(runs, "classifier_first", against)
        if difference:
            mean, deviation, pairs = difference
            spread = f"standard deviation {number(deviation)}, " if deviation is not None else ""
            sentences.append(
                f"With the same seeds, CF-RL's reward ended {number(abs(mean))} "
                f"{'above' if mean >= 0 else 'below'} that of {look(against).label} "
                f"({spread}n = {pairs})."
            )
    return sentences


def paired_difference(
    runs: Sequence[Run], schedule: str, against: str
) -> tuple[float, float | None, int] | None:
    """Mean, deviation and number of differences in final reward between runs of equal seed.

    The reward is the evaluation's if every run has one, else the training's.
    """
    readings = by_run(runs).rows
    evaluated = {row[3] for row in readings if row[0] == "eval_reward"}
    key = "eval_reward" if evaluated == {run.name for run in runs} else "reward"
    final_reward = {(row[1], row[2]): row[5] for row in readings if row[0] == key}
    differences = [
        value - final_reward[against, seed]
        for (s, seed), value in final_reward.items()
        if s == schedule and seed is not None and (against, seed) in final_reward
    ]
    if not differences:
        return None
    return float(np.mean(differences)), _mean_and_sd(differences)[1], len(differences)


def number(value: float, like: float | None = None) -> str:
    """A value with about three significant digits, or with as many decimals as `like` has."""
    size = abs(value if like is None else like)
    if size >= 0.01 or size == 0:
        decimals = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    else:
        decimals = min(6, 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}"


_SPOKEN = {  # the first of the keys that was logged
    "the reward": ("eval_reward", "reward"),
    "confidence": ("confidence/max_prob", "probe/confidence/completion"),
    "entropy": ("entropy", "probe/entropy/completion"),
    "diversity (Vendi score)": ("eval_diversity/vendi", "diversity/vendi"),
}
_SPOKEN_ALONE = {
    "the representation component's share of the predicted change was": "share/representation",
    "the predicted followed the actual change with r =": "delta/correlation",
}


def _mean_and_sd(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    present = [value for value in values if value is not None]
    if not present:
        return None, None
    return float(np.mean(present)), float(np.std(present, ddof=1)) if len(present) > 1 else None


def _arrow(cell: tuple | None) -> str:
    if cell is None:
        return "–"
    before, after = _plus_minus(*cell[:2]), _plus_minus(*cell[2:])
    return f"{before} → {after}" if before else after


def _plus_minus(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return ""
    return number(mean) + ("" if deviation is None else f" ± {number(deviation, like=mean)}")


def _seeds(group: Sequence[Run]) -> str:
    return ", ".join("?" if run.seed is None else str(run.seed) for run in group)


def _listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
