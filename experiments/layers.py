"""Do the layers that carry a training's change gain most when they are trained alone?

Claim (ours, of a reading that ledgers invite): a part of the model that carries much of Δ log π, or
of ΔH, is a part that matters. The ledger gives each layer's and kind's part of what a training did
at completions of the base model, exactly: of log π (weighed by the completion's advantage, so that
the sum is the first-order gain in reward, and plainly) and of the entropy. Beside it the base model
is trained again with each part alone, all else frozen: on-policy updates by the same optimizer with
everything but the part masked, and the reward on held-out prompts before and after.

Verdict:   supported if Spearman's correlation over parts between a part's ledger and its gain
           alone, mean over trainings, is above 1/2 with its interval; not supported if below;
           undecided from one training.
Command:   python experiments/layers.py --runs RUNS --name NAME
Time:      a minute a training of a small model, most of it training parts alone.
Expected:  the MLPs and attentions carry most; a small part alone gains more than its ledger.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import frame
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from first_order import moved
from frame import COLOURS, Verdict, of_size
from inference import bootstrap
from scipy.stats import spearmanr
from subject import Subject, compiled, experience, gradient, of_run, parser, update_batch

from jaxdyn.dynamics import ledger, sites_from_rollout
from jaxdyn.kernels.parts import kind_of
from jaxdyn.rl import group_relative
from jaxdyn.train import open_run
from jaxdyn.types import Params

SIZES = {
    "toy": (2, 3, 1, 4),
    "small": (2, 8, 10, 16),
    "brief": (12, 8, 10, 16),
    "full": (12, 16, 20, 64),
}
"""Trainings, prompts of the ledger, updates of a part alone, and held-out prompts of its reward."""

KINDS = {
    "attention": ("query", "key", "value", "out"),
    "mlp": ("mlp",),
    "norms": ("norms",),
    "embedding": ("embedding",),
    "final_norm": ("final_norm",),
    "classifier": ("classifier",),
}
HALF = 0.5


def parts_of(layers: int) -> list[tuple[str, int]]:
    """Kinds with their layers; those in no layer have the number 0."""
    inside = [(kind, layer) for layer in range(layers) for kind in ("attention", "mlp", "norms")]
    return [("embedding", 0), *inside, ("final_norm", 0), ("classifier", 0)]


def masked(change: Params, kind: str, layer: int) -> Params:
    """What of a change belongs to a part; 0 elsewhere."""

    def keep(path, x):
        keys = tuple(key.key for key in path)
        own = "classifier" if keys[0] == "classifier" else kind_of(keys[1:])
        if own != kind:
            return jnp.zeros_like(x)
        if keys[1] != "layers":
            return x
        here = jnp.arange(len(x)) == layer
        return x * here.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(keep, change)


def accounts(subject: Subject, trajectory: list[Params], prompts: int) -> dict[str, Any]:
    """Each part's share of what the trajectory did, in nats a token, at the base's completions.

    `reward`: of Σ A log π over the completions' tokens, A by group; `log_prob` and `entropy`: of
    these themselves. `missing` is what the ledger's quadrature left out, relative to the change.
    """
    generations = subject.task.config.train.num_generations
    found = experience(subject, "test", prompts, generations, 2 * subject.task.config.seed)
    longest = found.rollout.completion_ids.shape[1]
    sites = sites_from_rollout(found.rollout, longest, 0)
    account = ledger(
        subject.model, trajectory, sites, by_layer=("log_prob", "entropy"), tolerance=1e-3
    )
    rewards = jnp.asarray(found.rewards.total, jnp.float32)
    advantages = np.asarray(group_relative(rewards, generations, "none", 1e-4), np.float64)
    tokens, rows = len(np.asarray(sites.rows)), {}
    for name, quantity, weights in (
        ("reward", "log_prob", advantages),
        ("log_prob", "log_prob", np.ones_like(advantages)),
        ("entropy", "entropy", np.ones_like(advantages)),
    ):
        kinds = account.by_layer[quantity]
        of = lambda kind, layer, kinds=kinds, weights=weights: sum(
            float(np.einsum("kb,b->", kinds[x][:, :, layer], weights)) for x in KINDS[kind]
        )
        rows[name] = [of(*part) / tokens for part in parts_of(subject.model.config.num_layers)]
        whole = account.change(quantity).sum(axis=0) @ weights[np.asarray(sites.rows)] / tokens
        rows[f"{name}_change"] = float(whole)
    return rows


def reward_of(subject: Subject, params: Params, prompts: int) -> float:
    """The mean reward on held-out prompts, which the training's seed draws."""
    config = subject.task.config
    given = "test", prompts, config.train.num_generations, 2 * config.seed + 1, params
    return float(np.nanmean(experience(subject, *given).rewards.total))


def alone(subject: Subject, kind: str, layer: int, steps: int) -> Params:
    """The base model after some on-policy updates of one part, of batches of the seed's own."""
    config, params = subject.task.config, subject.params
    rule = compiled(config.optim.rule)
    state = rule.init(params)
    shape, rate = (
        (config.train.num_prompts, config.train.num_generations),
        config.optim.learning_rate,
    )
    for draw in range(steps * config.seed, steps * (config.seed + 1)):
        batch = update_batch(subject, experience(subject, "train", *shape, draw, params), draw)
        own = masked(gradient(subject, batch, params), kind, layer)
        change, state = rule.update(own, state, params)
        params = moved(params, masked(change, kind, layer), -rate)
    return params


def of_training(path: Path, size: str) -> dict[str, Any]:
    """The ledger of a training, and the gains of its base model's parts alone."""
    _, prompts, steps, held_out = of_size(SIZES, size)
    with open_run(path) as run:
        subject = of_run(run)
        later = [run.policy(step)[1] for step in run.steps if step]
    parts = parts_of(subject.model.config.num_layers)
    start = reward_of(subject, subject.params, held_out)
    gains = [reward_of(subject, alone(subject, *part, steps), held_out) - start for part in parts]
    found = accounts(subject, [subject.params, *later], prompts)
    names = [f"{kind} {layer}" if kind in ("attention", "mlp", "norms") else kind
             for kind, layer in parts]  # fmt: skip
    gained = reward_of(subject, later[-1], held_out) - start
    return {"seed": path.name, "parts": names, "gain": gains, "gained": gained, **found}


# -- what it says ---------------------------------------------------------------------------------


def correlations(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """Spearman's over parts, ledger against gain alone, [trainings]; of the entropy its fall."""
    sign = -1 if key == "entropy" else 1
    return np.array([spearmanr(sign * np.array(r[key]), r["gain"]).statistic for r in rows])


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """From the rows alone."""
    found = []
    for key, what in (("reward", "advantage-weighed log π"), ("entropy", "the entropy's fall")):
        values = correlations(rows, key)
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        low, high = bootstrap(values)
        ruling: frame.Ruling = "undecided"
        if len(values) > 1 and (low > HALF or high < HALF):
            ruling = "supported" if low > HALF else "not supported"
        shares = np.mean([np.array(r[key]) / np.sum(r[key]) for r in rows], axis=0)
        most = int(np.argmax(shares))
        found.append(
            Verdict(
                f"Parts that carry {what} are those that gain most when trained alone",
                ruling,
                "Spearman's correlation over parts, ledger against gain alone",
                *(float(values.mean()), low, high, f"{len(values)} trainings", len(values)),
                note=f"{rows[0]['parts'][most]} carries most of it, {shares[most]:.0%}.",
            )
        )
    return found


def draw(rows: list[dict[str, Any]], name: str) -> plt.Figure:
    """Ledgers and gains by part, a dot a training."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    labels = rows[0]["parts"]
    for axes, key, label, colour in zip(
        panels,
        ("reward", "entropy", "gain"),
        ("ledger: share of Σ A Δ log π", "ledger: share of ΔH", "gain in reward, trained alone"),
        COLOURS,
        strict=False,
    ):
        values = np.array([r[key] for r in rows])
        if key != "gain":
            values = values / values.sum(axis=1, keepdims=True)
        axes.barh(range(len(labels)), values.mean(axis=0), color=colour, alpha=0.4)
        for line in values:
            axes.plot(line, range(len(labels)), "o", color=colour, markersize=3)
        axes.axvline(0, color="0.5", linewidth=0.7)
        axes.set_xlabel(label)
    whole = np.mean([r["gained"] for r in rows])
    panels[2].axvline(whole, color="0.5", linestyle=":")
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"{name}: {len(rows)} trainings (dots; bars: means); dotted: the whole training's gain",
        fontsize=9,
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], list[dict[str, Any]], plt.Figure]:
    """The answer of one model's trainings."""
    if chosen.runs is None:
        raise SystemExit("layers wants --runs with trainings of joint")
    paths = frame.trainings(chosen.runs, "joint")[: of_size(SIZES, chosen.size)[0]]
    rows = [of_training(path, chosen.size) for path in paths]
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    frame.keep(parser(__doc__).parse_args(), "layers", find)
