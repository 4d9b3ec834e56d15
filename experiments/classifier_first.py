"""Does a classifier stage first speed RL up, once each arm has its own learning rate for W?

Claim:     CF-RL (W alone, then everything) improves faster than standard RL (Tomihari 2026, arXiv
           2601.04670, the section on CF-RL and its figure of rewards along training).
Command:   python experiments/classifier_first.py --runs RUNS --name NAME
           RUNS holds joint, joint_extra, classifier_first and classifier_only, and what of these
           was trained with another multiplier m of the classifier's learning rate (ARM_m10).
Time:      seconds; it reads logs.
Expected:  ahead at equal joint steps, of which it has had c more in all; at equal samples behind,
           or no different, for joint training of everything learns more from a sample than W does
           alone. m matters more than the stage.

Three ways to count: by steps of joint training (the stage comes for nothing: the paper's), by
samples (against `joint_extra`, which has the stage's steps too), and by time, a step of either
stage at its own pace. The best m of an arm is chosen on the other seeds, so that a choice among
five is no advantage. Not supported means that the opposite is shown, or that the interval lies
within ±0.02 of reward.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from frame import COLOURS, Verdict, compared, keep, parser, trainings
from histories import (
    Histories,
    History,
    at,
    band,
    best_elsewhere,
    differences,
    histories,
    rise,
    shared,
)

from jaxdyn.report import load_run

MATTERS = 0.02
SCHEDULES = ("joint_extra", "classifier_first", "classifier_only")
LABELS = {
    "joint": "RL",
    "joint_extra": "RL, equal samples",
    "classifier_first": "CF-RL",
    "classifier_only": "W alone",
}


def multipliers(found: Histories, schedule: str) -> dict[int, str]:
    """The arms of a schedule by m."""
    own = [arm for arm in found if arm.partition("_m")[0] == schedule]
    return dict(sorted((int(arm.partition("_m")[2] or 1), arm) for arm in own))


def tuned(found: Histories, ours: str, theirs: str, of: Any) -> tuple[list[float], str]:
    """`of` ours less theirs, each with m chosen on the other seeds; and who was chosen."""
    arms = [list(multipliers(found, schedule).values()) for schedule in (ours, theirs)]
    gaps: list[float] = []
    who: set[str] = set()
    if min(map(len, arms)) < 2:
        return gaps, ""
    for seed in shared(found, *arms[0], *arms[1]):
        first, second = (best_elsewhere(found, names, seed, "reward") for names in arms)
        gaps.append(of(found[first][seed]) - of(found[second][seed]))
        who.add(f"{first} against {second}")
    return gaps, f"Chosen were {', '.join(sorted(who))}."


def spent(run: History) -> float:
    """Nats of entropy lost for a unit of reward gained; nan where none was."""
    gained = rise(run, "reward")
    return -rise(run, "entropy") / gained if gained > 0.02 else np.nan


def seconds_a_step(runs: Path) -> dict[str, float]:
    """Of a step of each stage, over all of CF-RL's runs: the lower decile, since others may have
    used the machine."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for path in trainings(runs, "classifier_first"):
        run = load_run(path)
        spent, stages = run.series("step_time"), run.series("cfrl/stage")
        for step, stage in stages.items():
            times[int(stage)].append(spent[step])
    return {
        name: float(np.quantile(times[stage], 0.1))
        for name, stage in (("classifier", 1), ("joint", 2))
    }


def by_base(found: Histories, arm: str, other: str) -> str:
    """The difference of the last rewards by base model."""
    groups: dict[str, list[float]] = {}
    for seed in shared(found, arm, other):
        gap = at(found[arm][seed], "reward") - at(found[other][seed], "reward")
        groups.setdefault(found[arm][seed]["base"], []).append(gap)
    return ", ".join(f"{np.mean(gaps):+.3f}" for _, gaps in sorted(groups.items()))


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows alone."""
    found: Histories = rows["runs"]
    first, extra = "classifier_first", "joint_extra"
    reward = lambda run: at(run, "reward")
    stage = rows["classifier_steps"]
    judged = [
        compared(
            "CF-RL is ahead of RL at equal steps of joint training",
            "last held-out reward, CF-RL less RL",
            differences(found, first, "joint", reward),
            MATTERS,
            note=f"CF-RL has taken its stage's {stage} steps on top. m = 1.",
        ),
        compared(
            "CF-RL is ahead of RL at equal samples",
            "last held-out reward, CF-RL less RL with the stage's extra steps",
            differences(found, first, extra, reward),
            MATTERS,
            note=f"By base model: {by_base(found, first, extra)}. m = 1.",
        ),
    ]
    arms = list(multipliers(found, extra).values())
    if len(arms) > 1:
        gains = [
            at(found[best_elsewhere(found, arms, seed, "reward")][seed], "reward")
            - at(found[extra][seed], "reward")
            for seed in shared(found, *arms)
        ]
        judged.append(
            compared(
                "A learning rate of W's own speeds RL up without any stage",
                "last held-out reward, RL with m chosen on other seeds less RL with m = 1",
                gains,
                MATTERS,
            )
        )
    gaps, who = tuned(found, first, extra, reward)
    if gaps:
        judged.append(
            compared(
                "Something of CF-RL remains once m is tuned in every arm",
                "last held-out reward at equal samples, CF-RL less RL, m chosen on other seeds",
                gaps,
                MATTERS,
                note=who,
            )
        )
    gaps, who = tuned(found, extra, "classifier_only", reward)
    if gaps:
        kl, _ = tuned(found, extra, "classifier_only", lambda run: at(run, "kl"))
        judged.append(
            compared(
                "Once m is tuned, moving the body too earns more than moving W alone",
                "last held-out reward, RL less W alone, m chosen on other seeds",
                gaps,
                MATTERS,
                note=f"RL is {np.mean(kl):.2f} nats a token farther from the start. {who}",
            )
        )
    little = [
        0.5 * rise(found[extra][s], "reward", stage) - rise(found[first][s], "reward", stage)
        for s in shared(found, first, extra)
    ]
    judged.append(
        compared(
            "The classifier stage alone moves the reward little",
            f"half of RL's gain in {stage} steps less the stage's gain in these, reward",
            little,
            MATTERS,
        )
    )
    losses = [x for x in differences(found, first, extra, spent) if np.isfinite(x)]
    if losses:
        judged.append(
            compared(
                "CF-RL pays more entropy for its reward than RL",
                "entropy lost for a unit of reward, CF-RL less RL with equal samples, nats",
                losses,
                0.1,
            )
        )
    pace = rows["seconds_a_step"]
    behind = []
    for seed in shared(found, first, extra):
        mine, other = found[first][seed], found[extra][seed]
        # As many steps of RL as fit into CF-RL's time.
        fit = mine["steps"][-1] - stage + stage * pace["classifier"] / pace["joint"]
        behind.append(at(mine, "reward") - at(other, "reward", fit))
    judged.append(
        compared(
            "CF-RL is ahead of RL at equal time",
            "held-out reward when CF-RL has ended, CF-RL less RL",
            behind,
            MATTERS,
            note=f"A step of W alone takes {pace['classifier'] / pace['joint']:.2f} of one of RL.",
        )
    )
    return judged


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """Rewards along training, the last ones against m, and entropy against reward."""
    found: Histories = rows["runs"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for schedule, colour in zip(SCHEDULES, COLOURS, strict=False):
        own = multipliers(found, schedule)
        if not own:
            continue
        best = max(own, key=lambda m: np.mean([at(r, "reward") for r in found[own[m]].values()]))
        for m, dashes in {best: "--", 1: "-"}.items():
            if m not in own:
                continue
            runs = list(found[own[m]].values())
            label = f"{LABELS[schedule]}, m = {m}"
            steps = runs[0]["steps"]
            mean, low, high = band([run["reward"] for run in runs])
            left.plot(steps, mean, dashes, color=colour, label=label)
            left.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            entropy = np.mean([run["entropy"] for run in runs], axis=0)
            right.plot(entropy, mean, dashes, color=colour, marker="o", markersize=3, label=label)
        ends = np.array(
            [band([[at(run, "reward")] for run in found[arm].values()]) for arm in own.values()]
        )[:, :, 0]
        middle.errorbar(
            list(own),
            ends[:, 0],
            (ends[:, 0] - ends[:, 1], ends[:, 2] - ends[:, 0]),
            color=colour,
            marker="o",
            capsize=3,
            label=LABELS[schedule],
        )
    left.axvline(rows["classifier_steps"], color="0.7", linewidth=0.8, linestyle=":")
    left.set(xlabel="steps (samples); dotted: the stage's end", ylabel="held-out reward")
    middle.set(xlabel="m, learning rate of W over the body's", ylabel="held-out reward at the end")
    middle.set_xscale("log")
    middle.set_xticks(every := sorted({m for s in SCHEDULES for m in multipliers(found, s)}), every)
    middle.minorticks_off()
    right.set(xlabel="entropy, nats a token", ylabel="held-out reward")
    right.invert_xaxis()
    middle.legend(frameon=False, fontsize=7)
    arms = left.get_legend_handles_labels()
    figure.legend(*arms, loc="outside lower center", ncols=6, fontsize=8)
    seeds = min(len(runs) for runs in found.values())
    figure.suptitle(
        f"{name}: {seeds} seeds an arm; bands and bars: ± 2 standard errors", fontsize=9
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], dict[str, Any], plt.Figure]:
    """The answer of one model's trainings."""
    found = histories(chosen.runs)
    found = {a: r for a, r in found.items() if a.partition("_m")[0] in (*SCHEDULES, "joint")}
    extra, plain = (next(iter(found[arm].values())) for arm in ("joint_extra", "joint"))
    rows = {
        "classifier_steps": extra["steps"][-1] - plain["steps"][-1],
        "seconds_a_step": seconds_a_step(chosen.runs),
        "runs": found,
    }
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "classifier_first", find)
