"""Does CF-RL work for the reasons of linear probing then fine-tuning?

Claim (Tomihari 2026, arXiv 2601.04670, its contrast with LP-FT): in supervised learning a
classifier that is trained first leaves features nearer to where they were, and its norm grows
(Kumar et al. 2022, arXiv 2202.10054; Tomihari and Sato 2024, arXiv 2405.16747). Classifier-first RL
does neither.
RL, CF-RL, fine-tuning and LP-FT from the same base models, side by side, at the same held-out
sites: how far features moved, their cosine and CKA with those before, effective ranks, ‖W‖, and the
effective rank of ΔW.

Verdict:   each of the two reasons is claimed not to hold for CF-RL. Features: the log ratio of
           their displacement, CF-RL to RL of the same seed and as many steps. Norm: the difference
           of ‖W‖/‖W before‖ − 1. Supported if the interval over seeds leaves no room for a tenth
           less displacement (a hundredth more norm); not supported if the effect is there with
           p < 0.05 by sign flips; else undecided.
Command:   python experiments/lp_ft.py --runs RUNS --name NAME
Time:      two seconds a training of a small model.
Expected:  CF-RL moves features about as far as RL; LP-FT less far than FT.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import frame
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from frame import COLOURS, Verdict, of_size
from inference import bootstrap, sign_flip
from subject import of_run, parser, probe_sites

from jaxdyn.dynamics import measure_state, site_state
from jaxdyn.kernels import effective_rank
from jaxdyn.train import open_run

SIZES = {"toy": (2, 4), "small": (3, 16), "full": (12, 64)}
"""Trainings of each arm, and prompts."""

ARMS = {
    "joint": "RL",
    "joint_extra": "RL, as many steps",
    "classifier_first": "CF-RL",
    "sft": "FT",
    "linear_probe_then_finetune": "LP-FT",
}
PAIRS = {"CF-RL to RL": ("classifier_first", "joint_extra")}
PAIRS["LP-FT to FT"] = ("linear_probe_then_finetune", "sft")
FIGURES = {
    "displacement": "‖φ − φ before‖ / ‖φ before‖",
    "cosine": "cosine of φ with that before",
    "cka": "CKA with features before",
    "rank": "effective rank of completions' features",
    "norm": "‖W‖ / ‖W before‖ − 1",
    "change": "‖ΔW‖ / ‖W before‖",
    "change_rank": "effective rank of ΔW",
}
LESS, MORE = float(np.log(0.9)), 0.01


def of_training(path: Path, prompts: int) -> dict[str, Any]:
    """What a training did to features and classifier."""
    with open_run(path) as run:
        subject = of_run(run)
        model, after = run.policy(run.steps[-1])
    before = subject.params
    sites = probe_sites(subject, prompts, 3)
    start, end = (site_state(model, params, sites) for params in (before, after))
    seen = measure_state(model, after, sites, start, start, end).scalars
    size = np.linalg.norm(np.asarray(start.features, np.float64), axis=1).mean()
    old, new = (np.asarray(x["classifier"]["weight"], np.float64) for x in (before, after))
    singular = np.linalg.svd(new - old, compute_uv=False)
    return {
        "seed": path.name,
        "displacement": seen["features/drift/norm_mean"] / size,
        "cosine": seen["features/drift/cosine_mean"],
        "cka": seen.get("features/completion/cka_to_start", float("nan")),
        "rank": seen["features/completion/effective_rank"],
        "norm": float(np.linalg.norm(new) / np.linalg.norm(old) - 1),
        "change": float(np.linalg.norm(new - old) / np.linalg.norm(old)),
        "change_rank": float(effective_rank(jnp.asarray(singular**2, jnp.float32))),
    }


# -- what it says ---------------------------------------------------------------------------------


def differences(rows: dict[str, list], pair: tuple[str, str], key: str) -> np.ndarray:
    """Of the pair's trainings of one seed: the displacements' log ratio, else the difference."""
    first, second = ({row["seed"]: row[key] for row in rows.get(arm, [])} for arm in pair)
    both = [(first[seed], second[seed]) for seed in first if seed in second]
    change = (lambda a, b: np.log(a / b)) if key == "displacement" else (lambda a, b: a - b)
    return np.array([change(a, b) for a, b in both])


def verdicts(rows: dict[str, list[dict[str, Any]]]) -> list[Verdict]:
    """From the rows alone."""
    found = []
    for claim, key, sign, room in (
        (
            "CF-RL does not leave features nearer to where they were than RL",
            "displacement",
            -1,
            LESS,
        ),
        ("CF-RL does not make the classifier's norm grow more than RL", "norm", 1, MORE),
    ):
        values = differences(rows, PAIRS["CF-RL to RL"], key)
        if len(values) == 0:
            continue
        low, high = bootstrap(values)
        p = sign_flip(values)
        there = p < 0.05 and (high < 0 if sign < 0 else low > 0)
        none = low > room if sign < 0 else high < room
        ruling: frame.Ruling = "undecided"
        if len(values) > 1 and (none or there):
            ruling = "supported" if none else "not supported"
        beside = differences(rows, PAIRS["LP-FT to FT"], key)
        note = "LP-FT was not trained."
        if len(beside):
            ends = bootstrap(beside)
            note = f"LP-FT to FT: {beside.mean():.3g} ({ends[0]:.3g} to {ends[1]:.3g})."
        what = "log ratio of features' displacement" if sign < 0 else "difference of norms' growth"
        over = f"{len(values)} pairs of trainings"
        found.append(
            Verdict(
                claim,
                ruling,
                f"{what}, CF-RL to RL",
                *(float(values.mean()), low, high, over, len(values), p),
                note=note,
            )
        )
    return found


def draw(rows: dict[str, list[dict[str, Any]]], name: str) -> plt.Figure:
    """Every figure by arm, a dot a training."""
    figure, panels = plt.subplots(2, 4, figsize=(12, 5.2), layout="constrained")
    panels = panels.ravel()
    for axes, (key, label) in zip(panels, FIGURES.items(), strict=False):
        for place, arm in enumerate(rows):
            values = np.array([row[key] for row in rows[arm]])
            aside = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(place + aside, values, "o", color=COLOURS[place], markersize=3)
            axes.plot([place - 0.25, place + 0.25], [values.mean()] * 2, color=COLOURS[place])
        axes.set_xticks(range(len(rows)), [""] * len(rows))
        axes.set_title(label, fontsize=9)
    panels[-1].axis("off")
    for place, arm in enumerate(rows):
        label = f"{ARMS[arm]} ({len(rows[arm])} trainings)"
        panels[-1].plot([], [], "o", color=COLOURS[place], label=label)
    panels[-1].legend(fontsize=9, frameon=False, loc="center")
    figure.suptitle(f"{name}: after training, against before; lines: means", fontsize=9)
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], dict[str, Any], plt.Figure]:
    """The answer of one model's trainings."""
    if chosen.runs is None:
        raise SystemExit("lp_ft wants --runs with trainings of joint_extra and classifier_first")
    count, prompts = of_size(SIZES, chosen.size)
    there = frame.arms(chosen.runs)
    rows = {
        arm: [of_training(path, prompts) for path in frame.trainings(chosen.runs, arm)[:count]]
        for arm in ARMS
        if arm in there
    }
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    frame.keep(parser(__doc__).parse_args(), "lp_ft", find)
