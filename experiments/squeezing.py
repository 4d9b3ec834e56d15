"""What do negative advantages do: squeeze?

Claim:     to push a token down pushes the most likely token up at the others' cost: of the mass
           that is set free the top token gets more than its part, and the rest falls behind it (Ren
           and Sutherland 2025, Learning Dynamics of LLM Finetuning, arXiv 2407.10490, the squeezing
           effect, there of DPO).
Command:   python experiments/squeezing.py --runs RUNS --name NAME [--size small]
           RUNS/joint/seed-K are runs of `jaxdyn rl` that keep their checkpoints.
Time:      10 s a training of the anagram model on one CPU core.
Expected:  at the tokens themselves the top token gains on the rest, as first order foresees; the
           gain is small beside what y loses.

At one site by itself g = −a (e_y − π) moves the logits of the others by a ‖φ‖² π_v through the
representation component, and so log(π_top / π_v) by a ‖φ‖² (π_top − π_v) > 0: whatever is likely
gains on what is not. To renormalise alone would leave it as it is. Here the whole update of a
batch's negative (or positive) advantages alone, in the metric of the run's own optimizer and as
long as its own, which couples all sites, first order by component against what really happens: to
log π(y), to log π of the top token, to the log mass of the rest, and to

    squeeze = Δ log π_top − Δ log Σ_rest π,

at the batch's own tokens with such an advantage (where y is not the top), and to H at held-out
prompts.

Rulings: over trainings; see `rulings.above`.
"""

from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from accounts import (
    PARTS,
    Counts,
    along,
    each_seed,
    entropies,
    every_token,
    first_order,
    followed,
    held_out,
    log_probs_at,
    loss_gradient,
    plain_arm,
    plus,
    taken,
    unit_weights,
)
from frame import COLOURS, Verdict, keep, parser
from rulings import above, column, mean_of

from jaxdyn.train import SavedRun
from jaxdyn.train.retake import batch_rollout

FIGURES = ("token", "top", "rest", "squeeze")
SIGNS = {"negative": lambda a: np.minimum(a, 0), "positive": lambda a: np.maximum(a, 0)}


def groups_of(log_probs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """π [N, V] restricted to y, to the top token and to the rest, where y is not the top."""
    ids = np.arange(log_probs.shape[1])
    own = ids == targets[:, None]
    top = ids == log_probs.argmax(axis=1)[:, None]
    return {"token": own, "top": top, "rest": ~own & ~top}


def predicted(log_probs: np.ndarray, change: np.ndarray, groups: dict) -> dict[str, np.ndarray]:
    """Δ log of each group's mass to first order, of a change of the logits [N, V]."""
    probs = np.exp(log_probs)
    mean = np.sum(probs * change, axis=1)
    of = lambda which: np.sum(probs * change * which, axis=1) / np.sum(probs * which, axis=1) - mean
    return with_squeeze({name: of(which) for name, which in groups.items()})


def actual(before: np.ndarray, after: np.ndarray, groups: dict) -> dict[str, np.ndarray]:
    """Δ log of each group's mass."""
    mass = lambda x, which: np.log(np.sum(np.exp(x) * which, axis=1))
    return with_squeeze({name: mass(after, w) - mass(before, w) for name, w in groups.items()})


def with_squeeze(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**found, "squeeze": found["top"] - found["rest"]}


def single_update(saved: SavedRun, step: int, counts: Counts) -> dict[str, Any]:
    """What the negative and the positive advantages of a step's batch do, each alone."""
    task, model = saved.task, saved.task.model
    prepared, update = taken(saved, step)
    batch, params = prepared.batch, update.before
    advantages = np.asarray(batch.advantages)
    per_unit, _ = unit_weights(task, params, prepared)
    everywhere = every_token(batch_rollout(prepared))
    elsewhere = held_out(saved, params, counts, step + 1).tokens
    here, there = (log_probs_at(model, params, x) for x in (everywhere, elsewhere))
    of_site, targets = advantages[everywhere.rows], everywhere.targets
    found = {}
    for sign, part_of in SIGNS.items():
        given = part_of(advantages)
        weights = jnp.asarray((per_unit * given[:, None, None]).astype(np.float32))
        temperature = jnp.float32(update.temperature)
        change = along(update.metric, loss_gradient(model, params, batch, weights, temperature))
        after = plus(params, change)
        kept = (part_of(of_site) != 0) & (here.argmax(axis=1) != targets)
        if not kept.any():
            continue
        groups = groups_of(here[kept], targets[kept])
        parts = first_order(model, params, change, everywhere)
        parts = {name: x[kept] for name, x in parts.items()}
        foreseen = {name: predicted(here[kept], x, groups) for name, x in parts.items()}
        whole = predicted(here[kept], sum(parts.values()), groups)
        seen = actual(here[kept], log_probs_at(model, after, everywhere)[kept], groups)
        moved = entropies(log_probs_at(model, after, elsewhere)) - entropies(there)
        mean = lambda x: {name: float(x[name].mean()) for name in FIGURES}
        found[sign] = {
            "actual": mean(seen),
            "first_order": mean(whole),
            **{name: mean(x) for name, x in foreseen.items()},
            "r": {name: correlation(whole[name], seen[name]) for name in FIGURES},
            "entropy_elsewhere": float(moved.mean()),
            "sites": int(kept.sum()),
        }
    return found


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where nothing varies."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def look_at(saved: SavedRun, counts: Counts) -> dict[str, Any]:
    steps = followed(saved, counts.updates)
    found = [single_update(saved, step, counts) for step in steps]
    whole = [x for x in found if set(x) == set(SIGNS)]
    if not whole:
        raise SystemExit(f"no update of {saved.path.name} has advantages of both signs")
    return {**mean_of(whole), "steps": steps}


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows of every training."""
    ratio = np.mean(column(rows, "negative", "actual", "squeeze")) / abs(
        np.mean(column(rows, "negative", "actual", "token"))
    )
    alone = column(rows, "positive", "entropy_elsewhere")
    repr_part = np.mean(column(rows, "negative", PARTS[0], "squeeze"))
    return [
        above(
            "Negative advantages squeeze: where they push a token down, the top token gains on the "
            "rest",
            "Δ log (π_top / π_rest), nats, at the pushed tokens",
            column(rows, "negative", "actual", "squeeze"),
            note=f"{ratio:.2f} of what the token itself moves; to first order "
            f"{repr_part:.2e} nats of it are representation's.",
        ),
        above(
            "Positive advantages of tokens that are not the top squeeze less than negative ones",
            "Δ log (π_top / π_rest), negative less positive, nats",
            np.subtract(
                column(rows, "negative", "actual", "squeeze"),
                column(rows, "positive", "actual", "squeeze"),
            ),
        ),
        above(
            "First order foresees at which tokens a negative update squeezes",
            "r over tokens of the squeeze, first order against actual",
            column(rows, "negative", "r", "squeeze"),
            0.9,
        ),
        above(
            "Negative advantages alone lower the entropy at held-out prompts",
            "−ΔH, nats a token",
            [-x for x in column(rows, "negative", "entropy_elsewhere")],
            note=f"positive alone: ΔH {np.mean(alone):.2e}.",
        ),
    ]


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """Actual against first order by component, for both signs."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2))
    kinds = ("actual", "first_order", *PARTS)
    labels = {"first_order": "first order"}
    for axis, sign in zip(axes, SIGNS, strict=True):
        for number, kind in enumerate(kinds):
            each = np.array([[row[sign][kind][x] for x in FIGURES] for row in rows.values()])
            at = np.arange(len(FIGURES)) + (number - 1.5) * 0.2
            axis.bar(
                at, each.mean(axis=0), 0.19, color=COLOURS[number], label=labels.get(kind, kind)
            )
            for line in each:
                axis.plot(at, line, ".", color="black", markersize=2)
        ticks = ("token y", "top token", "rest", "squeeze:\ntop − rest")
        axis.set_xticks(range(len(FIGURES)), ticks)
        axis.axhline(0, color="black", linewidth=0.8)
        sites = np.mean(column(rows, sign, "sites"))
        axis.set_title(f"{sign} advantages alone ({sites:.0f} tokens an update)")
        axis.set_ylabel("Δ log mass, nats")
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{name}: the batch's own tokens, y not the top; means of {len(rows)} trainings (dots)"
    )
    figure.tight_layout()
    return figure


def find(chosen):
    rows = each_seed(chosen, plain_arm(chosen.runs), look_at)
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "squeezing", find)
