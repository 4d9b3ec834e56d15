"""Why is the representation component little of an update and much of a training?

Claim:     W's updates add up and the body's largely cancel (ours; arXiv 2601.04670 looks at single
           updates along a training).
Command:   python experiments/accumulation.py --runs RUNS --name NAME [--size small]
           RUNS/joint/seed-K are runs of `jaxdyn rl` that keep their checkpoints.
Time:      20 s a training of the anagram model on one CPU core.
Expected:  of single updates' Δ log π two hundredths are representation's, of the whole training's a
           tenth; from checkpoint to checkpoint W's parts agree (a cosine of 0.8) and the body's do
           not (-0.1), while fresh gradients that follow each other agree a little more or not.

Single updates are taken again after checkpoints, a few in a row; their first-order Δ log π of every
token of the vocabulary at fixed held-out sites, by component, is a vector c_t [N V], once of the
whole update and once of its fresh gradient alone (Adam's momentum makes updates alike by itself).
The cosines are ⟨c_t, c_t+k⟩ / ‖c_t‖ ‖c_t+k‖. From checkpoint to checkpoint the same of the ledger's
parts of Δ log π of the sites' tokens. Shares are ⟨part, whole⟩ / ⟨whole, whole⟩. How much adds up
is ‖Σ c‖² / Σ ‖c‖²: the number of terms if all agree, 1 if they are independent, 0 if they cancel.

Rulings: of representation's figure less the gradient component's, over trainings; see
`rulings.above`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from accounts import (
    PARTS,
    Counts,
    Tokens,
    account,
    each_seed,
    first_order,
    followed,
    held_out,
    log_probs_at,
    plain_arm,
    policies,
)
from frame import COLOURS, Verdict, keep, parser
from rulings import above, column

from jaxdyn.optim import stage_at
from jaxdyn.train import SavedRun
from jaxdyn.train.retake import take_updates
from jaxdyn.train.state import begin_stage
from jaxdyn.train.step import prepare_step
from jaxdyn.types import Params

IN_A_ROW = 5
"""How many updates are taken after a checkpoint."""

LAGS = (1, 2, 4)


def look_at(saved: SavedRun, counts: Counts) -> dict[str, Any]:
    """Shares, cosines and sums of single updates, and of the segments between checkpoints."""
    tokens = held_out(saved, saved.loaded.params, counts).tokens
    row = min(IN_A_ROW, saved.plan[-1].end - saved.steps[0])
    steps = followed(saved, counts.updates, row)
    updates = [updates_after(saved, step, row, tokens) for step in steps]
    found = account(saved, policies(saved), tokens)
    parts = found.parts["log_prob"]
    return {
        "steps": steps,
        "updates": updates,
        "segments": summary(parts),
        "segments_shares": shares_of(parts),
        "training_share": share(
            parts["representation"].sum(axis=0), found.change("log_prob").sum(axis=0)
        ),
    }


def updates_after(saved: SavedRun, step: int, count: int, tokens: Tokens) -> dict[str, Any]:
    """What `count` updates after a checkpoint did at the sites, each from where it was made."""
    task = saved.task
    stage, state = saved.begin(step)
    whole: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    fresh: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for number in range(step, step + count):
        if number == stage.end:
            stage = stage_at(saved.plan, number)
            state = begin_stage(saved.loaded.layout, saved.config.optim, stage, state)
        prepared = prepare_step(task, state, stage, number)
        for update in take_updates(task, state, stage, prepared):
            applied = jax.tree.map(jnp.subtract, update.after, update.before)
            rest = [change.delta for change in update.others.values()]
            alone = jax.tree.map(lambda x, *others: x - sum(others), applied, *rest)
            for found, change in ((whole, applied), (fresh, alone)):
                for part, x in propagated(task.model, update.before, change, tokens).items():
                    found[part].append(x)
            last = update.state
        state = state.replace(**vars(last))
    stacked = [{part: np.stack(x) for part, x in found.items()} for found in (whole, fresh)]
    shares = {name: shares_of(x) for name, x in zip(("whole", "fresh"), stacked, strict=True)}
    found = {name: summary(x) for name, x in zip(("whole", "fresh"), stacked, strict=True)}
    return {"shares": shares, **found}


def propagated(model: Any, params: Params, change: Params, tokens: Tokens) -> dict[str, np.ndarray]:
    """First-order Δ log π of the whole vocabulary at the tokens by component, [N V]."""
    probs = np.exp(log_probs_at(model, params, tokens))
    centred = lambda x: (x - np.sum(probs * x, axis=1, keepdims=True)).ravel()
    return {part: centred(x) for part, x in first_order(model, params, change, tokens).items()}


def share(part: np.ndarray, whole: np.ndarray) -> float:
    """⟨part, whole⟩ / ⟨whole, whole⟩."""
    return float(part @ whole / (whole @ whole))


def shares_of(parts: dict[str, np.ndarray]) -> list[float]:
    """Representation's share of each of the contributions [K, M]."""
    pairs = zip(parts["representation"], sum(parts.values()), strict=True)
    return [share(part, whole) for part, whole in pairs]


def summary(parts: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of the contributions [K, M] of each component: cosines by lag, and how much adds up."""
    found = {}
    for part, x in parts.items():
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        inner = unit @ unit.T
        found[part] = {
            "cosines": {
                str(lag): float(np.diagonal(inner, lag).mean()) for lag in LAGS if lag < len(x)
            },
            "adds_up": float(np.sum(x.sum(axis=0) ** 2) / np.sum(x**2)),
            "count": len(x),
        }
    return found


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows of every training."""

    def lead(figure: Any) -> list[float]:
        return [
            np.mean([figure(u["representation"]) - figure(u["gradient"]) for u in of_seed])
            for of_seed in (fresh_of(row) for row in rows.values())
        ]

    fresh_of = lambda row: [u["fresh"] for u in row["updates"]]
    first = lambda x: x["cosines"]["1"]
    between = [
        first(row["segments"]["representation"]) - first(row["segments"]["gradient"])
        for row in rows.values()
    ]
    gained = [row["training_share"] - single_share(row) for row in rows.values()]
    mean = lambda values: f"{np.mean(values):.3f}"
    return [
        above(
            "Fresh gradients of W that follow each other agree more than the body's in what they "
            "do to held-out prompts",
            "cosine of successive contributions to Δ log π, representation less gradient component",
            lead(first),
        ),
        above(
            "From checkpoint to checkpoint representation's part of Δ log π agrees more with the "
            "one before than the gradient component's",
            "cosine of successive segments' parts, representation less gradient component",
            between,
        ),
        above(
            "Representation's share of a whole training is larger than of its single updates",
            "share of Δ log π, training less single updates",
            gained,
            note=f"single updates: {mean([single_share(r) for r in rows.values()])}, "
            f"trainings: {mean(column(rows, 'training_share'))}.",
        ),
    ]


def single_share(row: dict[str, Any]) -> float:
    """Representation's share of an update, the mean over those that were looked at."""
    return float(np.mean([u["shares"]["whole"] for u in row["updates"]]))


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """Shares of updates, segments and trainings; cosines by lag."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    seeds = list(rows.values())
    labels = ("single\nupdates", "between\ncheckpoints", "whole\ntraining")
    points = np.array(
        [[single_share(r), np.mean(r["segments_shares"]), r["training_share"]] for r in seeds]
    )
    axes[0].bar(labels, points.mean(axis=0), color=COLOURS[0])
    for line in points:
        axes[0].plot(labels, line, ".-", color="black", markersize=3, linewidth=0.5)
    axes[0].set_ylabel("representation's share of Δ log π")
    axes[0].set_title("shares")
    of_updates = lambda kind: [[u[kind] for u in row["updates"]] for row in seeds]
    kinds = {
        "fresh gradient": (of_updates("fresh"), "o-"),
        "with momentum": (of_updates("whole"), "s:"),
    }
    for label, (found, style) in kinds.items():
        curves(axes[1], found, label, style)
    axes[1].set_title("updates that follow each other")
    axes[1].set_xlabel("updates apart")
    curves(axes[2], [[row["segments"]] for row in seeds], "ledger", "o-")
    axes[2].set_title("segments between checkpoints")
    axes[2].set_xlabel("checkpoints apart")
    for axis in axes[1:]:
        axis.set_ylabel("cosine of contributions to Δ log π")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylim(-0.8, 1.1)
        axis.legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle(f"{name}: held-out tokens; means of {len(seeds)} trainings, bars ± 1 sd")
    figure.tight_layout()
    return figure


def curves(axis: Any, found: Sequence[Sequence[Any]], label: str, style: str) -> None:
    """The mean cosine by lag, and its spread over trainings."""
    lags = list(found[0][0]["representation"]["cosines"])
    for part, colour in zip(PARTS, COLOURS, strict=False):
        each = np.array(
            [[np.mean([u[part]["cosines"][lag] for u in of]) for lag in lags] for of in found]
        )
        at, sd = [int(lag) for lag in lags], each.std(axis=0)
        text = f"{part}, {label}"
        axis.errorbar(at, each.mean(axis=0), sd, fmt=style, color=colour, label=text, capsize=3)
        axis.set_xticks(at)


def find(chosen):
    rows = each_seed(chosen, plain_arm(chosen.runs), look_at)
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "accumulation", find)
