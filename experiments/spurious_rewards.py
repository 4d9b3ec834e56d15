"""What is left when the rewards are shuffled?

Claim:     alike features alone make no confidence: E_{y∼π}[Θ(o, u)(e_y − π_u)] = 0, so that to
           first order the entropy moves only with the reward, through either component; what
           shuffled rewards leave is of second order in the step η, and sampling noise (ours; a
           control for arXiv 2601.04670, and for gains under spurious rewards, Shao et al. 2025,
           arXiv 2506.10947).
Command:   python experiments/spurious_rewards.py --runs RUNS --name NAME [--size small]
           RUNS/joint and RUNS/shuffled hold seed-K: a group's rewards given to its completions at
           random in the second.
Time:      20 s a training of the anagram model on one CPU core.
Expected:  single updates: the mean over shuffles goes with η²; at the run's η it is a tenth of what
           real advantages do, and of the other sign: it raises the entropy. Trainings: a small part
           of the entropy's fall is left.

Single updates are steps along −M ∇ with M the metric of the run's own optimizer at a checkpoint, of
the batch's reward part alone, c times as long as the run's. With ΔH(±) what really happens to the
entropy at held-out tokens after a step and after its opposite, (ΔH(+) − ΔH(−)) / 2 is of first
(and third) order and (ΔH(+) + ΔH(−)) / 2 of second: shuffled advantages and their opposites are
equally likely, so that the second is what they leave on average. Trainings are ledgers along the
checkpoints, in nats a token at tokens of held-out prompts that the policies before RL wrote.

Rulings: over trainings; see `rulings.above`.
"""

from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from accounts import (
    PARTS,
    Counts,
    account,
    along,
    each_seed,
    entropies,
    followed,
    held_out,
    log_probs_at,
    loss_gradient,
    plain_arm,
    plus,
    policies,
    scaled,
    shuffled,
    taken,
    unit_weights,
)
from frame import COLOURS, Verdict, keep, parser
from rulings import above

from jaxdyn.train import SavedRun

LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Steps in units of the run's own."""

DRAWS = 8


def training(saved: SavedRun, counts: Counts) -> dict[str, Any]:
    """ΔH of a whole training by component, nats a token."""
    found = account(saved, policies(saved), held_out(saved, saved.loaded.params, counts).tokens)
    parts = {part: x.sum(axis=0).mean() for part, x in found.parts["entropy"].items()}
    rate = saved.config.optim.learning_rate
    return {**parts, "change": found.change("entropy").sum(axis=0).mean(), "rate": rate}


def real(saved: SavedRun, counts: Counts) -> dict[str, Any]:
    """The training, and single updates of it with real and with shuffled advantages."""
    steps = followed(saved, counts.updates)
    updates = [single_update(saved, step, counts) for step in steps]
    return {"training": training(saved, counts), "updates": updates, "steps": steps}


def single_update(saved: SavedRun, step: int, counts: Counts) -> dict[str, Any]:
    """The odd and the even part of ΔH by the step's length, nats a token."""
    task, model = saved.task, saved.task.model
    prepared, update = taken(saved, step)
    batch, groups = prepared.batch, task.config.train.num_generations
    per_unit, _ = unit_weights(task, update.before, prepared)
    advantages = np.asarray(batch.advantages, np.float32)
    tokens = held_out(saved, update.before, counts, step + 1).tokens
    here = entropies(log_probs_at(model, update.before, tokens))

    def parts(given: np.ndarray) -> list[list[float]]:
        """(odd, even) by length of the step that these advantages make."""
        weights = jnp.asarray(per_unit * given[:, None, None])
        gradient = loss_gradient(
            model, update.before, batch, weights, jnp.float32(update.temperature)
        )
        change = along(update.metric, gradient)

        def moved(length: float) -> float:
            there = log_probs_at(model, plus(update.before, scaled(change, length)), tokens)
            return float((entropies(there) - here).mean())

        pairs = [(moved(c), moved(-c)) for c in LENGTHS]
        return [[(a - b) / 2, (a + b) / 2] for a, b in pairs]

    draws = shuffled(advantages, groups, min(DRAWS, counts.shuffles), step)
    return {
        "rate": prepared.rate,
        "lengths": LENGTHS,
        "real": parts(advantages),
        "shuffled": [parts(draw) for draw in draws],
    }


def left(update: dict[str, Any]) -> np.ndarray:
    """What shuffled advantages leave on average, by length."""
    return np.asarray(update["shuffled"])[..., 1].mean(axis=0)


def slope(lengths: Any, values: Any) -> float:
    """Of log |value| against log length."""
    return float(np.polyfit(np.log(lengths), np.log(np.abs(values)), 1)[0])


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows of every training, {"joint": …, "shuffled": …}."""
    at_one = LENGTHS.index(1.0)
    slopes, ratios, remains, both = [], [], [], []
    for seed, row in rows["joint"].items():
        slopes.append(np.mean([slope(u["lengths"], left(u)) for u in row["updates"]]))
        own = np.mean([u["real"][at_one][0] for u in row["updates"]])
        remains.append(np.mean([left(u)[at_one] for u in row["updates"]]))
        ratios.append(remains[-1] / own)
        if seed in rows["shuffled"]:
            both.append((row["training"], rows["shuffled"][seed]))
    found = [
        above(
            "What a step with shuffled advantages leaves of the entropy grows faster than the step",
            "log-log slope of |mean ΔH| against the step's length (first order 1, second 2)",
            slopes,
            1.5,
            f"At the run's own length it is {np.mean(remains):+.1e} nats a token, "
            f"{np.mean(ratios):.3f} of what real advantages do to first order.",
        )
    ]
    if both:
        fall = lambda x, part: -x[part]
        found.append(
            above(
                "Shuffled rewards leave less than a tenth of the entropy's fall",
                "a tenth of the fall under real rewards less the fall under shuffled, nats a token",
                [0.1 * fall(a, "change") - fall(b, "change") for a, b in both],
                note="real: "
                f"{np.mean([fall(a, 'change') for a, _ in both]):.3f} nats, shuffled: "
                f"{np.mean([fall(b, 'change') for _, b in both]):.3f}.",
            )
        )
        found.append(
            above(
                "Through the representation component real rewards take more entropy than shuffled",
                "representation's part of the fall, real less shuffled, nats a token",
                [fall(a, PARTS[0]) - fall(b, PARTS[0]) for a, b in both],
            )
        )
    return found


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """ΔH by length of single updates; ΔH of trainings by component."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    updates = [u for row in rows["joint"].values() for u in row["updates"]]
    size = lambda values: np.mean(np.abs(values), axis=0)
    odd = np.array([[x[0] for x in u["real"]] for u in updates])
    noise = np.array([np.asarray(u["shuffled"])[..., 0].std(axis=0) for u in updates])
    even = np.array([left(u) for u in updates])
    lines = {
        "real advantages, odd part": (size(odd), "o-"),
        "shuffled, odd part: sd over draws": (size(noise), "s--"),
        "shuffled, even part: what is left": (size(even), "^-"),
    }
    for (label, (values, style)), colour in zip(lines.items(), COLOURS, strict=False):
        axes[0].loglog(LENGTHS, values, style, color=colour, label=label)
    for order, style in ((1, ":"), (2, "-.")):
        guide = size(even)[0] * (np.array(LENGTHS) / LENGTHS[0]) ** order
        axes[0].loglog(LENGTHS, guide, style, color="grey", label=f"slope {order}", linewidth=0.8)
    axes[0].set_xticks(LENGTHS, [f"{c:g}" for c in LENGTHS])
    axes[0].minorticks_off()
    axes[0].set_xlabel("length of the step, in units of the run's")
    axes[0].set_ylabel("|ΔH|, nats a token")
    axes[0].set_title(f"single updates (mean of {len(updates)})")
    axes[0].legend(frameon=False, fontsize=8)
    arms = {
        "real": [row["training"] for row in rows["joint"].values()],
        "shuffled": list(rows["shuffled"].values()),
    }
    for number, part in enumerate((*PARTS, "change")):
        for place, trainings in enumerate(arms.values()):
            own = [x[part] for x in trainings]
            at = place + (number - 1) * 0.27
            label = part if place == 0 else None
            axes[1].bar(at, np.mean(own or [0]), 0.25, color=COLOURS[number], label=label)
            axes[1].plot([at] * len(own), own, ".", color="black", markersize=3)
    axes[1].set_xticks(range(2), [f"{arm} ({len(x)} trainings)" for arm, x in arms.items()])
    axes[1].set_ylabel("ΔH of a training, nats a token")
    axes[1].set_title("trainings, by component")
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[1].legend(frameon=False)
    figure.suptitle(f"{name}: the entropy at held-out tokens under real and shuffled rewards")
    figure.tight_layout()
    return figure


def find(chosen):
    there = (chosen.runs / "shuffled").is_dir()
    rows = {
        "joint": each_seed(chosen, plain_arm(chosen.runs), real),
        "shuffled": each_seed(chosen, "shuffled", training) if there else {},
    }
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "spurious_rewards", find)
