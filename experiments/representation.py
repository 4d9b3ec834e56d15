"""Is it the representation component that lowers the entropy?

Claim:     what RL takes from the entropy at other prompts, it takes through the representation
           component ⟨φ, φ'⟩ I: features are alike, so that updates are copied everywhere (Tomihari
           2026, arXiv 2601.04670, the NTK decomposition and what is said of confidence there).
Command:   python experiments/representation.py --runs RUNS --name NAME [--size small]
           RUNS/joint/seed-K are runs of `jaxdyn rl` that keep their checkpoints.
Time:      20 s a training of the anagram model on one CPU core.
Expected:  a quarter to a third of ΔH along a training (on the straight line between its ends too),
           0.04 of what a single update's fresh gradient does, 0.16 with its momentum: not the
           larger part, but not a small one. Reward has to go with it: of shuffled advantages
           nothing is left on average.

Three accounts of ΔH by component, in nats a token, at tokens of held-out prompts, which nothing but
other prompts can move: the ledger along the checkpoints (what the training did), the ledger on the
straight line from before to after (another path, the same ends), and first order at single updates.
Of single updates also by origin, in the batch's own tokens: the token itself, the rest of its
completion, the others of its prompt, other prompts; by the sign of A; and with the advantages
shuffled within a prompt's completions, or all 0. Then updates that were not made, all of one length
(10⁻³ nats of KL a token, to second order): what was applied, its half on W, its half on the body,
and plain gradient steps on W with features as they are, centred, or whitened.

Rulings: of part / ΔH, a mean over trainings. "A tenth" and "the larger part" are supported if the
interval lies above 0.1 and 0.5, not supported if below; see `rulings.above`.
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
    HeldOut,
    Tokens,
    account,
    each_seed,
    entropies,
    entropy_change,
    first_order,
    followed,
    held_out,
    log_probs_at,
    plain_arm,
    policies,
    shuffled,
    taken,
    unit_weights,
)
from counterfactuals import KL, counterfactual
from frame import COLOURS, Verdict, keep, parser
from rulings import above, column, mean_of

from jaxdyn.commands.influence_places import batch_sites, own_weights, relate
from jaxdyn.dynamics import contributions, own_tokens
from jaxdyn.dynamics.precision import in_float32
from jaxdyn.train import SavedRun
from jaxdyn.train.retake import batch_rollout
from jaxdyn.types import Components, Params

ORIGINS = ("itself", "completion", "group", "other")


# -- the ledger -----------------------------------------------------------------------------------


def ledgers(saved: SavedRun, look: HeldOut) -> dict[str, Any]:
    """ΔH by component along the checkpoints and on the straight line, mean over tokens, in nats."""
    ends = [saved.loaded.params, saved.policy(merged=False)[1]]
    found = {}
    for name, path in (("trajectory", policies(saved)), ("straight", ends)):
        whole = account(saved, path, look.tokens)
        sums = {part: x.sum(axis=0) for part, x in whole.parts["entropy"].items()}
        change = whole.change("entropy").sum(axis=0)
        found[name] = {part: float(x.mean()) for part, x in sums.items()}
        found[name] |= {"change": float(change.mean()), "segments": len(whole.nodes)}
    return found


# -- single updates -------------------------------------------------------------------------------


def single_update(saved: SavedRun, step: int, counts: Counts) -> dict[str, Any]:
    """One update's first-order ΔH in its own batch's tokens, by origin, sign and component."""
    task, model = saved.task, in_float32(saved.task.model)
    prepared, update = taken(saved, step)
    rollout, groups = batch_rollout(prepared), task.config.train.num_generations
    advantages = np.asarray(prepared.batch.advantages, np.float64)
    sites = batch_sites(rollout, 0, 1, 0)
    related = relate(sites, rollout, of_batch=True)
    per_unit, without = unit_weights(task, update.before, prepared)
    common = {"temperature": update.temperature, "metric": update.metric}

    def origins(weights: np.ndarray) -> dict[str, np.ndarray]:
        """ΔH per completion by origin, {origin: [components, O, U]}, clipped as it was."""
        given = model, update.before, sites
        whole = entropy_of(contributions(*given, rollout, weights=weights, **common))
        own = entropy_of(own_tokens(*given, own_weights(weights, related), **common))
        return by_origin(update.clip * whole, update.clip * own, related)

    of_reward, of_rest = origins(per_unit), origins(without)
    places = Tokens(sites, len(sites.rows))
    here = log_probs_at(model, update.before, places)
    before, applied = entropies(here), jax.tree.map(jnp.subtract, update.after, update.before)

    def moved(change: Params) -> dict[str, float]:
        """First-order ΔH of a change of the parameters."""
        parts = first_order(model, update.before, change, places)
        return {part: float(entropy_change(here, x).mean()) for part, x in parts.items()}

    draws = shuffled(advantages, groups, counts.shuffles, step)
    signs = {"positive": np.maximum(advantages, 0), "negative": np.minimum(advantages, 0)}
    mean = lambda x: named(x.mean(axis=1))  # [components, O] over the sites
    spread = {
        origin: np.einsum("pu,su->sp", x.mean(axis=1), draws) for origin, x in of_reward.items()
    }
    found: dict[str, Any] = {
        "real": {o: mean(x @ advantages) for o, x in of_reward.items()},
        "zero": {o: mean(x.sum(axis=-1)) for o, x in of_rest.items()},
        "shuffled_mean": {o: named(x.mean(axis=0)) for o, x in spread.items()},
        "shuffled_sd": {o: named(x.std(axis=0)) for o, x in spread.items()},
        "by_sign": {
            sign: {o: mean(x @ some) for o, x in of_reward.items()} for sign, some in signs.items()
        },
        "beside": {name: moved(change.delta) for name, change in update.others.items()},
        "first_order": sum(moved(applied).values()),
        "actual": float((entropies(log_probs_at(model, update.after, places)) - before).mean()),
    }
    return found


def by_origin(whole: np.ndarray, own: np.ndarray, related: Any) -> dict[str, np.ndarray]:
    """A completion's contributions [P, O, U] by what it is to the site; `own` [P, O] is what the
    site's own token did."""
    members = np.arange(whole.shape[-1])[None]
    same = related.site_completion[:, None] == members
    group = (related.site_group[:, None] == related.group[None]) & ~same
    itself = own[..., None] * same
    return {
        "itself": itself,
        "completion": whole * same - itself,
        "group": whole * group,
        "other": whole * (~same & ~group),
    }


def entropy_of(found: Components) -> np.ndarray:
    """The entropy's row of log π and H, by component, [2, ...]; a cross one goes with the body."""
    rest = found.gradient[1] + found.cross[1]
    return np.stack([np.asarray(found.representation[1], np.float64), np.asarray(rest, np.float64)])


def named(x: np.ndarray) -> dict[str, float]:
    return {part: float(value) for part, value in zip(PARTS, x, strict=True)}


# -- the finding ----------------------------------------------------------------------------------


def look_at(saved: SavedRun, counts: Counts) -> dict[str, Any]:
    last = saved.policy(merged=False)[1]
    steps = followed(saved, counts.updates)
    return {
        "ledger": ledgers(saved, held_out(saved, last, counts)),
        "update": mean_of([single_update(saved, step, counts) for step in steps]),
        "counterfactual": mean_of([counterfactual(saved, step, counts) for step in steps]),
        "steps": steps,
    }


def share(row: dict[str, Any], path: str) -> float:
    """Representation's part of ΔH."""
    return row["ledger"][path]["representation"] / row["ledger"][path]["change"]


def applied_share(update: dict[str, Any]) -> float:
    """Representation's part of an applied update's first-order ΔH, momentum and all."""
    parts = [x for kind in ("real", "zero", "beside") for x in update[kind].values()]
    return sum(x["representation"] for x in parts) / update["first_order"]


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows of every training."""
    seeds = list(rows.values())
    trajectory, straight = ([share(row, path) for row in seeds] for path in PATHS)
    update = [row["update"] for row in seeds]
    whole = lambda of, origin: sum(of[origin].values())
    single = [u["real"]["other"]["representation"] / whole(u["real"], "other") for u in update]
    beyond = [
        u["shuffled_mean"]["other"]["representation"] - u["real"]["other"]["representation"]
        for u in update
    ]
    made = column(rows, "counterfactual")
    per_kl = lambda name: [x[name]["entropy"] for x in made]
    copied = np.subtract(per_kl("gradient, W centred"), per_kl("gradient, W plain"))
    what = "representation's part of ΔH at tokens of held-out prompts, "
    also = (
        f"straight line: {np.mean(straight):.3f}; single updates, at other prompts of the batch, "
        f"fresh gradient: {np.mean(single):.3f}; with momentum and at all origins: "
        f"{np.mean([applied_share(u) for u in update]):.3f}."
    )
    return [
        above(
            "A tenth or more of the entropy that RL takes at other prompts goes through the "
            "representation component",
            what + "along the checkpoints",
            trajectory,
            0.1,
            also,
        ),
        above(
            "The larger part of it goes through the representation component",
            what + "along the checkpoints",
            trajectory,
            0.5,
        ),
        above(
            "Through the representation component, a single update lowers the entropy at other "
            "prompts more than one with shuffled advantages",
            "ΔH of shuffled (mean of draws) less ΔH of real advantages, nats a token",
            beyond,
        ),
        above(
            "At equal KL a plain step of W takes less entropy at other prompts once its features "
            "are centred",
            f"ΔH centred less ΔH plain, nats a token at {KL} nats of KL",
            list(copied),
        ),
    ]


PATHS = ("trajectory", "straight")


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """ΔH by path and component; of single updates by origin; of updates that were not made."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), width_ratios=(1, 1.5, 1.5))
    seeds, colours = list(rows.values()), dict(zip(PARTS, COLOURS, strict=False))

    def bars(axis: Any, groups: Sequence[str], values: Any, width: float = 0.38) -> None:
        for number, part in enumerate(PARTS):
            own = np.array([[values(row, group, part) for group in groups] for row in seeds])
            at = np.arange(len(groups)) + (number - 0.5) * width
            axis.bar(at, own.mean(axis=0), width, color=colours[part], label=part)
            for line in own:
                axis.plot(at, line, ".", color="black", markersize=3)
        axis.set_xticks(range(len(groups)), groups)
        axis.axhline(0, color="black", linewidth=0.8)

    bars(axes[0], PATHS, lambda row, path, part: row["ledger"][path][part])
    axes[0].set_ylabel("ΔH, nats a token")
    axes[0].set_title("the ledger, held-out prompts")

    def of_update(row: Any, group: str, part: str) -> float:
        kind = "real" if group in ORIGINS else "beside"
        return row["update"][kind].get(group, dict.fromkeys(PARTS, 0.0))[part] * 1e3

    bars(axes[1], (*ORIGINS, "momentum"), of_update)
    sd = [
        np.mean([row["update"]["shuffled_sd"][o][p] for row in seeds]) * 1e3
        for o in ORIGINS
        for p in PARTS
    ]
    at = [i + (n - 0.5) * 0.38 for i in range(len(ORIGINS)) for n in range(2)]
    axes[1].errorbar(at, np.zeros(len(at)), sd, fmt="none", color="grey", capsize=4)
    axes[1].set_ylabel("ΔH of one update, 10⁻³ nats a token")
    axes[1].legend(frameon=False, loc="lower left")
    axes[1].set_title("by origin, batch's tokens (grey: ± 1 sd, shuffled)")
    made = list(seeds[0]["counterfactual"])
    each = np.array([[row["counterfactual"][m]["entropy"] for m in made] for row in seeds]) * 1e3
    axes[2].barh(made, each.mean(axis=0), color=COLOURS[2])
    for line in each:
        axes[2].plot(line, made, ".", color="black", markersize=3)
    axes[2].axvline(0, color="black", linewidth=0.8)
    axes[2].invert_yaxis()
    axes[2].set_xlabel(f"ΔH at {KL} nats of KL, 10⁻³ nats a token")
    axes[2].set_title("updates of one length, held-out prompts")
    figure.suptitle(f"{name}: ΔH by component; bars are means, dots the {len(seeds)} trainings")
    figure.tight_layout()
    return figure


def find(chosen):
    rows = each_seed(chosen, plain_arm(chosen.runs), look_at)
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "representation", find)
