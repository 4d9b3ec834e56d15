"""Does the classifier stage shape the gradient component?

Claim (Tomihari 2026, arXiv 2601.04670, on why CF-RL speeds up RL): W enters the gradient component
W J Jᵀ Wᵀ twice, so a stage that moves W alone makes later joint updates move the policy more. On
one rollout with cotangents g_u

    ρ(W) = Σ_u,v g_uᵀ W J_u J_vᵀ Wᵀ g_v = ‖Σ_u J_uᵀ Wᵀ g_u‖² ,

the body's squared gradient, for W before the stage, after it, and after random changes that move
the policy on the rollout by the same mean KL: Gaussian, or the stage's own change with its input
directions turned at random (the same rows' norms and singular values). Body and rollout are those
before the stage; g is that before it too ("fixed"), or that of each W's own policy ("own").

Verdict:   supported if ρ after the stage is shown to be a tenth or more above ρ after random
           changes (log ratio, fixed g, mean over the draws; `rulings.above`, over seeds); not
           supported if it is shown to be less; else undecided.
Command:   python experiments/gradient_component.py --runs RUNS --name NAME
Time:      a second a training of a small model, after half a minute of compiling.
Expected:  a small increase, most of it by the norm of W.
"""

import functools
from argparse import Namespace
from pathlib import Path
from typing import Any

import frame
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from frame import COLOURS, Verdict, of_size
from matplotlib.ticker import ScalarFormatter
from rulings import above
from subject import of_run, parser, update_batches

from jaxdyn.rl import LossConfig, logit_cotangents, normalizer_of, token_statistics
from jaxdyn.train import open_run
from jaxdyn.train.policy import UpdateBatch
from jaxdyn.train.sharing import completion_features
from jaxdyn.types import Model, Params

CLAIM = "A classifier stage makes the gradient component a tenth larger than random changes do"
SIZES = {"toy": (1, 1, 2), "small": (12, 1, 4), "full": (12, 4, 8)}
"""Seeds, batches that make the rollout, and random draws of each kind."""

ARM = "classifier_first"
KINDS = {"gaussian": "Gaussian", "turned": "the stage's, turned"}
TENTH = float(np.log(1.1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def sizes(
    model: Model,
    loss: LossConfig,
    backbone: Params,
    batch: UpdateBatch,
    head: Params,
    start: Params,
) -> dict[str, jax.Array]:
    """ρ of a classifier `head` with the cotangents at `start` and at its own policy, and the mean
    over tokens of KL(π_start ‖ π_head), in nats."""
    phi, pull = jax.vjp(lambda psi: completion_features(model, psi, batch), backbone)
    mask, ids = batch.completion_mask, batch.completion_ids

    def cotangents(classifier):
        logits = model.logits(classifier, phi)
        logps = token_statistics(logits, ids).logps
        given = logps, None, None, batch.advantages, mask, normalizer_of(mask)
        return logit_cotangents(loss, *given).whole(logits, ids)

    logits, through = jax.vjp(lambda x: model.logits(head, x), phi)

    def size(g):
        gradient = pull(*through(g))
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient))

    old = jax.nn.log_softmax(model.logits(start, phi))
    kl = jnp.sum(jnp.exp(old) * (old - jax.nn.log_softmax(logits)), axis=-1)
    found = {"fixed": size(cotangents(start)), "own": size(cotangents(head))}
    return {**found, "kl": jnp.sum(kl * mask) / jnp.sum(mask)}


def random_change(kind: str, change: np.ndarray, seed: int) -> np.ndarray:
    """A change of W of that kind, of the norm of `change`."""
    rng = np.random.default_rng([seed, len(kind)])
    if kind == "gaussian":
        drawn = rng.standard_normal(change.shape)
        return drawn * np.linalg.norm(change) / np.linalg.norm(drawn)
    turn, upper = np.linalg.qr(rng.standard_normal((change.shape[1],) * 2))
    return change @ (turn * np.sign(np.diagonal(upper)))


def of_equal_kl(measure, start: np.ndarray, change: np.ndarray, kl: float) -> dict[str, float]:
    """`measure` of start + s · change, for the s at which its KL is `kl`.

    KL goes about as s², so that s ← s √(kl / KL) is there in a few turns. Where KL grows
    with s, slower than s⁴, it comes nearer. Raises SystemExit where it does not get there.
    """
    scale = 1.0
    for _ in range(30):
        found = measure(start + scale * change)
        if abs(found["kl"] / kl - 1) < 1e-3:
            return {**found, "scale": scale}
        scale *= float(np.sqrt(kl / found["kl"]))
    raise SystemExit(f"no size of a random change has the stage's KL of {kl:.3g}, last {scale:.3g}")


def of_training(path: Path, size: str) -> dict[str, Any]:
    """ρ before the stage, after it, and after random changes."""
    _, batches, draws = of_size(SIZES, size)
    with open_run(path) as run:
        subject = of_run(run)
        after = run.policy(run.plan[0].end)[1]["classifier"]
    train = subject.task.config.train
    prompts = batches * train.num_prompts
    (batch,) = update_batches(subject, prompts, train.num_generations, 1)
    start = subject.params["classifier"]

    def measure(weight) -> dict[str, float]:
        head = {**start, "weight": jnp.asarray(weight, jnp.float32)}
        given = subject.task.config.loss, subject.params["backbone"], batch, head, start
        return {name: float(x) for name, x in sizes(subject.model, *given).items()}

    before, weight = np.asarray(start["weight"]), np.asarray(after["weight"])
    seen = measure(weight)
    change = (weight - before).astype(np.float64)
    random = {
        kind: [
            of_equal_kl(measure, before, random_change(kind, change, n), seen["kl"])
            for n in range(draws)
        ]
        for kind in KINDS
    }
    return {
        "seed": path.name,
        "norm": float(np.linalg.norm(weight) / np.linalg.norm(before)),
        "before": measure(before),
        "after": seen,
        "random": random,
    }


# -- what it says ---------------------------------------------------------------------------------


def log_ratios(rows: list[dict[str, Any]], which: str, kind: str | None) -> np.ndarray:
    """log ρ(after the stage) less its mean over random changes, or less log ρ before, [seeds]."""
    found = []
    for row in rows:
        kinds = KINDS if kind == "random" else (kind,)
        others = [x[which] for k in kinds for x in row["random"].get(k, ())]
        base = np.mean(np.log(others)) if others else np.log(row["before"][which])
        found.append(np.log(row["after"][which]) - base)
    return np.array(found)


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """From the rows alone."""
    found = []
    for which, claim in (
        ("fixed", CLAIM),
        ("own", "So does it with each policy's own cotangents"),
    ):
        alone = float(np.exp(log_ratios(rows, which, None).mean()))
        norm = float(np.mean([row["norm"] for row in rows]))
        found.append(
            above(
                claim,
                "log ρ after the stage less log ρ after random changes of equal KL, mean of draws",
                log_ratios(rows, which, "random").tolist(),
                TENTH,
                f"ρ after is {alone:.2f} of ρ before, ‖W‖ {norm:.3f} of ‖W‖ before.",
            )
        )
    return found


def draw(rows: list[dict[str, Any]], name: str) -> plt.Figure:
    """ρ relative to that before the stage, a dot a training."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, which in zip(both, ("fixed", "own"), strict=True):
        relative = lambda row, x, which=which: x[which] / row["before"][which]
        columns = {"after the stage": [[relative(r, r["after"])] for r in rows]}
        for kind, label in KINDS.items():
            columns[label] = [[relative(r, x) for x in r["random"][kind]] for r in rows]
        for place, (values, colour) in enumerate(zip(columns.values(), COLOURS, strict=False)):
            means = np.array([np.exp(np.mean(np.log(x))) for x in values])
            aside = np.linspace(-0.15, 0.15, len(means)) if len(means) > 1 else [0]
            axes.plot(place + np.array(aside), means, "o", color=colour, markersize=4)
            axes.plot(
                [place - 0.25, place + 0.25], [np.exp(np.log(means).mean())] * 2, color=colour
            )
        axes.axhline(1, color="0.5", linewidth=0.7)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yscale("log")
        for of in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            of(ScalarFormatter())
        axes.set(title=f"cotangents {'before the stage' if which == 'fixed' else which}")
    both[0].set_ylabel("ρ(W) / ρ(W before the stage)")
    draws = len(next(iter(rows[0]["random"].values())))
    figure.suptitle(
        f"{name}: {len(rows)} trainings (dots; lines: means), {draws} draws of each random kind, "
        "all of equal KL",
        fontsize=9,
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], list[dict[str, Any]], plt.Figure]:
    """The answer of one model's trainings."""
    if chosen.runs is None:
        raise SystemExit("gradient_component wants --runs with trainings of classifier_first")
    paths = frame.trainings(chosen.runs, ARM)[: of_size(SIZES, chosen.size)[0]]
    rows = [of_training(path, chosen.size) for path in paths]
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    frame.keep(parser(__doc__).parse_args(), "gradient_component", find)
