"""Do cheap proxies from features rank what moves a site?

Claim (ours, of what is often assumed): the influence of reinforcing a token at one site on log π at
another, ⟨∇ log π, ∇ log π'⟩ over all parameters, is ranked by what needs no backward pass. Proxies:
⟨φ, φ'⟩, its cosine, the head gradients' product ⟨φ, φ'⟩ ⟨e_y − π, e_y' − π'⟩ (the representation
component itself), the same of centred features, and ⟨e_y − π, e_y' − π'⟩ alone; with a backward
pass of one layer, the last layer's part with the head's.

Every site's influences from all sites of other prompts are ranked: Spearman's correlation, and the
chance that the proxy puts a positive influence above a negative one (AUC; 1/2 says nothing).
Against the whole, against the gradient component alone (of which the head's product is no part),
and for small models against the whole in Adam's metric.

Verdict:   a proxy ranks influence if Spearman's mean over sites is above 1/2 with its interval over
           prompts, for every base model; does not if it is below.
Command:   python experiments/proxies.py --model DIRECTORY --name NAME [--prompts FILE.jsonl]
Time:      half a minute for a small model, three minutes for 135 million parameters (--size small).
Expected:  of the anagram models ⟨φ, φ'⟩ says nothing (-0.03), the head gradients' product 0.31,
           ⟨e_y − π, e_y' − π'⟩ without any feature 0.46, the last layer 0.7.
"""

from argparse import Namespace
from typing import Any

import frame
import matplotlib.pyplot as plt
import numpy as np
from frame import COLOURS, Verdict, of_size
from inference import bootstrap
from scipy.stats import rankdata
from subject import (
    Subject,
    base_models,
    direction,
    gradient,
    parser,
    probe_sites,
    seeds_of,
    subjects,
    update_batches,
)

from jaxdyn import kernels
from jaxdyn.dynamics import site_state
from jaxdyn.types import Sites

SIZES = {"toy": (4, 1, 2), "small": (12, 1, 0), "full": (24, 1, 4)}
"""Prompts, sites inside each one's completion, and batches of Adam's moments (0: no Adam)."""

PROXIES = {
    "features": "⟨φ, φ'⟩",
    "cosine": "cos(φ, φ')",
    "errors": "⟨e − π, e' − π'⟩",
    "head": "⟨φ, φ'⟩ ⟨e − π, e' − π'⟩",
    "centred": "the same, φ centred",
    "last layer": "head and last layer",
}
TARGETS = {"total": "whole", "gradient": "gradient component", "adam": "whole, Adam's metric"}
HALF = 0.5


def proxies_of(features: np.ndarray, log_probs: np.ndarray, targets: np.ndarray) -> dict:
    """What needs no backward pass, [N, N] each."""
    phi = features.astype(np.float64)
    error = -np.exp(log_probs.astype(np.float64))
    error[np.arange(len(targets)), targets] += 1
    inner, errors = phi @ phi.T, error @ error.T
    size = np.sqrt(np.diagonal(inner))
    centred = phi - phi.mean(axis=0)
    return {
        "features": inner,
        "cosine": inner / size[:, None] / size[None],
        "errors": errors,
        "head": inner * errors,
        "centred": centred @ centred.T * errors,
    }


def ranked(proxy: np.ndarray, truth: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of every row: Spearman's correlation and the sign's AUC, over the columns `apart`; an AUC
    without two signs is NaN."""
    spearman, area = np.full((2, len(truth)), np.nan)
    for row, columns in enumerate(apart):
        x, y = rankdata(proxy[row, columns]), truth[row, columns]
        spearman[row] = np.corrcoef(x, rankdata(y))[0, 1]
        up, down = (y > 0).sum(), (y < 0).sum()
        if up and down:
            area[row] = (x[y > 0].sum() - up * (up + 1) / 2) / (up * down)
    return spearman, area


def influences(subject: Subject, sites: Sites, history: int) -> tuple[dict, dict]:
    """Proxies and truths, [N, N] each."""
    model, params = subject.model, subject.params
    state = site_state(model, params, sites)
    found = proxies_of(*(np.asarray(x) for x in (state.features, state.log_probs, sites.targets)))
    parts = kernels.log_prob_kernel(model, params, sites, by_part=True).parts
    assert parts is not None
    body = sum(np.asarray(x, np.float64).sum(axis=0) for x in parts.values())
    last = sum(np.asarray(x[-1], np.float64) for kind, x in parts.items() if kind != "embedding")
    found["last layer"] = found["head"] + last
    truth = {"total": found["head"] + body, "gradient": body}
    if history:
        train = subject.task.config.train
        given = train.num_prompts, train.num_generations, history
        grads = [gradient(subject, batch) for batch in update_batches(subject, *given)]
        state = direction(subject.task.config.optim, params, grads)[1]
        metric = kernels.adam_preconditioner(state, params)
        whole = kernels.log_prob_kernel(model, params, sites, preconditioner=metric).total
        truth["adam"] = np.asarray(whole, np.float64)
    return found, truth


def of_base(subject: Subject, size: str) -> list[dict[str, Any]]:
    """A row a proxy and a truth: means of each prompt's sites."""
    prompts, inside, history = of_size(SIZES, size)
    sites = probe_sites(subject, prompts, inside)
    rows = np.asarray(sites.rows)
    apart = rows[:, None] != rows[None]
    found, truth = influences(subject, sites, history)
    by_prompt = lambda x: [float(np.nanmean(x[rows == p])) for p in np.unique(rows)]
    lines = []
    for target, influence in truth.items():
        positive = float((influence[apart] > 0).mean())
        for name, proxy in found.items():
            spearman, area = ranked(proxy, influence, apart)
            about = {"model": subject.name, "target": target, "proxy": name, "sites": len(rows)}
            kept = {"positive": positive, "spearman": by_prompt(spearman), "auc": by_prompt(area)}
            lines.append(about | kept)
    return lines


# -- what it says ---------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]], target: str, proxy: str, what: str):
    """The mean over base models, and the interval that holds each one's over prompts."""
    chosen = [row for row in rows if (row["target"], row["proxy"]) == (target, proxy)]
    if not chosen:
        return None
    values = [np.array([x for x in row[what] if x is not None], float) for row in chosen]
    values = [x[np.isfinite(x)] for x in values]
    low, high = zip(*(bootstrap(x, draws=2000) for x in values), strict=True)
    return float(np.mean([x.mean() for x in values])), min(low), max(high)


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """From the rows alone."""
    models = len({row["model"] for row in rows})
    prompts = len(rows[0]["spearman"])
    over = f"{prompts} prompts, {base_models(models)}"
    found = []
    for proxy, target in (("features", "total"), ("head", "total"), ("head", "gradient")):
        mean, low, high = summary(rows, target, proxy, "spearman")
        ruling: frame.Ruling = "undecided"
        if low > HALF or high < HALF:
            ruling = "supported" if low > HALF else "not supported"
        area = summary(rows, target, proxy, "auc")
        found.append(
            Verdict(
                f"{PROXIES[proxy]} ranks the influence of other sites ({TARGETS[target]})",
                ruling,
                "Spearman's correlation with ⟨∇ log π, ∇ log π'⟩, mean over sites",
                *(mean, low, high, over, seeds_of(models)),
                note=f"AUC of the sign {area[0]:.2f} ({area[1]:.2f} to {area[2]:.2f}).",
            )
        )
    return found


def draw(rows: list[dict[str, Any]], name: str) -> plt.Figure:
    """Spearman and AUC of every proxy, against each truth."""
    figure, both = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    targets = [x for x in TARGETS if any(row["target"] == x for row in rows)]
    for axes, what, line in zip(both, ("spearman", "auc"), (0.0, HALF), strict=True):
        for number, target in enumerate(targets):
            for place, proxy in enumerate(PROXIES):
                mean, low, high = summary(rows, target, proxy, what)
                at = place + 0.22 * (number - (len(targets) - 1) / 2)
                label = TARGETS[target] if place == 0 else None
                axes.plot([low, high], [at, at], color=COLOURS[number], linewidth=2)
                axes.plot(mean, at, "o", color=COLOURS[number], markersize=4, label=label)
        axes.axvline(line, color="0.5", linewidth=0.7)
    both[0].set(xlabel="Spearman's correlation, mean over sites", xlim=(-0.3, 1.02))
    both[1].set(xlabel="AUC of the sign, mean over sites", xlim=(0.3, 1.02))
    both[0].set_yticks(range(len(PROXIES)), PROXIES.values())
    both[0].invert_yaxis()
    both[0].legend(fontsize=8, frameon=False, loc="lower left")
    models, positive = len({row["model"] for row in rows}), rows[0]["positive"]
    figure.suptitle(
        f"{name}: {rows[0]['sites']} sites of {len(rows[0]['spearman'])} prompts, "
        f"{base_models(models)}; {positive:.0%} of influences are positive; lines: 95 % over "
        "prompts, widest over models",
        fontsize=9,
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], list[dict[str, Any]], plt.Figure]:
    """The answer of one model."""
    rows = [row for subject in subjects(chosen) for row in of_base(subject, chosen.size)]
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    frame.keep(parser(__doc__).parse_args(), "proxies", find)
