"""How far ahead does a frozen kernel see, in RL and in supervised training?

Claim:     a kernel that is taken at one step foresees what training does for many steps to come, as
           long in RL as in supervised training from the same model (ours; that first order holds
           along a training is what arXiv 2601.04670 reads its kernels for).
Command:   python experiments/horizon.py --runs RUNS --name NAME [--size small]
           RUNS/joint/seed-K and RUNS/sft/seed-K are runs that keep their checkpoints.
Time:      15 s a pair of trainings of the anagram model on one CPU core.
Expected:  r near 1 for a few steps, and a residual that grows with the number of steps.

From a checkpoint t on, Δ log π of held-out tokens after k more steps is foreseen as
D_t (θ_{t+k} − θ_t): the side of the sites is that of step t, the updates are those that were
applied, so that Σ_s D_t P_s D_sᵀ g_s is the kernel's forecast with its first argument frozen.
Against what happened: r over tokens, and ‖actual − forecast‖ / ‖actual‖. The horizon is the largest
k, between the ones that were looked at in log k, before that residual passes 0.5.

Rulings: RL against supervised training of one seed, over seeds; see `rulings.above`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from accounts import (
    Counts,
    each_seed,
    first_order,
    followed,
    held_out,
    log_probs_at,
    plain_arm,
    target_change,
)
from frame import COLOURS, Verdict, keep, parser
from rulings import above

from jaxdyn.train import SavedRun
from jaxdyn.train.loop import STEPS
from jaxdyn.train.probe import policy_of, remember
from jaxdyn.types import Params

AHEAD = (1, 2, 4, 8)
"""Steps that are taken again after a checkpoint; later ones are checkpoints."""

LIMIT = 0.5


def states_after(saved: SavedRun, step: int) -> dict[int, Params]:
    """The policy so many steps after a checkpoint, by their number."""
    stage, state = saved.begin(step)
    found: dict[int, Params] = {}
    last = min(max(AHEAD), saved.plan[-1].end - step)
    for number in range(step, step + last):
        state = STEPS[saved.config.kind](saved.task, state, stage, number).state
        if (ahead := number + 1 - step) in AHEAD:
            found[ahead] = policy_of(remember(state))
    for later in saved.steps:
        if later - step > last:
            found[later - step] = policy_of(saved.state(later).params)
    return found


def look_at(saved: SavedRun, counts: Counts) -> dict[str, Any]:
    """r, the relative residual and the rms change by steps ahead, the mean over checkpoints."""
    model, tokens = saved.task.model, held_out(saved, saved.loaded.params, counts).tokens
    targets = tokens.targets
    own = lambda x: np.take_along_axis(x, targets[:, None], axis=1)[:, 0]
    found: dict[int, list[tuple[float, float, float]]] = {}
    steps = followed(saved, counts.updates)
    for step in steps:
        start = policy_of(saved.state(step).params)
        before = log_probs_at(model, start, tokens)
        for ahead, end in states_after(saved, step).items():
            change = jax.tree.map(jnp.subtract, end, start)
            moved = sum(first_order(model, start, change, tokens).values())
            forecast = target_change(before, moved, targets)
            actual = own(log_probs_at(model, end, tokens) - before)
            r = float(np.corrcoef(forecast, actual)[0, 1])
            size = float(np.linalg.norm(actual))
            residual = float(np.linalg.norm(actual - forecast)) / size
            found.setdefault(ahead, []).append((r, residual, size / np.sqrt(len(actual))))
    names = ("r", "residual", "change")
    curve = {
        str(ahead): dict(zip(names, np.mean(x, axis=0).tolist(), strict=True))
        for ahead, x in sorted(found.items())
    }
    return {"curve": curve, "steps": steps}


def horizon(curve: dict[str, Any]) -> float:
    """The number of steps after which the residual passes `LIMIT`; the last that was looked at, if
    it never does."""
    steps = np.array([int(k) for k in curve])
    residual = np.array([curve[k]["residual"] for k in curve])
    beyond = np.flatnonzero(residual > LIMIT)
    if not len(beyond):
        return float(steps[-1])
    first = beyond[0]
    if first == 0:
        return float(steps[0])
    low, high = residual[first - 1], residual[first]
    part = (LIMIT - low) / (high - low)
    return float(np.exp(np.interp(part, (0, 1), np.log(steps[[first - 1, first]]))))


def shared(rows: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(RL, supervised) of the seeds that have both."""
    pairs = [seed for seed in rows["rl"] if seed in rows["sft"]]
    return [(rows["rl"][seed]["curve"], rows["sft"][seed]["curve"]) for seed in pairs]


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows of every training, {"rl": …, "sft": …}."""
    curves = [row["curve"] for row in rows["rl"].values()]
    found = (
        [
            above(
                f"A frozen kernel foresees {AHEAD[-1]} steps of RL",
                f"r over tokens of Δ log π, forecast against actual, {AHEAD[-1]} steps ahead",
                [x[str(AHEAD[-1])]["r"] for x in curves if str(AHEAD[-1]) in x],
                0.9,
                f"horizon (residual {LIMIT}): {np.mean([horizon(x) for x in curves]):.1f} steps.",
            )
        ]
        if any(str(AHEAD[-1]) in x for x in curves)
        else []
    )
    if pairs := shared(rows):
        own, others = np.array([[horizon(a), horizon(b)] for a, b in pairs]).T
        found.append(
            above(
                "It sees farther in RL than in supervised training",
                "log of the horizons' ratio, RL over supervised",
                np.log(own / others),
                note=f"steps: {own.mean():.1f} and {others.mean():.1f}.",
            )
        )
    return found


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """r and the residual by steps ahead, and the residual by how much has changed."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    labels = {"rl": "RL", "sft": "supervised"}
    ahead = sorted({int(k) for row in rows["rl"].values() for k in row["curve"]})
    for (kind, label), colour in zip(labels.items(), COLOURS, strict=False):
        curves = [row["curve"] for row in rows[kind].values()]
        if not curves:
            continue
        steps = sorted({int(k) for x in curves for k in x})
        of = lambda what, curves=curves, steps=steps: [
            [x[str(k)][what] for x in curves if str(k) in x] for k in steps
        ]
        text = f"{label} ({len(curves)} trainings)"
        for axis, what in zip(axes, ("r", "residual"), strict=False):
            means, sds = [[f(x) for x in of(what)] for f in (np.mean, np.std)]
            axis.errorbar(steps, means, sds, fmt="o-", color=colour, label=text, capsize=3)
        change, residual = ([np.mean(x) for x in of(what)] for what in ("change", "residual"))
        axes[2].plot(change, residual, "o-", color=colour, label=text)
    for axis in axes[:2]:
        axis.set_xscale("log")
        axis.set_xticks(ahead, ahead)
        axis.minorticks_off()
        axis.set_xlabel("steps ahead")
    axes[2].set_xlabel("rms of Δ log π that happened, nats")
    axes[0].set_ylabel("r of forecast and actual Δ log π")
    for axis in axes[1:]:
        axis.set_ylabel("‖actual − forecast‖ / ‖actual‖")
        axis.axhline(LIMIT, color="grey", linewidth=0.8, linestyle=":")
    for axis in axes:
        axis.legend(frameon=False)
    figure.suptitle(f"{name}: a kernel frozen at a step, held-out tokens; means ± 1 sd")
    figure.tight_layout()
    return figure


def find(chosen):
    there = (chosen.runs / "sft").is_dir()
    rows = {
        "rl": each_seed(chosen, plain_arm(chosen.runs), look_at),
        "sft": each_seed(chosen, "sft", look_at) if there else {},
    }
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "horizon", find)
