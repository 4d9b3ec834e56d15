"""Two algorithms that follow from the two components: do they beat what is there?

Claim:     (ours) a whitened classifier stage, ΔW ∝ G (Σ + λI)⁻¹, buys more reward for its KL than
           CF-RL at its best m; a budget of entropy a step, ε, leaves more of best-of-N at the same
           reward than an entropy bonus.
Command:   python experiments/algorithms.py --runs RUNS --name NAME
           RUNS holds whitened_first, spill_ε, classifier_first with some m, entropy_c, and joint.
Time:      seconds; it reads logs.
Expected:  not known before. A negative result is one: not supported means that the opposite is
           shown, or that the interval lies within ±0.02 of reward.

All arms of a comparison have the same samples, batch for batch. At equal KL: both at the most that
both come to, on the line between evaluations; at equal reward likewise. Of several m, ε or c that
with the largest last reward (of ε and c: best-of-N) on the other seeds is taken. The entropy that
is kept wants another choice, as a larger m pays more of it for the same reward: at each of three
levels, shares of the rise that both kinds make, the m that keeps most; the mean over the levels.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from frame import COLOURS, Verdict, compared, keep, parser
from histories import (
    Histories,
    at,
    at_equal,
    band,
    best_elsewhere,
    histories,
    reaching,
    shared,
)

KINDS = {
    "joint": "RL",
    "classifier_first": "CF-RL",
    "whitened_first": "whitened CF-RL",
    "entropy_": "entropy bonus",
    "spill_": "budget of entropy",
}
MATTERS = 0.02
LEVELS = (0.5, 0.7, 0.9)


def of_kind(found: Histories, kind: str) -> list[str]:
    """The arms of a kind: of one schedule with every m, of one option with every value."""
    if kind.endswith("_"):
        return [arm for arm in found if arm.startswith(kind)]
    return [arm for arm in found if arm.partition("_m")[0] == kind]


def contest(
    found: Histories, ours: str, theirs: str, measure: str, equal: str, chosen_by: str | None
) -> tuple[list[float], str]:
    """Ours less theirs in a measure at equal something, over seeds, each at its best elsewhere; and
    who was chosen. Without `chosen_by` at the best in the measure itself, a mean over `LEVELS`."""
    kinds = [of_kind(found, kind) for kind in (ours, theirs)]
    gaps: list[float] = []
    who: set[str] = set()
    for seed in shared(found, *kinds[0], *kinds[1]):
        if chosen_by is None:
            each = [most_at(found, kinds, seed, measure, equal, share) for share in LEVELS]
        else:
            each = [([best_elsewhere(found, arms, seed, chosen_by) for arms in kinds], np.inf)]
        pairs = [
            at_equal(*(found[name][seed] for name in names), measure, equal, level)
            for names, level in each
        ]
        gaps.append(float(np.mean([mine - other for mine, other in pairs])))
        who.update(" against ".join(names) for names, _ in each)
    return gaps, f"Chosen were {', '.join(sorted(who))}."


def most_at(
    found: Histories, kinds: list[list[str]], seed: str, measure: str, equal: str, share: float
) -> tuple[list[str], float]:
    """Of each kind the arm with most of a measure at a level of `equal`, and the level: a share of
    the way from the start to the most that each kind comes to. Means over the other seeds."""
    others = [s for s in shared(found, *kinds[0], *kinds[1]) if s != seed] or [seed]
    mean = lambda arm, of: float(np.mean([of(found[arm][s]) for s in others]))
    most = lambda arm: mean(arm, lambda run: max(run[equal]))
    start = mean(kinds[0][0], lambda run: run[equal][0])
    level = start + share * (min(max(map(most, arms)) for arms in kinds) - start)
    there = lambda arm: mean(arm, lambda run: at(run, measure, reaching(run, equal, level)))
    return [max((a for a in arms if most(a) >= level), key=there) for arms in kinds], level


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows alone."""
    found: Histories = rows["runs"]
    contests = (
        ("whitened_first", "classifier_first", "reward", "kl", "reward",
         "The whitened stage earns more reward for its KL than CF-RL at its best m",
         "held-out reward at equal KL, whitened less CF-RL"),
        ("whitened_first", "classifier_first", "entropy", "reward", None,
         "The whitened stage keeps more entropy for its reward than CF-RL at its best m",
         "entropy at equal reward (three levels), whitened less CF-RL, nats a token"),
        ("spill_", "entropy_", "best", "reward", "best",
         "The budget of entropy leaves more of best-of-N than an entropy bonus",
         "best of all samples of a prompt at equal reward, budget less bonus"),
        ("spill_", "entropy_", "reward", "kl", "best",
         "The budget of entropy earns more reward for its KL than an entropy bonus",
         "held-out reward at equal KL, budget less bonus"),
    )  # fmt: skip
    judged = []
    for ours, theirs, measure, equal, chosen_by, claim, statistic in contests:
        if not (of_kind(found, ours) and of_kind(found, theirs)):
            continue
        gaps, note = contest(found, ours, theirs, measure, equal, chosen_by)
        if gaps:
            judged.append(compared(claim, statistic, gaps, MATTERS, note=note))
    return judged


def best_of_kind(found: Histories, kind: str, measure: str) -> str | None:
    """The arm of a kind with the largest last measure over all seeds."""
    mean = lambda arm: float(np.mean([at(run, measure) for run in found[arm].values()]))
    return max(of_kind(found, kind), key=mean, default=None)


def paths(found: Histories, arm: str, names: Sequence[str]) -> list[np.ndarray]:
    """Measures along training, means over seeds."""
    return [band([run[name] for run in found[arm].values()])[0] for name in names]


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """Reward against KL, entropy and best-of-N against reward, of each kind's best."""
    found: Histories = rows["runs"]
    panels = (("kl", "reward"), ("reward", "entropy"), ("reward", "best"))
    labels = {
        "kl": "KL to the start, nats a token",
        "reward": "held-out reward",
        "entropy": "entropy, nats a token",
        "best": "best of a prompt's samples, reward",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for (kind, label), colour in zip(KINDS.items(), COLOURS, strict=False):
        arm = best_of_kind(found, kind, "best" if kind.endswith("_") else "reward")
        if arm is None:
            continue
        for axis, panel in zip(axes, panels, strict=True):
            x, y = paths(found, arm, panel)
            axis.plot(x, y, color=colour, marker="o", markersize=3, label=f"{label}: {arm}")
    for axis, (x, y) in zip(axes, panels, strict=True):
        axis.set(xlabel=labels[x], ylabel=labels[y])
    axes[0].legend(frameon=False, fontsize=7)
    seeds = min(len(runs) for runs in found.values())
    figure.suptitle(
        f"{name}: at least {seeds} seeds an arm, means along training; of each kind the best value",
        fontsize=9,
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], dict[str, Any], plt.Figure]:
    """The answer of one model's trainings."""
    every = histories(chosen.runs)
    found = {arm: every[arm] for kind in KINDS for arm in of_kind(every, kind)}
    rows = {"runs": found}
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "algorithms", find)
