"""Does best-of-N narrow the gaps between the model before RL, RL and CF-RL?

Claim:     the policies' gap in reward narrows as the best of N samples is taken, as N grows
           (Tomihari 2026, arXiv 2601.04670, the section on best-of-N).
Command:   python experiments/best_of_n.py --runs RUNS --name NAME [--size full]
           RUNS holds joint and, for CF-RL's gap, classifier_first.
Time:      four seconds a seed of the anagram model.
Expected:  it narrows, and past some N the model before RL is ahead. Where the reward is 0 or 1 both
           come to 1 in the end, so that narrowing alone says little; who is ahead says more.

All policies answer the same held-out prompts with the same keys, so that gaps are between pairs;
best-of-N is the unbiased mean over all subsets of N of M ≥ 64 samples (`best_of_n`).
"""

from argparse import Namespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from frame import COLOURS, Verdict, arms, compared, keep, of_size, parser
from histories import band
from samples import sampled, trained

from jaxdyn.dynamics.sampling import best_of_n, powers_of_two

SIZES = {"toy": (4, 8), "brief": (8, 64), "small": (32, 64), "full": (100, 128)}
"""Held-out prompts, and samples of each (M)."""

POLICIES = {"before": "before RL", "joint": "RL", "classifier_first": "CF-RL"}
MATTERS = 0.02


def curves(rewards: np.ndarray) -> np.ndarray:
    """Best-of-N of each prompt, for the powers of two to M, [n, P]."""
    return np.array([best_of_n(rewards, n) for n in powers_of_two(rewards.shape[1])])


def look(chosen: Namespace) -> dict[str, Any]:
    """By seed and policy, best-of-N's mean over prompts; and its gap to RL, over pairs of prompts,
    with its standard error."""
    prompts, samples = of_size(SIZES, chosen.size)
    found: dict[str, dict[str, np.ndarray]] = {}
    for arm in ("joint", "classifier_first"):
        for run in trained(chosen.runs, arm) if arm in arms(chosen.runs) else ():
            own = found.setdefault(run.seed, {})
            todo = {arm: run.after} | ({} if "before" in own else {"before": run.before})
            for name, params in todo.items():
                rewards = sampled(run.task, params, prompts, samples).rewards.total
                own[name] = curves(rewards.reshape(prompts, samples))
    rows: dict[str, Any] = {"n": powers_of_two(samples), "prompts": prompts, "seeds": {}}
    for seed, own in found.items():
        if "joint" not in own:
            continue
        gaps = {name: own["joint"] - own[name] for name in own if name != "joint"}
        error = lambda gap: np.nanstd(gap, axis=1, ddof=1) / np.sqrt(prompts)
        rows["seeds"][seed] = {
            "best": {name: np.nanmean(curve, axis=1) for name, curve in own.items()},
            "gap": {name: np.nanmean(gap, axis=1) for name, gap in gaps.items()},
            "gap_error": {name: error(gap) for name, gap in gaps.items()},
        }
    return rows


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows alone."""
    largest, found = rows["n"][-1], []
    gaps = lambda name: np.array(
        [row["gap"][name] for row in rows["seeds"].values() if name in row["gap"]]
    )
    before = gaps("before")
    last = lambda name: np.mean([row["best"][name][-1] for row in rows["seeds"].values()])
    found.append(
        compared(
            "Best-of-N narrows RL's lead over the model before it",
            f"RL's lead in reward at N = 1 less at N = {largest}",
            before[:, 0] - before[:, -1],
            MATTERS,
            over="trainings",
        )
    )
    found.append(
        compared(
            f"With N = {largest} the model before RL is ahead of it",
            f"best of {largest}, before less after RL, reward",
            -before[:, -1],
            MATTERS,
            over="trainings",
            note=f"Best of all they are {last('before'):.3f} and {last('joint'):.3f}.",
        )
    )
    first = gaps("classifier_first")
    if len(first):
        sign = np.sign(first[:, 0].mean()) or 1.0
        ahead = "RL" if sign > 0 else "CF-RL"
        found.append(
            compared(
                "Best-of-N narrows the gap between CF-RL and RL",
                f"lead of the one ahead in reward at N = 1 less at N = {largest}",
                sign * (first[:, 0] - first[:, -1]),
                MATTERS,
                note=f"Ahead at N = 1 is {ahead}, by {abs(first[:, 0].mean()):.3f}.",
            )
        )
    return found


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """Best-of-N by policy, and RL's lead."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    seeds = list(rows["seeds"].values())
    for (policy, label), colour in zip(POLICIES.items(), COLOURS[-1:] + COLOURS, strict=False):
        of = lambda kind, policy=policy: [row[kind][policy] for row in seeds if policy in row[kind]]
        if not of("best"):
            continue
        for axes, kind in ((left, "best"), (right, "gap")):
            if not of(kind):
                continue
            mean, low, high = band(of(kind))
            dashes = "--" if policy == "classifier_first" else "-"
            axes.plot(rows["n"], mean, dashes, color=colour, marker="o", markersize=3, label=label)
            axes.fill_between(rows["n"], low, high, color=colour, alpha=0.2, linewidth=0)
    left.set(xlabel="N", ylabel="best-of-N, held-out reward")
    right.set(xlabel="N", ylabel="RL's lead over it, reward")
    right.axhline(0, color="0.6", linewidth=0.7)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{name}: {len(seeds)} seeds, {rows['prompts']} prompts, {rows['n'][-1]} samples of each; "
        "bands: ± 2 standard errors over seeds",
        fontsize=9,
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], dict[str, Any], plt.Figure]:
    """The answer of one model's trainings."""
    rows = look(chosen)
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "best_of_n", find)
