"""Does RL raise confidence and lower diversity, whatever the loss, the KL and the temperature?

Claim:     along RL training the policy's confidence rises and its diversity falls (Tomihari 2026,
           arXiv 2601.04670, the section on RL's dynamics and its figures of confidence).
Command:   python experiments/confidence.py --runs RUNS --name NAME [--size full]
Time:      two seconds a run of the anagram model.
Expected:  entropy falls at prefixes that the model before RL wrote, and no less at its own.

Two ways to look at π after RL, and at π before it in the same way: at fixed prefixes, those that
the model before RL sampled, and at its own. Of its own a place t counts as often in both as in the
one that has fewer tokens there, so that a policy that writes longer or shorter is not compared with
itself elsewhere. Diversity is of texts of one length: how many pairs of a prompt's completions
begin with the same n tokens (0 for pairs that all differ), and how many of the bigrams in the first
L tokens are distinct, of as many completions before and after. (Expectation-adjusted distinct-n
depends on length, and exceeds 1 where the vocabulary is small.) π is always that of temperature 1.
"""

from argparse import Namespace
from collections import Counter
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from frame import COLOURS, Verdict, arms, compared, keep, of_size, parser
from samples import Trained, certainty, sampled, trained

from jaxdyn.train.experience import Experience

SIZES = {"toy": (4, 4), "small": (32, 16), "full": (64, 32)}
"""Held-out prompts, and completions of each."""

KINDS = ("joint", "classifier_first", "loss_", "beta_", "temperature_")
"""Arms of RL, by how their names begin, that nothing holds the entropy up in."""
OTHERS = ("shuffled", "sft", "linear_probe_then_finetune", "entropy_", "whitened_", "spill_")
PREFIXES = (1, 2, 3, 4, 6, 8)
NAMED = 2
"""The prefix of which the verdict speaks."""
MATTERS = 0.02


def matched(before: np.ndarray, after: np.ndarray, masks: tuple[np.ndarray, np.ndarray]):
    """Means over tokens [B, C] of two policies, a place weighed as in the one with fewer there."""
    counts = [mask.sum(axis=0) for mask in masks]
    weights = np.minimum(*counts)
    means = [
        np.where(mask, x, 0).sum(axis=0) / np.maximum(count, 1)
        for x, mask, count in zip((before, after), masks, counts, strict=True)
    ]
    return [float((mean * weights).sum() / weights.sum()) for mean in means]


def agreement(found: Experience, n: int) -> float:
    """The share of a prompt's pairs of completions whose first n tokens are the same.

    A completion that ends before is compared with what it has: its end is a token too.
    """
    shares = []
    for group in found.groups():
        counts = Counter(tuple(ids[:n]) for ids in group).values()
        shares.append(sum(c * (c - 1) for c in counts) / (len(group) * (len(group) - 1)))
    return float(np.mean(shares))


def distinct(before: Experience, after: Experience) -> list[float]:
    """Distinct bigrams over bigrams in the first L tokens, of as many completions of each prompt;
    L is the length that three quarters of all completions have."""
    groups = before.groups(), after.groups()
    lengths = [len(ids) for found in groups for group in found for ids in group]
    length = max(2, int(np.quantile(lengths, 0.25)))
    shares: tuple[list[float], list[float]] = ([], [])
    for pair in zip(*groups, strict=True):
        long = [[ids[:length] for ids in group if len(ids) >= length] for group in pair]
        kept = min(map(len, long))
        if not kept:
            continue
        for share, texts in zip(shares, long, strict=True):
            bigrams = [two for ids in texts[:kept] for two in pairwise(ids)]
            share.append(len(set(bigrams)) / len(bigrams))
    return [float(np.mean(share)) if share else np.nan for share in shares]


def look(run: Trained, size: str) -> dict[str, Any]:
    """Pairs [before, after] of everything."""
    task = run.task.at_temperature(1.0)
    policies = run.before, run.after
    wrote = [sampled(task, params, *of_size(SIZES, size)) for params in policies]
    masks = [np.asarray(found.rollout.completion_mask) for found in wrote]
    fixed = [certainty(task.model, params, wrote[0].rollout) for params in policies]
    own = [fixed[0], certainty(task.model, run.after, wrote[1].rollout)]
    names = ("entropy", "confidence")
    return {
        "base": run.base,
        "fixed": {n: matched(*(x[n] for x in fixed), (masks[0], masks[0])) for n in names},
        "own": {n: matched(*(x[n] for x in own), tuple(masks)) for n in names},
        "agreement": [[agreement(found, n) for n in PREFIXES] for found in wrote],
        "distinct": distinct(*wrote),
        "reward": [float(np.nanmean(found.rewards.total)) for found in wrote],
        "length": [float(mask.sum() / len(mask)) for mask in masks],
    }


def change(row: dict[str, Any], *path: str) -> float:
    """After less before."""
    for name in path:
        row = row[name]
    return row[1] - row[0]


def is_of(arm: str, kind: str) -> bool:
    """Whether an arm is the one of that name or, of a kind that ends in _, begins with it."""
    return arm == kind or (kind.endswith("_") and arm.startswith(kind))


def of_rl(rows: dict[str, Any]) -> list[str]:
    """The arms of RL without anything that holds the entropy up."""
    return [arm for arm in rows if any(is_of(arm, kind) for kind in KINDS)]


def verdicts(rows: dict[str, Any]) -> list[Verdict]:
    """From the rows alone."""
    joint = list(rows["joint"].values())
    place = PREFIXES.index(NAMED)
    rises = [row["agreement"][1][place] - row["agreement"][0][place] for row in joint]
    seen = [
        ("RL lowers the entropy at fixed prefixes", "fall of the entropy, nats a token, at prefixes"
         " of the model before", [-change(row, "fixed", "entropy") for row in joint]),
        ("RL lowers the entropy at its own prefixes", "fall of the entropy, nats a token, places"
         " matched", [-change(row, "own", "entropy") for row in joint]),
        ("RL raises confidence", "rise of the largest probability at fixed prefixes",
         [change(row, "fixed", "confidence") for row in joint]),
        ("RL lowers diversity", f"rise of the share of pairs with the same first {NAMED} tokens",
         rises),
    ]  # fmt: skip
    found = [compared(*one, MATTERS, over="trainings") for one in seen]
    if "shuffled" in rows:
        fallen = [-change(row, "fixed", "entropy") for row in rows["shuffled"].values()]
        claim = "It does so where rewards are shuffled within a prompt's completions"
        label = "fall of the entropy, nats a token, at prefixes of the model before"
        found.append(compared(claim, label, fallen, MATTERS, over="trainings"))
    names = of_rl(rows)
    seeds = set.intersection(*(set(rows[arm]) for arm in names))
    varied = [arm for arm in names if any(is_of(arm, kind) for kind in KINDS[2:])]
    if varied and seeds:
        falls = {a: [-change(rows[a][s], "fixed", "entropy") for s in sorted(seeds)] for a in names}
        least = min(falls, key=lambda arm: np.mean(falls[arm]))
        found.append(
            compared(
                "It does so under every loss, KL weight and temperature",
                "fall of the entropy at fixed prefixes, nats, in the arm where it is least",
                falls[least],
                MATTERS,
                over="trainings",
                note=f"Least of {len(names)} arms: {least}.",
            )
        )
    return found


def draw(rows: dict[str, Any], name: str) -> plt.Figure:
    """The entropy's change by arm, both ways; against reward; and prefixes that agree."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 0.22 * len(rows) + 2.6), layout="constrained"
    )
    for row, arm in enumerate(rows):
        for kind, colour, shift in (("fixed", COLOURS[0], -0.15), ("own", COLOURS[1], 0.15)):
            values = [change(x, kind, "entropy") for x in rows[arm].values()]
            error = 2 * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
            label = None if row else ("fixed prefixes" if kind == "fixed" else "own, matched")
            left.errorbar(
                np.mean(values), row + shift, xerr=error, color=colour, marker="o", markersize=4,
                capsize=2, linestyle="", label=label,
            )  # fmt: skip
        gain = np.mean([change(x, "reward") for x in rows[arm].values()])
        fall = np.mean([change(x, "fixed", "entropy") for x in rows[arm].values()])
        style = {"marker": "os^Dv"[row // len(COLOURS) % 5], "color": COLOURS[row % len(COLOURS)]}
        middle.plot(gain, fall, linestyle="", label=arm, **style)
    left.set_yticks(range(len(rows)), list(rows), fontsize=7)
    left.axvline(0, color="0.6", linewidth=0.7)
    left.invert_yaxis()
    left.set(xlabel="change of the entropy, nats a token")
    left.legend(frameon=False, fontsize=7)
    middle.legend(frameon=False, fontsize=6)
    middle.set(xlabel="change of the held-out reward", ylabel="change of the entropy, nats, fixed")
    for when, (label, dashes) in enumerate((("before", ":"), ("after RL", "-"))):
        values = np.array([row["agreement"][when] for row in rows["joint"].values()])
        right.plot(PREFIXES, values.mean(axis=0), dashes, color=COLOURS[0], marker="o", label=label)
    right.set(xlabel="n", ylabel="pairs with the same first n tokens")
    right.set_yscale("symlog", linthresh=1e-3)
    right.legend(frameon=False, fontsize=7)
    seeds = sorted({len(x) for x in rows.values()})
    figure.suptitle(
        f"{name}: {' to '.join(map(str, seeds[:: max(1, len(seeds) - 1)]))} seeds an arm; "
        "bars: ± 2 standard errors",
        fontsize=9,
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], dict[str, Any], plt.Figure]:
    """The answer of one model's trainings."""
    rows: dict[str, Any] = {}
    for kind in (*KINDS, *OTHERS):
        for arm in arms(chosen.runs):
            if is_of(arm, kind):
                found = {run.seed: look(run, chosen.size) for run in trained(chosen.runs, arm)}
                rows |= {arm: found} if found else {}
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    keep(parser(__doc__).parse_args(), "confidence", find)
