"""What does the reward cost, by component and by layer?

Claim:     a nat of KL does not buy the same everywhere: the representation component, which copies
           updates onto every site, pays more KL for its part of the reward than the body (ours).
Command:   python experiments/kl_price.py --runs RUNS --name NAME [--size small]
           RUNS/joint/seed-K are runs of `jaxdyn rl` that keep their checkpoints.
Time:      20 s a training of the anagram model on one CPU core.
Expected:  parts of the KL and of the reward, which each sum to 1; a component that has more of the
           first than of the second is dear.

The KL of the policy to the one before RL, at tokens of held-out prompts that the policy after RL
wrote, is split by the ledger along the checkpoints; so is the reward's change, by
J(b) − J(a) = E_a[w Σ_t Δ log π(y_t)] (`jaxdyn.dynamics.reward_change`), segment by segment with
completions of the segment's first policy. Both by component, and by layer. (The KL at fixed tokens:
that other tokens come to be sampled is no part of it.) The estimate of the reward's change is held
against the difference of the rewards of the policies before and after.

Rulings: over trainings; see `rulings.above`.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from accounts import (
    PARTS,
    Counts,
    account,
    each_seed,
    held_out,
    plain_arm,
    policies,
    segments,
)
from frame import COLOURS, Verdict, keep, parser
from rulings import above, column

from jaxdyn.train import SavedRun


def look_at(saved: SavedRun, counts: Counts) -> dict[str, Any]:
    """The parts of the KL and of the reward's change."""
    last = saved.policy(merged=False)[1]
    end, start = held_out(saved, last, counts), held_out(saved, saved.loaded.params, counts)
    found = account(saved, policies(saved), end.tokens, by_layer=("kl",))
    kl = {part: float(x.sum(axis=0).mean()) for part, x in found.parts["kl"].items()}
    kl_layers = by_place(found.by_layer["kl"], 1 / end.tokens.count)
    reward = dict.fromkeys(PARTS, 0.0)
    layers: dict[str, float] = {}
    for segment in segments(saved, counts, by_layer=("log_prob",)):
        for part in PARTS:
            own = segment.account.parts["log_prob"][part][0]
            reward[part] += float(segment.weights @ own)
        of_text = np.zeros(segment.look.rewards.size)
        of_text[segment.look.tokens.rows] = segment.weights
        for place, x in by_place(segment.account.by_layer["log_prob"], of_text).items():
            layers[place] = layers.get(place, 0.0) + x
    return {
        "kl": kl,
        "kl_by_place": kl_layers,
        "reward": reward,
        "reward_by_place": layers,
        "kl_change": float(found.change("kl").sum(axis=0).mean()),
        "reward_seen": float(end.rewards.mean() - start.rewards.mean()),
    }


def by_place(kinds: dict[str, np.ndarray], weights: Any) -> dict[str, float]:
    """Σ over segments and texts of {kind: [K, B, L]} by place in the model."""
    depth = max(x.shape[2] for x in kinds.values())
    alone = {"embedding": "embedding", "final_norm": "final norm", "classifier": "classifier"}
    found = {"embedding": 0.0, **{f"layer {i}": 0.0 for i in range(depth)}}
    found |= {"final norm": 0.0, "classifier": 0.0}
    for kind, x in kinds.items():
        of_layers = (x.sum(axis=0) * np.broadcast_to(weights, x.shape[1])[:, None]).sum(axis=0)
        single = next((place for name, place in alone.items() if kind.startswith(name)), None)
        for i, value in enumerate(of_layers):
            found[single or f"layer {i}"] += float(value)
    return found


def parts(row: dict[str, Any], what: str) -> dict[str, float]:
    """Each component's or place's part of the whole."""
    whole = sum(row[what].values())
    return {name: x / whole for name, x in row[what].items()}


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows of every training."""
    seeds = list(rows.values())
    of = lambda what: [parts(row, what)[PARTS[0]] for row in seeds]
    price = [sum(row["kl"].values()) / sum(row["reward"].values()) for row in seeds]
    seen, found = column(rows, "reward_seen"), [sum(row["reward"].values()) for row in seeds]
    return [
        above(
            "The representation component pays more of the KL than it earns of the reward",
            "its part of the KL less its part of the reward's change",
            np.subtract(of("kl"), of("reward")),
            note=f"KL {np.mean(of('kl')):.3f}, reward {np.mean(of('reward')):.3f}; "
            f"{np.mean(price):.2f} nats of KL a token for each unit of reward; the reward's change "
            f"is {np.mean(found):.3f} by its parts, {np.mean(seen):.3f} by samples before and "
            "after.",
        )
    ]


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """Parts of the KL and of the reward, by component and by place."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 2))
    for axis, suffix in zip(axes, ("", "_by_place"), strict=True):
        places = list(next(iter(rows.values()))[f"kl{suffix}"])
        for number, (what, label) in enumerate((("kl", "of the KL"), ("reward", "of the reward"))):
            each = np.array(
                [[parts(row, what + suffix)[p] for p in places] for row in rows.values()]
            )
            at = np.arange(len(places)) + (number - 0.5) * 0.38
            axis.bar(at, each.mean(axis=0), 0.36, color=COLOURS[number], label=label)
            for line in each:
                axis.plot(at, line, ".", color="black", markersize=3)
        axis.set_xticks(range(len(places)), places, rotation=20 if suffix else 0)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylabel("part of the whole")
        axis.legend(frameon=False)
    axes[0].set_title("by component")
    axes[1].set_title("by place in the model")
    figure.suptitle(
        f"{name}: KL to the policy before RL, and reward; held-out prompts, means of {len(rows)} "
        "trainings (dots)"
    )
    figure.tight_layout()
    return figure


def find(chosen):
    rows = each_seed(chosen, plain_arm(chosen.runs), look_at)
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "kl_price", find)
