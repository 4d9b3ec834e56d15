"""Do the fifth of the tokens with the highest entropy carry the change?

Claim:     the 20 % of tokens with the highest entropy drive RL: they alone are worth training on
           (Wang et al. 2025, Beyond the 80/20 rule, arXiv 2506.01939).
Command:   python experiments/forking_tokens.py --runs RUNS --name NAME [--size small]
           RUNS/joint/seed-K are runs of `jaxdyn rl` that keep their checkpoints.
Time:      15 s a training of the anagram model on one CPU core.
Expected:  as places, they carry about their fifth of the reward's change and less than half of the
           entropy's; as teachers a third of the reward's and little of the entropy's.

As places: along a training, segment by segment, J(b) − J(a) = E_a[w Σ_t Δ log π(y_t)] exactly
(`jaxdyn.dynamics.reward_change`), so that each token has a part of the reward's change; and ΔH is a
mean over tokens anyway. Tokens are those that the policy at the segment's beginning samples at
held-out prompts, ranked by its entropy there. As teachers: of single updates in the metric of the
run's optimizer, the first-order gain at held-out prompts of the gradient of these tokens of the
batch alone, as a part of all tokens'.

Rulings: "carry" is more than half of the change, over trainings; see `rulings.above`.
"""

from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from accounts import (
    Counts,
    along,
    each_seed,
    entropies,
    entropy_change,
    first_order,
    followed,
    held_out,
    log_probs_at,
    loss_gradient,
    plain_arm,
    segments,
    taken,
    target_change,
    unit_weights,
)
from frame import COLOURS, Verdict, keep, parser
from rulings import above, column

from jaxdyn.train import SavedRun
from jaxdyn.train.policy import completion_statistics
from jaxdyn.train.sharing import batch_features

SHARES = (0.1, 0.2, 0.3, 0.5, 0.8, 1.0)
FIFTH = SHARES.index(0.2)


def cumulative(values: np.ndarray, entropy: np.ndarray) -> list[float]:
    """Σ of the values over the given shares of the tokens, from the highest entropy on."""
    ranked = values[np.argsort(-entropy, kind="stable")]
    return [float(ranked[: max(1, round(share * len(ranked)))].sum()) for share in SHARES]


def places(saved: SavedRun, counts: Counts) -> dict[str, Any]:
    """The reward's change, ΔH and H itself by share of the tokens, summed over segments."""
    sums = {name: np.zeros(len(SHARES)) for name in ("reward", "entropy", "held")}
    for segment in segments(saved, counts, through="features"):
        entropy = entropies(segment.before)
        reward = segment.weights * segment.account.change("log_prob")[0]
        change = segment.account.change("entropy")[0] / len(entropy)
        sums["reward"] += cumulative(reward, entropy)
        sums["entropy"] += cumulative(change, entropy)
        sums["held"] += cumulative(entropy / len(entropy), entropy)
    return {name: x.tolist() for name, x in sums.items()}


def teachers(saved: SavedRun, step: int, counts: Counts) -> dict[str, Any]:
    """First-order gains and ΔH at held-out prompts by share of the batch's tokens that teach."""
    task, model = saved.task, saved.task.model
    prepared, update = taken(saved, step)
    batch, temperature = prepared.batch, jnp.float32(update.temperature)
    per_unit, _ = unit_weights(task, update.before, prepared)
    weights = per_unit * np.asarray(batch.advantages)[:, None, None]
    phi = batch_features(model, update.before["backbone"], batch)
    head = model.view(update.before)["classifier"]
    seen = completion_statistics(model, head, phi, batch.completion_ids, 1.0)
    mask = np.asarray(batch.completion_mask)
    entropy = np.where(mask, np.asarray(seen.entropy), -np.inf)
    rank = np.argsort(np.argsort(-entropy, axis=None)).reshape(mask.shape) / mask.sum()
    look = held_out(saved, update.before, counts, step + 1)
    before = log_probs_at(model, update.before, look.tokens)
    found: dict[str, Any] = {"reward": [], "entropy": []}
    for share in SHARES:
        taught = jnp.asarray(np.where((rank < share)[..., None], weights, 0).astype(np.float32))
        gradient = loss_gradient(model, update.before, batch, taught, temperature)
        change = along(update.metric, gradient)
        moved = sum(first_order(model, update.before, change, look.tokens).values())
        gain = target_change(before, moved, look.tokens.targets)
        found["reward"].append(float(gain @ look.gains))
        found["entropy"].append(float(entropy_change(before, moved).mean()))
    return found


def look_at(saved: SavedRun, counts: Counts) -> dict[str, Any]:
    steps = followed(saved, counts.updates)
    found = [teachers(saved, step, counts) for step in steps]
    taught = {name: np.sum([x[name] for x in found], axis=0).tolist() for name in found[0]}
    return {"places": places(saved, counts), "teachers": taught, "steps": steps}


def fifth(curve: list[float]) -> float:
    """What the fifth carries of the whole."""
    return curve[FIFTH] / curve[-1]


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows of every training."""
    named = {"reward": "reward's change", "entropy": "entropy's change"}
    roles = {"places": "holds", "teachers": "teaches"}
    held = np.mean([fifth(x) for x in column(rows, "places", "held")])
    return [
        above(
            f"The fifth of the tokens with the highest entropy {role} more than half of the {what}",
            f"the fifth's part of the {what}, as {kind}",
            [fifth(x) for x in column(rows, kind, name)],
            0.5,
            f"They hold {held:.2f} of the entropy itself." if kind == "places" else "",
        )
        for kind, role in roles.items()
        for name, what in named.items()
    ]


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """Cumulative parts by share of the tokens."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, kind in zip(axes, ("places", "teachers"), strict=True):
        names = ("reward", "entropy", "held")[: 3 if kind == "places" else 2]
        for what, colour in zip(names, COLOURS, strict=False):
            each = np.array([np.array(x) / x[-1] for x in column(rows, kind, what)])
            label = {"reward": "reward's change", "entropy": "entropy's change"}
            text = label.get(what, "entropy held at the beginning")
            axis.errorbar(
                np.array(SHARES) * 100,
                each.mean(axis=0),
                each.std(axis=0),
                fmt="o-",
                color=colour,
                label=text,
                capsize=3,
            )
        axis.plot([0, 100], [0, 1], ":", color="grey", label="all tokens alike")
        axis.axvline(20, color="black", linewidth=0.6)
        axis.set_xlabel("tokens with the highest entropy, %")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("part of the whole")
    axes[0].set_title("as places, along a training")
    axes[1].set_title("as teachers, single updates")
    figure.suptitle(f"{name}: held-out prompts; means of {len(rows)} trainings ± 1 sd")
    figure.tight_layout()
    return figure


def find(chosen):
    rows = each_seed(chosen, plain_arm(chosen.runs), look_at)
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "forking_tokens", find)
